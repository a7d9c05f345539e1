"""`moec compile`, `verify`, `run` and `inspect` on a tiny checkpoint, as a user types them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from moec.compiler.text.parser import parse_module
from moec_command import invoke, shell
from places import CONFIGS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny random Qwen3-MoE with a byte-level tokenizer."""
    import torch
    from moec.compiler.frontends.families import FAMILIES
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("cli") / "tiny"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES["qwen3_moe"].config(vocab_size=259, max_position_embeddings=64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {c: i for i, c in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def artifact(checkpoint) -> Path:
    """The checkpoint, compiled by the command in its own process."""
    done = shell("compile", checkpoint.name, "-o", "art", cwd=checkpoint.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "art\n"
    assert done.stderr.startswith("compiled in ")
    assert len(done.stderr.splitlines()) == 1
    return checkpoint.parent / "art"


def test_compile_prints_ir(checkpoint, tmp_path):
    done = shell("compile", checkpoint, "--stop-after", "moe")
    assert (done.returncode, done.stderr) == (0, "")
    assert parse_module(done.stdout).stage == "moe"
    result = invoke("compile", checkpoint, "--stop-after", "moe", "-o", tmp_path / "x.moir")
    assert (result.exit_code, result.stdout) == (0, "")
    assert (tmp_path / "x.moir").read_text("utf-8") == done.stdout


def test_compile_needs_weights(tmp_path):
    result = invoke("compile", CONFIGS / "OLMoE-1B-7B-0924", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "there are no weights to compile" in result.stderr
    assert not (tmp_path / "out").exists()


def test_compile_says_what_is_stored(checkpoint, quantized, tmp_path):
    done = invoke("compile", checkpoint, "-o", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["folder"] == str(tmp_path / "out") and found["seconds"] > 0
    assert found["bytes"] == sum(
        file.stat().st_size for file in (tmp_path / "out").iterdir() if file.name != "moec.json"
    )
    assert "; 32.00 bits a weight (f32)" in done.stderr
    manifest = json.loads((quantized / "moec.json").read_text("utf-8"))
    assert {"uint4_g32", "int8_g64"} & {name for names in manifest["precision"].values() for name in names}


@pytest.mark.usefixtures("one_thread")
def test_verify_begins_with_the_verdict_on_quantized_weights(quantized, artifact):
    text = invoke("verify", quantized, "--against", artifact.parent / "tiny", "--text-tokens", "40").stdout
    assert re.match(
        r"quantized to \d\.\d\d bits a weight, .*tiny: KL [\d.e-]+.*, top-1 agreement [\d.]+%, perplexity", text
    )
    assert "greedy tokens" not in text
    kept = json.loads((quantized / "moec.json").read_text("utf-8"))["figures"]["measured"]
    assert text.startswith(kept["verdict"])
    assert kept["text"]["tokens"] == 39  # each but the last predicts the next one


@pytest.mark.usefixtures("one_thread")
def test_compile_with_verify_records_the_figures(checkpoint, tmp_path):
    result = invoke("compile", checkpoint, "-o", tmp_path / "out", "--verify", "--why")
    assert result.exit_code == 0, result.stderr
    assert "verified: relative difference of logits" in result.stderr
    assert json.loads((tmp_path / "out" / "moec.json").read_text("utf-8"))["figures"]["measured"]["passed"] is True


def test_inspect_an_artifact(artifact):
    report = json.loads(invoke("inspect", artifact, "--json").stdout)
    assert (report["target"], report["stage"]) == ("cpu", "kernel")
    assert report["files"]["model.onnx.data"] > 0
    assert report["parameters"]["active"] < report["parameters"]["total"]
    text = invoke("inspect", artifact).stdout
    assert "target cpu" in text and "model.onnx.data" in text


def test_figures_do_not_change_on_the_way(checkpoint, artifact):
    source, compiled = (json.loads(invoke("inspect", p, "--json").stdout) for p in (checkpoint, artifact))
    for key in ("parameters", "state"):
        assert source[key] == compiled[key]
    assert source["bytes"]["checkpoint"] == compiled["bytes"]["checkpoint"]
    assert source["per_token"]["flops"] == pytest.approx(compiled["per_token"]["flops"], rel=0.1)


@pytest.mark.usefixtures("one_thread")
def test_verify(artifact, tmp_path, monkeypatch):
    monkeypatch.chdir(artifact.parent)  # the source is named as it was given, from there
    result = invoke("verify", artifact, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["passed"] is True
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 20, "utf-8")
    lines = invoke("verify", artifact, "--text", text, "--against", artifact.parent / "tiny").stdout.splitlines()
    assert any("perplexity" in line for line in lines)


# --- files that were changed ---------------------------------------------------------------------------------------


def flip_a_bit(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


def changed(artifact: Path, tmp_path: Path, name: str, change) -> Path:
    """Return a copy of the artifact with one file changed."""
    copy = Path(shutil.copytree(artifact, tmp_path / "copy"))
    (copy / name).write_bytes(change((copy / name).read_bytes()))
    return copy


@pytest.mark.parametrize("name", ["model.onnx.data", "model.onnx", "program.moir", "config.json", "tokenizer.json"])
def test_a_changed_byte_is_found(artifact, tmp_path, name):
    copy = changed(artifact, tmp_path, name, flip_a_bit)
    for command in (
        ["verify", copy, "--against", artifact.parent / "tiny"],
        ["run", copy, "--tokens", "5", "--check-files"],
    ):
        result = invoke(*command)
        assert result.exit_code == 2
        assert result.stderr.startswith(
            f"error: {name} is not as it was written: its sha256 differs\n  at {copy / name}"
        )
        assert result.stdout == ""


@pytest.mark.parametrize("change", [lambda data: data + b"\n", lambda data: data[:-1]], ids=["longer", "shorter"])
@pytest.mark.parametrize("name", ["model.onnx.data", "generation_config.json"])
def test_a_changed_size_is_always_found(artifact, tmp_path, name, change):
    copy = changed(artifact, tmp_path, name, change)
    for command in (["run", copy, "--tokens", "5"], ["inspect", copy], ["verify", copy]):
        result = invoke(*command)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: {name} is not as it was written: it has "), result.stderr


@pytest.fixture(scope="module")
def quantized(artifact, tmp_path_factory) -> Path:
    """The checkpoint with int4 weights, which have an accuracy."""
    out = tmp_path_factory.mktemp("int4") / "art"
    assert invoke("compile", artifact.parent / "tiny", "-o", out, "--quantize", "int4").exit_code == 0
    return out


def linked_as_in_a_hub(artifact: Path, folder: Path) -> Path:
    """Make every file a link to a file in another folder that is named by its hash."""
    (folder / "blobs").mkdir()
    snapshot = folder / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for file in artifact.iterdir():
        blob = folder / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def weights_on_another_disk(artifact: Path, folder: Path) -> Path:
    copy = Path(shutil.copytree(artifact, folder / "copy"))
    (copy / "model.onnx.data").rename(folder / "weights.bin")
    (copy / "model.onnx.data").symlink_to(folder / "weights.bin")
    return copy


@pytest.mark.parametrize("link", [linked_as_in_a_hub, weights_on_another_disk])
def test_an_artifact_of_links_runs(quantized, tmp_path, link):
    folder = link(quantized, tmp_path)
    for accuracy in ("fast", "exact"):
        command = ["--tokens", "5,6,7", "--greedy", "--max-new-tokens", "8", "--accuracy", accuracy]
        found = invoke("run", folder, *command)
        assert found.exit_code == 0, found.stderr
        assert found.stdout == invoke("run", quantized, *command).stdout
    assert invoke("run", folder, "--tokens", "5", "--max-new-tokens", "1", "--check-files").exit_code == 0
    assert invoke("inspect", folder).exit_code == 0


def test_tokens_beyond_the_vocabulary(artifact):
    for tokens in ("1,259", "100000000", "99999999999999999999"):
        result = invoke("run", artifact, "--tokens", tokens, "--max-new-tokens", "2")
        assert (result.exit_code, result.stdout) == (2, "")
        assert "is outside of the vocabulary of 259 tokens" in result.stderr
    assert invoke("run", artifact, "--tokens", "1,258", "--max-new-tokens", "2").exit_code == 0


@pytest.mark.usefixtures("one_thread")
def test_verify_fails_with_1(artifact, tmp_path):
    """Against another model the numbers differ."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(artifact.parent / "tiny", dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "other")
    result = invoke("verify", artifact, "--against", tmp_path / "other", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["passed"] is False


def test_run_streams_text(artifact):
    done = shell("run", artifact, "--prompt", "hello", "--greedy", "--max-new-tokens", "6")
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stderr and len(done.stderr.splitlines()) == 1
    found = json.loads(
        invoke("run", artifact, "--prompt", "hello", "--greedy", "--max-new-tokens", "6", "--json").stdout
    )
    assert done.stdout == found["text"] + "\n"
    assert found["prompt_tokens"] == 5 and len(found["tokens"]) <= 6


def test_run_prints_tokens_that_go_in_again(artifact):
    first = invoke("run", artifact, "--tokens", "5, 6 7", "--greedy", "--max-new-tokens", "4").stdout.strip()
    assert len(first.split(",")) <= 4
    again = invoke("run", artifact, "--tokens", f"5,6,7,{first.split(',')[0]}", "--greedy", "--max-new-tokens", "3")
    assert again.stdout.strip() == ",".join(first.split(",")[1:])


def test_run_draws_where_a_seed_is_given(artifact):
    drawn = [
        invoke("run", artifact, "--tokens", "5,6", "--seed", s, "--max-new-tokens", "12").stdout for s in (1, 1, 2)
    ]
    greedy = invoke("run", artifact, "--tokens", "5,6", "--max-new-tokens", "12").stdout
    assert drawn[0] == drawn[1] != drawn[2]
    assert greedy == invoke("run", artifact, "--tokens", "5,6", "--greedy", "--max-new-tokens", "12").stdout
    assert greedy not in drawn
