"""`moec serve`, asked by the openai package over HTTP: the tokens of single runs, streams, limits, and what is refused."""

import http.client
import json
import shutil
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from chat_tokenizer import write_chat_tokenizer
from moec.compiler.runtime.artifact import Artifact
from moec_command import MOEC, invoke

openai = pytest.importorskip("openai", reason="the extra test brings it")
uvicorn = pytest.importorskip("uvicorn", reason="the extra serve brings it")
KEY = "secret"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def artifact(tiny_lm, tmp_path_factory):
    """Return the small model's artifact with a tokenizer for conversations."""
    folder = shutil.copytree(tiny_lm[1], tmp_path_factory.mktemp("serving") / "tiny")
    write_chat_tokenizer(folder)
    return Artifact.open(folder)


class Slow:
    """A session whose steps take at least some time, and that counts them."""

    def __init__(self, session, seconds=0.0):
        self.session, self.seconds, self.steps, self.rows = session, seconds, 0, []

    def __getattr__(self, name):
        return getattr(self.session, name)

    def step(self, *arguments, **options):
        time.sleep(self.seconds)
        self.steps += 1
        self.rows.append(len(arguments[0]))
        return self.session.step(*arguments, **options)


@pytest.fixture
def serve(artifact):
    """Return a function that starts a server in a thread, and ends all of them afterwards."""
    from moec.compiler.runtime.serving.application import make_application
    from moec.compiler.runtime.serving.batches import Limits

    started = []

    def start(delay=0.0, key=None, **limits):
        session = Slow(artifact.session(threads=1), delay)
        application = make_application(artifact, session, model="tiny", limits=Limits(**limits), key=key)
        server = uvicorn.Server(uvicorn.Config(application, log_level="critical", timeout_graceful_shutdown=1))
        bound = socket.create_server(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        started.append((server, thread, bound))
        port = bound.getsockname()[1]
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key or "none", max_retries=0)
        return client, session, port

    yield start
    for server, thread, bound in started:
        server.should_exit = True
        thread.join(20)
        bound.close()


def ask(port, method, path, body=None, **headers):
    """Ask without the client's help; return the status and the JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    given = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    connection.request(method, path, body, given)
    response = connection.getresponse()
    return response.status, json.loads(response.read() or b"{}")


def test_answers_are_those_of_the_artifact(serve, artifact):
    client, _, port = serve()
    wanted = artifact.chat(HELLO, max_new_tokens=9)
    found = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=9)
    assert found.choices[0].message.content == wanted.text[0]
    assert found.choices[0].finish_reason == "length"
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (wanted.prompt_tokens, 9)
    stream = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=9, stream=True, stream_options={"include_usage": True}
    )
    pieces = list(stream)
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == wanted.text[0]
    assert pieces[-1].usage.completion_tokens == 9 and pieces[-2].choices[0].finish_reason == "length"
    plain = artifact.run("hello", max_new_tokens=9)
    assert client.completions.create(model="tiny", prompt="hello", max_tokens=9).choices[0].text == plain.text[0]
    ids = client.completions.create(model="tiny", prompt=artifact.tokenizer.encode("hello"), max_tokens=9, stream=True)
    assert "".join(piece.choices[0].text for piece in ids) == plain.text[0]
    stop = plain.text[0][3:5]
    stopped = client.completions.create(model="tiny", prompt="hello", max_tokens=9, stop=[stop]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (plain.text[0][: plain.text[0].index(stop)], "stop")
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    assert ask(port, "GET", "/health") == (200, {"status": "ok", "waiting": 0, "running": 0})


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "top_p": 0.9, "seed": 7}], ids=["greedy", "drawn"])
def test_requests_that_wait_run_together_and_keep_their_tokens(serve, artifact, settings):
    client, session, _ = serve(delay=0.02)
    prompts = ["abcdefghij"[: 1 + n % 7] + "xyz"[n % 3] for n in range(16)]
    lengths = [4 + n % 5 for n in range(16)]
    own = {key: value for key, value in settings.items() if key != "seed"}
    alone = [
        artifact.run(prompt, max_new_tokens=length, seed=settings.get("seed", 0), **own).text[0]
        for prompt, length in zip(prompts, lengths, strict=True)
    ]

    def complete(prompt, length):
        return client.completions.create(model="tiny", prompt=prompt, max_tokens=length, **settings).choices[0].text

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(complete, prompts, lengths)) == alone
    assert max(session.rows) > 1 and session.steps < sum(lengths)  # in fewer steps than one after the other
    assert max(session.rows) <= 8  # the program's batch


def test_a_batch_takes_nobody_s_room(artifact):
    """A short prompt beside a long one would reach the context's end earlier: it runs alone where it needs the room."""
    from moec.compiler.runtime.generate import Sampling
    from moec.compiler.runtime.serving.batches import Batches, Job, Limits

    done = threading.Semaphore(0)
    found = {}

    def job(name, length, wanted):
        def deliver(piece):
            if piece.stopped or piece.error:
                found[name] = (piece.tokens, piece.stopped)
                done.release()

        return Job([5] * length, Sampling(wanted, 0.0), (), deliver)

    batches = Batches(artifact.session(threads=1), artifact.tokenizer, (), True, Limits())
    for name, length, wanted in (("long", 50, 5), ("short", 4, 60), ("brief", 3, 5)):
        batches.submit(job(name, length, wanted))
    for _ in range(3):
        assert done.acquire(timeout=30)
    batches.close()
    assert found == {"long": (5, "max-new-tokens"), "short": (60, "max-new-tokens"), "brief": (5, "max-new-tokens")}


@pytest.mark.parametrize(
    "path, body, status, message",
    [
        ("chat/completions", "{", 400, "not JSON"),
        ("chat/completions", "[]", 400, "not a JSON object"),
        ("chat/completions", {}, 400, "messages is missing"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, 400, "no tools"),
        ("chat/completions", {"messages": HELLO, "model": "other"}, 404, "there is no model 'other'"),
        ("chat/completions", {"messages": HELLO, "n": 2}, 400, "n is not supported"),
        ("chat/completions", {"messages": HELLO, "tools": [{}]}, 400, "tools is not supported"),
        ("chat/completions", {"messages": HELLO, "temperature": "hot"}, 400, "temperature has a value of a wrong type"),
        ("chat/completions", {"messages": HELLO, "temperature": -1}, 400, "the temperature is -1"),
        ("chat/completions", {"messages": HELLO, "max_tokens": 0}, 400, "max_tokens"),
        ("chat/completions", {"messages": HELLO * 20}, 400, "the model's context 64"),
        ("completions", {"prompt": []}, 400, "no tokens"),
        ("completions", {"prompt": ["a", "b"]}, 400, "one prompt a request"),
        ("completions", {"prompt": "a", "stop": [""]}, 400, "none of them empty"),
        ("completions", {"prompt": "a" * 3000}, 413, "more than 2000 bytes"),
        ("nothing", {}, 404, "Not Found"),
    ],
)
def test_what_is_refused(serve, path, body, status, message):
    _, _, port = serve(body=2000)
    found, answer = ask(port, "POST", f"/v1/{path}", body if isinstance(body, str) else json.dumps(body))
    assert found == status
    assert message in json.dumps(answer.get("error", {}), ensure_ascii=False)


def test_key_host_and_content_type(serve):
    client, _, port = serve(key=KEY)
    assert client.completions.create(model="tiny", prompt="a", max_tokens=1).usage.completion_tokens == 1
    assert ask(port, "GET", "/health")[0] == 200
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        assert ask(port, "GET", "/v1/models", **headers)[0] == 401
    right = {"Authorization": f"Bearer {KEY}"}
    assert ask(port, "POST", "/v1/completions", '{"prompt": "a"}', Content_Type="text/plain", **right)[0] == 415
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/health", headers={"Host": "evil.example"})  # a page that names this machine its own
    assert connection.getresponse().status == 400


def test_a_full_queue_and_clients_that_go_away(serve):
    client, session, port = serve(delay=0.2, queue=1, batch=1)
    stream = client.completions.create(model="tiny", prompt="a", max_tokens=50, stream=True)
    next(iter(stream))  # runs
    waiting = threading.Thread(target=ask, args=(port, "POST", "/v1/completions", '{"prompt": "a", "max_tokens": 1}'))
    waiting.start()
    deadline = time.monotonic() + 20
    while ask(port, "GET", "/health")[1]["waiting"] < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model="tiny", prompt="a", max_tokens=1)
    stream.close()  # the one that waits is answered as soon as the one that ran is given up
    waiting.join(20)
    assert not waiting.is_alive() and session.steps < 50


def test_a_request_has_an_end(serve):
    client, session, _ = serve(delay=0.1, seconds=0.5)
    found = client.completions.create(model="tiny", prompt="a", max_tokens=60)
    assert found.choices[0].finish_reason == "length"
    assert session.steps <= 7 and found.usage.completion_tokens == session.steps


def test_the_command_listens_and_ends(artifact):
    process = subprocess.Popen(
        [*MOEC, "serve", str(artifact.folder), "--port", "0", "--threads", "1"], stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stderr.readline()
        assert line.startswith("tiny on http://127.0.0.1:")
        port = int(line.partition("127.0.0.1:")[2].partition("/")[0])
        assert ask(port, "GET", "/v1/models")[1]["data"][0]["id"] == "tiny"
        taken = invoke("serve", artifact.folder, "--port", port)
        assert taken.exit_code == 2 and "cannot listen" in taken.stderr
    finally:
        process.terminate()
        process.wait(20)
