"""A live model brings what a folder has beside the weights: config, generation config, and its tokenizer."""

import json

import moec
import pytest
import tokenizers
import transformers
from moec.compiler.errors import MoecError
from moec.compiler.frontends.companions import live_companions
from places import TINY
from tokenizers import decoders, models, pre_tokenizers


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(TINY)


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer of other words than the model's own."""
    words = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"<end>": 256}
    made = tokenizers.Tokenizer(models.BPE(vocab=words, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


def test_the_tokenizer_of_the_folder_it_was_loaded_from(model):
    found = live_companions(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert found[name] == (TINY / name).read_bytes()
    own, generation = (json.loads(found[name]) for name in ("config.json", "generation_config.json"))
    assert own["architectures"] == ["Qwen3MoeForCausalLM"] and own["num_local_experts"] == 16
    assert generation["eos_token_id"] == 0


def test_a_tokenizer_of_transformers_or_a_folder(model, tokenizer, tmp_path):
    given = live_companions(model, tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert given["tokenizer.json"] == (tmp_path / "tokenizer.json").read_bytes()
    assert live_companions(model, tmp_path)["tokenizer.json"] == given["tokenizer.json"]


def test_a_model_made_of_a_config_has_none(model):
    made = transformers.AutoModelForCausalLM.from_config(model.config)
    made.name_or_path = ""
    assert set(live_companions(made)) == {"config.json", "generation_config.json"}


@pytest.mark.parametrize("wrong", [7, "gone", "empty"])
def test_what_is_no_tokenizer(model, tmp_path, monkeypatch, wrong):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MoecError, match=r"the folder has no tokenizer|a tokenizer cannot be a int"):
        live_companions(model, wrong)
    with pytest.raises(MoecError, match="belongs to a live model"):
        moec.compile(TINY, out=tmp_path / "out", tokenizer=wrong)


def test_settings_that_were_changed_travel_along(model, tokenizer, tmp_path):
    """What counts is the model as it is, not the folder that it came from; end tokens are those of all its parts."""
    before = model.generation_config
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=0.5, top_k=20, eos_token_id=[3, 4]
    )
    try:
        artifact = moec.compile(model, out=tmp_path / "out", tokenizer=tokenizer)
    finally:
        model.generation_config = before
    assert artifact.sampling() == {"temperature": 0.5, "top_k": 20, "top_p": 1.0}
    assert artifact.eos == {0, 3, 4, 256}
    assert artifact.tokenizer.encode("ab") == tokenizer("ab")["input_ids"]
    assert moec.Artifact.open(tmp_path / "out", check=True).manifest["files"]["tokenizer.json"]
