"""Damaged checkpoints at the command line: one clear error each, exit code 2, nothing left behind."""

import json
import re
import shutil
import struct

import moec
import pytest
import tokenizers
from moec.compiler.errors import MoecError
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.runtime.artifact import Artifact
from moec.compiler.runtime.tokenizer import load_tokenizer
from moec_command import invoke
from places import TINY
from tiny_models import random_model, save


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Return a tiny Mixtral checkpoint in several shards with an index."""
    folder = tmp_path_factory.mktemp("sharded")
    random_model(FAMILIES["mixtral"]).save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def shard(folder):
    """Return the path of the first shard."""
    return min(folder.glob("*.safetensors"))


def rewrite_header(folder, change):
    """Pass the header of the first shard through a function."""
    path = shard(folder)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header[next(name for name in header if name != "__metadata__")])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def remove_shard(folder):
    shard(folder).unlink()


def truncate(folder):
    data = shard(folder).read_bytes()
    shard(folder).write_bytes(data[:-1000])


def lie_about_sizes(folder):
    rewrite_header(folder, lambda entry: entry.update(shape=[entry["shape"][0] + 1, *entry["shape"][1:]]))


def unknown_dtype(folder):
    rewrite_header(folder, lambda entry: entry.update(dtype="F7_E3M3"))


def index_outside(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {name: "../other.safetensors" for name in index["weight_map"]}
    path.write_text(json.dumps(index))
    shutil.copy(shard(folder), folder.parent / "other.safetensors")


def no_model_type(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["model_type"]
    path.write_text(json.dumps(config))


def pickles(folder):
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


CASES = {
    remove_shard: "is missing: the index names",
    truncate: "bytes",
    lie_about_sizes: "bytes",
    unknown_dtype: "F7_E3M3",
    index_outside: "../other.safetensors",
    no_model_type: "has no model_type",
    pickles: "pickle",
}


@pytest.mark.parametrize("damage", CASES, ids=lambda f: f.__name__)
def test_one_error_and_exit_code_2(sharded, tmp_path, damage):
    folder = shutil.copytree(sharded, tmp_path / "in" / "model")
    damage(folder)
    result = invoke("compile", folder, "-o", tmp_path / "out")
    assert result.exit_code == 2, result.output
    text = result.stderr or result.output
    assert text.count("error:") == 1
    assert CASES[damage] in text
    assert "Traceback" not in text
    assert not (tmp_path / "out").exists()


# --- texts and names from outside ------------------------------------------------------------------------------------


def one_error(*arguments):
    """Run the command and return its one message."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert len(re.findall("^[Ee]rror: ", result.stderr, re.MULTILINE)) == 1
    assert not re.search(r"Traceback|\w+Error\b|codec|object", result.stderr)
    return result.stderr


RANGE = """moec 1 stage graph
dim B in 1..8

func @main(%x: f32[B, 4])
    -> (f32[B, 4]) {
  const %w : f32[4, 4] = stack(tensor("experts.{0..LAST}.w", f32[4]))
  %y = core.linear(%x, %w, _) : f32[B, 4]
  return %y
}
"""


@pytest.mark.parametrize("last", ["65536", "2147483648", "9" * 5000])
def test_a_range_of_names_is_bounded(tmp_path, last):
    path = tmp_path / "x.moir"
    path.write_text(RANGE.replace("LAST", last))
    message = one_error("opt", path)
    assert "in a name is longer than 65536" in message and f"{path}:6:" in message


@pytest.fixture(scope="module")
def program():
    """Return the program of the example."""
    return invoke("compile", TINY, "--stop-after", "moe").stdout


@pytest.mark.parametrize(
    ("right", "wrong", "missing", "near"),
    [
        ("mlp.gate.weight", "mlp.gat.weight", "model.layers.0.mlp.gat.weight", "model.layers.0.mlp.gate.weight"),
        ("model.norm.weight", "model.norms.weight", "model.norms.weight", "model.norm.weight"),
        (
            "experts.{0..15}.up_proj",
            "experts.{1..16}.up_proj",
            "model.layers.0.mlp.experts.16.up_proj.weight",
            "model.layers.0.mlp.experts.",
        ),
    ],
)
def test_a_wrong_name_in_a_program_is_pointed_at(program, tmp_path, right, wrong, missing, near):
    path = tmp_path / "program.moir"
    path.write_text(program.replace(right, wrong))
    shown = one_error("compile", path, "--weights", TINY, "-o", tmp_path / "out")
    line = next(i for i, line in enumerate(path.read_text().split("\n"), 1) if wrong in line)
    column = path.read_text().split("\n")[line - 1].index(wrong)
    assert f"the checkpoint has no tensor {missing}\n" in shown
    at = int(re.search(rf"at {path}:{line}:(\d+)\n", shown)[1])
    assert at <= column + 1 and "^^^^" in shown
    assert f"the closest names that are there: {near}" in shown


def test_a_call_cannot_bind_a_longer_range(tmp_path):
    text = RANGE.replace("@main", "@f").replace("{0..LAST}", "{names}")
    main_ = """
func @main(%x: f32[B, 4])
    -> (f32[B, 4]) {
  %y = call @f(%x) {names="{0..99999999999}"} : f32[B, 4]
  return %y
}
"""
    text = text.replace("f32[4, 4] = stack(", "f32[1, 4] = stack(").replace("-> (f32[B, 4])", "-> (f32[B, 1])", 1)
    text = text.replace(": f32[B, 4]\n  return", ": f32[B, 1]\n  return", 1)
    (tmp_path / "x.moir").write_text(
        text + main_.replace("(f32[B, 4])", "(f32[B, 1])").replace("} : f32[B, 4]", "} : f32[B, 1]")
    )
    assert "longer than 65536" in one_error("inspect", tmp_path / "x.moir")


def plan(**changes):
    entry = {"layers": "0", "role": "experts", "experts": None, "format": "int8_g32", "bytes": 1, "kl": None}
    top = {
        "quantization": 1,
        "budget": "4bpw",
        "method": "rtn",
        "bits_per_weight": 4.5,
        "bytes": 1,
        "kl": 0,
        "tokens": 1,
    }
    return json.dumps({**top, "weights": [{**entry, **changes}]})


@pytest.mark.parametrize(
    "text",
    [
        plan(experts="0..99999999999"), plan(layers="0..99999999999"), plan(experts="0..40000,50000..90000"),
        plan(layers="9" * 5000), "[" * 100_000, plan(bytes=10**400), '{"quantization": NaN}', b"\xff\xfe",
    ],
    ids=range(8),
)  # fmt: skip
def test_plans(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "plan" in one_error("compile", tmp_path, "--quantize", path, "--stop-after", "moe")


@pytest.mark.parametrize("text", ["a = " + "[" * 5000 + "]" * 5000, "name = 1" + "0" * 400, "\ud800"])
def test_chips(tmp_path, text):
    path = tmp_path / "chip.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert "the profile is not TOML" in one_error("targets", path)


@pytest.mark.parametrize("argument", ["a\0b", "a\udcff"])
def test_arguments_that_are_no_text(argument):
    for command in (["compile", argument], ["run", "d", "--prompt", argument], ["compile", "x", "-o", argument]):
        assert "an argument" in one_error(*command)
    with pytest.raises(MoecError, match="the path of the source"):
        moec.compile(argument)
    with pytest.raises(MoecError, match="the path of the artifact"):
        Artifact.open(argument)


def test_names_that_are_not_utf8(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "model")
    data = shard(folder).read_bytes()
    shard(folder).write_bytes(data.replace(b".weight", b".w\xffight", 1))
    assert "the header is not JSON: byte" in one_error("compile", folder, "-o", tmp_path / "out")
    rewrite_header(folder := shutil.copytree(sharded, tmp_path / "other"), lambda entry: entry.update(dtype="\ud800"))
    assert "a text in it ends within a character" in one_error("compile", folder, "-o", tmp_path / "out")


def test_a_tokenizer_on_which_rust_panics(tmp_path):
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "pre_tokenizer": None,
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(BaseException) as caught:  # what the library does by itself
        tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert not isinstance(caught.value, Exception)
    with pytest.raises(MoecError, match="the tokenizer cannot be read: its files are damaged"):
        load_tokenizer(tmp_path)


def test_a_model_without_experts_compiles(tmp_path):
    folder = save(random_model(FAMILIES["llama"]), tmp_path / "llama")
    result = invoke("compile", folder, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    artifact = Artifact.open(tmp_path / "out", check=True)
    assert len(artifact.run(tokens=[5, 6, 7], max_new_tokens=4, eos=()).tokens[0]) == 4
