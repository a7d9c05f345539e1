"""A checkpoint that is written to while it is compiled: the compile fails and puts nothing in place."""

import json
import os
import shutil
import time
from pathlib import Path

import gguf_files
import moec
import numpy as np
import pytest
from moec.compiler.errors import MoecError
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.weights.sources.gguf import open_gguf
from tiny_models import random_model, save


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return a tiny Mixtral checkpoint."""
    return save(random_model(FAMILIES["mixtral"]), tmp_path_factory.mktemp("source") / "model")


def rewrite(folder):
    """Write other numbers over the second half of the weights: same size, same header, same file."""
    with (folder / "model.safetensors").open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size // 2)
        file.write(b"\x3c" * (size - size // 2))


def replace(folder):
    """Put another file of the same length at the same name, as a download does."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.with_suffix(".new").write_bytes(data[:-4] + bytes(4))
    path.with_suffix(".new").replace(path)


def remove(folder):
    (folder / "model.safetensors").unlink()


def other_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))


CASES = {
    rewrite: "model.safetensors was changed",
    replace: "model.safetensors was changed",
    remove: "model.safetensors went away",
    other_config: "config.json, the index or a header was changed",
}


def compile_and(change, source, out, **options):
    """Compile and change the source at the first progress."""
    state = {"changed": False}

    def watch(progress):
        if not state["changed"] and progress.phase == "writing" and progress.done:
            state["changed"] = True
            time.sleep(0.02)  # a file system's clock has ticks
            change(source)

    with moec.watch_progress(watch):
        return moec.compile(source, out=out, **options)


@pytest.mark.parametrize("change", CASES, ids=lambda f: f.__name__)
def test_nothing_is_put_in_place(checkpoint, tmp_path, change):
    source = Path(shutil.copytree(checkpoint, tmp_path / "in"))
    with pytest.raises(MoecError, match=f"{CASES[change]} while it was compiled") as caught:
        compile_and(change, source, tmp_path / "out")
    assert caught.value.exit_code == 2 and str(source) in caught.value.where
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_an_old_artifact_stays(checkpoint, tmp_path):
    source = Path(shutil.copytree(checkpoint, tmp_path / "in"))
    before = moec.compile(source, out=tmp_path / "out").manifest
    with pytest.raises(MoecError, match="was changed"):
        compile_and(rewrite, source, tmp_path / "out")
    assert moec.Artifact.open(tmp_path / "out", check=True).manifest == before


def test_links_and_reading_do_not_count(checkpoint, tmp_path):
    """Files of a hub's cache are links; somebody else may read them, or link to them, meanwhile."""
    blobs = Path(shutil.copytree(checkpoint, tmp_path / "blobs"))
    source = tmp_path / "in"
    source.mkdir()
    for file in blobs.iterdir():
        (source / file.name).symlink_to(file)

    def look(folder):
        (folder / "model.safetensors").read_bytes()
        os.link(blobs / "model.safetensors", tmp_path / "another")

    compile_and(look, source, tmp_path / "out")


def test_a_gguf_file(tmp_path):
    numbers = np.arange(64, dtype=np.float32)
    file = gguf_files.write(tmp_path / "model.gguf", {"general.name": "x"}, {"a": ("f32", (2, 32), numbers.tobytes())})
    with open_gguf(file).checkpoint as opened:
        opened.opened.check()
        time.sleep(0.02)
        with file.open("r+b") as stream:
            stream.seek(-4, os.SEEK_END)
            stream.write(bytes(4))
        with pytest.raises(MoecError, match=r"model\.gguf was changed while it was compiled"):
            opened.opened.check()
