"""Damaged checkpoints at the command line: one clear error each, exit code 2, nothing left behind."""

import json
import shutil
import struct

import pytest
from click.testing import CliRunner
from moec.compiler.cli.commands import main
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.runtime.artifact import Artifact
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
    result = CliRunner().invoke(main, ["compile", str(folder), "-o", str(tmp_path / "out")])
    assert result.exit_code == 2, result.output
    text = result.stderr or result.output
    assert text.count("error:") == 1
    assert CASES[damage] in text
    assert "Traceback" not in text
    assert not (tmp_path / "out").exists()


def test_a_model_without_experts_compiles(tmp_path):
    folder = save(random_model(FAMILIES["llama"]), tmp_path / "llama")
    result = CliRunner().invoke(main, ["compile", str(folder), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    artifact = Artifact.open(tmp_path / "out", check=True)
    assert len(artifact.run(tokens=[5, 6, 7], max_new_tokens=4, eos=()).tokens[0]) == 4
