"""Conversations: the chat template as transformers renders it, stop texts, and why a generation ends."""

import json

import pytest
from chat_tokenizer import TEMPLATE, write_chat_tokenizer
from moec.compiler.errors import MoecError
from moec.compiler.runtime.artifact import Artifact
from moec.compiler.runtime.chat import load_template
from moec.compiler.runtime.generate import generate
from moec.compiler.runtime.tokenizer import TextStream, Tokenizer
from moec.targets.cpu.run.session import load_session
from moec_command import invoke

MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": " hello there "},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "go on"},
]


@pytest.fixture
def talking(tiny_lm_copy):
    """Return the artifact of the small model with a tokenizer for conversations, and that of transformers."""
    return tiny_lm_copy, write_chat_tokenizer(tiny_lm_copy)


@pytest.mark.parametrize("messages", [MESSAGES, MESSAGES[1:2]], ids=["four", "one"])
def test_tokens_of_a_conversation_are_those_of_transformers(talking, messages):
    folder, theirs = talking
    artifact = Artifact.open(folder)
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert artifact.chat_template.render(messages) == wanted
    found = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert artifact.chat_tokens(messages) == list(found)
    assert found.count(0) == 1  # the template writes the first token, the tokenizer adds no second one
    answer = artifact.chat(messages[-1:], max_new_tokens=5)
    assert answer.tokens == artifact.run(tokens=artifact.chat_tokens(messages[-1:]), max_new_tokens=5).tokens


def named_templates(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").unlink()
    config["chat_template"] = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def in_a_json_file(folder):
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))


@pytest.mark.parametrize("place", [named_templates, in_a_json_file])
def test_where_templates_stand(talking, place):
    folder, theirs = talking
    wanted = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    place(folder)
    assert load_template(folder).render(MESSAGES) == wanted


@pytest.mark.parametrize(
    "template, messages, message",
    [
        (TEMPLATE, [{"role": "tool", "content": "x"}], "refuses the conversation: no tools"),
        (TEMPLATE, [], "no messages"),
        (TEMPLATE, [{"role": "user", "content": 3}], r"messages\[0\].content"),
        (TEMPLATE, ["hello"], r"messages\[0\]"),
        ("{% for %}", MESSAGES, "refuses the conversation"),
        ("{{ messages.__class__.__mro__ }}", MESSAGES, "refuses the conversation"),
        ("{{ messages.append(1) }}", MESSAGES, "refuses the conversation"),
        ("{{ nothing.here }}", MESSAGES, "refuses the conversation"),
        (" ", MESSAGES, "no chat template"),
    ],
)
def test_what_a_template_refuses(talking, template, messages, message):
    folder, _ = talking
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(MoecError, match=message):
        load_template(folder).render(messages)


def test_a_model_without_a_template(tiny_lm):
    with pytest.raises(MoecError, match="has no chat template") as caught:
        load_template(tiny_lm[1])
    assert "--prompt" in caught.value.todo


# --- stopping -------------------------------------------------------------------------------------------------------

LETTERS = Tokenizer(lambda text: list(text.encode()), lambda ids: bytes(ids).decode(errors="replace"))


@pytest.mark.parametrize(
    "text, stops, wanted",
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two t"], "one "),
        ("aab aaab", ["aaab"], "aab "),
        ("abababac", ["abac"], "abab"),
        ("no end", ["ending"], "no end"),
        ("grün 🙂 end", ["🙂"], "grün "),
    ],
)
def test_text_ends_in_front_of_a_stop_text(text, stops, wanted):
    stream = TextStream(LETTERS, stops)
    pieces = []
    for token in text.encode():
        pieces.append(stream.push(token))
        assert wanted.startswith("".join(pieces))  # nothing of a stop text is shown, not even its beginning
    assert "".join(pieces) + stream.finish() == wanted
    assert stream.stopped == (wanted != text)


def test_why_a_generation_stops(talking):
    folder, _ = talking
    artifact, session = Artifact.open(folder), load_session(folder)
    free = artifact.run(tokens=[7, 8], max_new_tokens=12, session=session, eos=())
    assert free.stopped == ("max-new-tokens",)
    stop = free.text[0][4:6]
    found = artifact.run(tokens=[7, 8], max_new_tokens=12, session=session, eos=(), stop=[stop])
    assert found.stopped == ("stop text",)
    assert found.text[0] == free.text[0][: free.text[0].index(stop)]
    assert found.tokens[0] == free.tokens[0][: len(found.tokens[0])]
    last = free.tokens[0][6]
    ended = artifact.run(tokens=[7, 8], max_new_tokens=12, session=session, eos=[last])
    assert ended.stopped == ("end token",)
    assert ended.text == [artifact.tokenizer.decode(ended.tokens[0][:-1])]  # the end token is no text


def test_the_end_of_the_context_stops(tiny_lm):
    folder = tiny_lm[1]
    session = load_session(folder)
    prompts = [[5, 9, 2] * 19, [7] * 50]  # 57 and 50 of 64 tokens
    found = generate(session, prompts, max_new_tokens=100, greedy=True)
    assert found.stopped == ("context", "context")
    assert [len(row) for row in found.tokens] == [8, 8]  # 7 that fit, and the one that the last of them gives
    alone = generate(session, prompts[1:], max_new_tokens=100, greedy=True)
    assert len(alone.tokens[0]) == 15 and alone.tokens[0][:8] == found.tokens[1]
    full = generate(session, [[5, 9] * 32], max_new_tokens=3, greedy=True)
    assert (len(full.tokens[0]), full.stopped) == (1, ("context",))
    with pytest.raises(MoecError, match="context of 64"):
        generate(session, [[5] * 65], max_new_tokens=1)


# --- commands -------------------------------------------------------------------------------------------------------


def test_run_answers_a_message(talking, tmp_path):
    folder, _ = talking
    file = tmp_path / "message.txt"
    file.write_text("go on\n", "utf-8")
    command = ["run", folder, "--chat", "--system", "be brief", "--greedy", "--max-new-tokens", "5", "--json"]
    asked = [MESSAGES[0], MESSAGES[3]]
    wanted = Artifact.open(folder).chat(asked, max_new_tokens=5, greedy=True)
    for prompt, typed in (
        (["--prompt", "go on"], None),
        (["--prompt-file", file], None),
        (["--prompt-file", "-"], "go on"),
    ):
        result = invoke(*command, *prompt, input=typed)
        assert result.exit_code == 0, result.stderr
        found = json.loads(result.stdout)
        assert (found["tokens"], found["text"]) == (wanted.tokens[0], wanted.text[0])
        assert found["stopped"] == wanted.stopped[0]


def test_chat_keeps_the_conversation(talking):
    folder, _ = talking
    artifact = Artifact.open(folder)
    settings = ["--greedy", "--max-new-tokens", "4"]
    result = invoke("chat", folder, *settings, input="hello\n\ngo\n/clear\nhello\n/exit\nhello\n")
    assert result.exit_code == 0, result.stderr
    messages, answers = [], []
    for text in ("hello", "go"):
        messages.append({"role": "user", "content": text})
        answers.append(artifact.chat(messages, max_new_tokens=4, greedy=True).text[0])
        messages.append({"role": "assistant", "content": answers[-1]})
    assert result.stdout == "".join(f"{answer}\n" for answer in [*answers, answers[0]])
    full = invoke("chat", folder, *settings, input="hello\n" * 9)
    assert full.exit_code == 2 and "/clear begins a new one" in full.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt", "x", "--system", "y"], "--system belongs to --chat"),
        (["--tokens", "1", "--chat"], "--chat answers a text"),
        (["--prompt", "x", "--greedy", "--top-k", "3"], "--greedy draws nothing"),
        (["--prompt", "x", "--prompt-file", "y"], "give one of"),
        (["--prompt-file", "/nothing/here"], "No such file"),
        (["--prompt", "x", "--stop", ""], "a stop text is empty"),
    ],
)
def test_options_that_do_not_go_together(talking, arguments, message):
    result = invoke("run", talking[0], *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
