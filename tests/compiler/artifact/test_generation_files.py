"""What a folder's files say about generating: end tokens wherever they stand, sampling, and values of wrong types."""

import json

import pytest
from moec.compiler.artifact.generation_files import find_end_tokens, find_sampling
from moec.compiler.errors import MoecError

UNIGRAM = {"model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["</s>", -1.5], ["a", -2.0]]}}
BPE = {"added_tokens": [{"id": 9, "content": "<|im_end|>"}], "model": {"type": "BPE", "vocab": {"<|end|>": 4, "a": 5}}}


def write(folder, **files):
    """Write files by their names without .json: objects as JSON, texts as they are."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return folder


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ({}, ()),
        ({"config": {"eos_token_id": 7}}, (7,)),
        ({"config": {"text_config": {"eos_token_id": [7, 8]}}}, (7, 8)),
        ({"config": {"thinker_config": {"text_config": {"eos_token_id": 3}}}}, (3,)),
        ({"config": {"eos_token_id": [0, 5]}, "generation_config": {"eos_token_id": 0}}, (0, 5)),
        ({"config": {"eos_token_id": 0}, "generation_config": {"eos_token_id": [5, 0, 6]}}, (5, 0, 6)),
        ({"config": {"eos_token_id": -1}, "generation_config": {"eos_token_id": 2}}, (2,)),
        # a text: its number stands in one of the tokenizer's files
        ({"tokenizer_config": {"eos_token": "x", "added_tokens_decoder": {"12": {"content": "x"}}}}, (12,)),
        ({"tokenizer_config": {"eos_token": {"content": "<|im_end|>"}}, "tokenizer": BPE}, (9,)),
        ({"tokenizer_config": {"eos_token": "<|end|>"}, "tokenizer": BPE}, (4,)),
        ({"tokenizer_config": {"eos_token": "</s>"}, "tokenizer": UNIGRAM}, (1,)),
        ({"tokenizer_config": {"eos_token": "y"}, "added_tokens": {"y": 31}}, (31,)),
        ({"tokenizer_config": {"eos_token": "z"}, "vocab": {"z": 2}}, (2,)),
        ({"special_tokens_map": {"eos_token": {"content": "z"}}, "vocab": {"z": 2}}, (2,)),
        # of a chat model: the text's end in one file, the turn's in another
        ({"config": {"eos_token_id": 4}, "tokenizer_config": {"eos_token": "<|im_end|>"}, "tokenizer": BPE}, (4, 9)),
        (
            {"generation_config": {"eos_token_id": 5}, "tokenizer_config": {"eos_token": "<|end|>"}, "tokenizer": BPE},
            (5, 4),
        ),
        # a generation_config.json that names none leaves it to config.json, else to the tokenizer
        (
            {"generation_config": {}, "config": {"eos_token_id": 7}, "tokenizer_config": {"eos_token": "a"}, "tokenizer": BPE},
            (7,),
        ),
        ({"generation_config": {}, "tokenizer_config": {"eos_token": "a"}, "tokenizer": BPE}, (5,)),
    ],
)  # fmt: skip
def test_end_tokens(tmp_path, files, ids):
    assert find_end_tokens(write(tmp_path, **files)).ids == ids


def test_an_end_token_without_a_number_is_named(tmp_path):
    found = find_end_tokens(write(tmp_path, tokenizer_config={"eos_token": "<gone>"}, tokenizer=BPE))
    assert (found.ids, found.unknown) == ((), ("<gone>",))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"generation_config": {"eos_token_id": "2"}}, "eos_token_id of generation_config.json is not a token id"),
        ({"config": {"eos_token_id": {"a": 1}}}, "eos_token_id of config.json is not a token id"),
        ({"config": {"eos_token_id": [1, None]}}, "eos_token_id of config.json is not a token id"),
        ({"config": {"eos_token_id": 1.5}}, "eos_token_id of config.json is not a token id"),
        ({"config": {"text_config": {"eos_token_id": True}}}, "text_config.eos_token_id of config.json"),
        ({"tokenizer_config": {"eos_token": 5}}, "eos_token of tokenizer_config.json is not a text"),
        ({"config": "[" * 100_000}, "config.json is not JSON: it is nested too deeply"),
        ({"config": '{"eos_token_id": 1' + "0" * 400 + "}"}, "a number of 401 digits is too long"),
        ({"config": '{"a": "\\ud800"}'}, "a text in it ends within a character"),
        ({"generation_config": "[]"}, "generation_config.json is not a JSON object"),
        ({"generation_config": "{"}, "generation_config.json is not JSON: Expecting property name"),
    ],
)
def test_wrong_end_tokens(tmp_path, files, message):
    with pytest.raises(MoecError) as caught:
        find_end_tokens(write(tmp_path, **files))
    assert message in caught.value.what and caught.value.where.startswith(str(tmp_path))


@pytest.mark.parametrize(
    "config",
    [
        {"temperature": "hot"}, {"do_sample": "yes"}, {"top_k": 2.5}, {"top_p": [0.9]}, {"temperature": True},
        {"do_sample": True, "temperature": -1}, {"do_sample": True, "top_p": 0}, {"do_sample": True, "top_p": 1.5},
        {"do_sample": True, "top_k": -3}, {"do_sample": True, "temperature": float("nan")},
        {"do_sample": True, "temperature": float("inf")},
    ],
)  # fmt: skip
def test_wrong_sampling(tmp_path, config):
    with pytest.raises(MoecError, match=rf"{list(config)[-1]} of generation_config\.json cannot be"):
        find_sampling(write(tmp_path, generation_config=config))


def test_sampling(tmp_path):
    given = {"do_sample": True, "temperature": 0, "top_p": None, "top_k": 0}
    assert find_sampling(write(tmp_path, generation_config=given)) == {"temperature": 0.0, "top_k": None, "top_p": 1.0}
