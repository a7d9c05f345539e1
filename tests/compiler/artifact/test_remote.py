"""Sources and artifacts by URL, in a file system in memory and in a store of objects, which has no folders: the same bytes as on disk."""

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from moec.compiler import driver
from moec.compiler.errors import MoecError
from moec.compiler.runtime.artifact import Artifact
from places import TINY


class ObjectStore(MemoryFileSystem):
    """Objects by their keys, as S3 has them: no folders are made, and errors are of a kind of its own."""

    protocol = "objects"
    store = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("objects://"))

    def makedirs(self, path, exist_ok=False):
        """Make nothing: keys hold slashes."""

    def rm_file(self, path):
        """Remove an object."""
        del self.store[self._strip_protocol(path)]


class StoreError(Exception):
    """What a cloud's library raises."""


@pytest.fixture(params=["memory", pytest.param("objects", marks=pytest.mark.long)])
def files(request):
    fsspec.register_implementation("objects", ObjectStore, clobber=True)
    found = fsspec.filesystem(request.param)
    for path in TINY.iterdir():
        if path.is_file() and path.suffix in (".json", ".safetensors"):
            found.pipe_file(f"/models/tiny/{path.name}", path.read_bytes())
    yield found
    found.store.clear()


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return driver.compile(TINY, out=tmp_path_factory.mktemp("local") / "out", quantize="experts=int8")


@pytest.mark.long
def test_bytes_are_those_of_a_folder(files, local):
    name = files.protocol if isinstance(files.protocol, str) else files.protocol[0]
    source, out = f"{name}://models/tiny", f"{name}://results/tiny"
    artifact = driver.compile(source, out=out, quantize="experts=int8")
    assert artifact.manifest["source"]["name"] == source
    stored = {path.split("/", 3)[-1]: files.cat_file(path) for path in files.find("/results/tiny")}
    assert set(stored) == {*local.manifest["files"], "moec.json"}
    for file in ("model.onnx", "model.onnx.data", "tokenizer.json"):
        assert stored[file] == (local.folder / file).read_bytes()
    # it is opened by its URL, and another one takes its place whole
    opened = Artifact.open(out, check=True)
    ids = np.arange(5)[None]
    given = (ids, np.ones_like(ids), ids)
    assert np.array_equal(opened.session().step(*given)[0], local.session().step(*given)[0])
    files.pipe_file("/results/tiny/old.bin", b"of an artifact before")
    driver.compile(source, out=out, quantize="experts=int8")
    assert {path.split("/", 3)[-1] for path in files.find("/results/tiny")} == set(stored)


def test_what_is_not_there_or_not_ours(files, monkeypatch):
    name = files.protocol if isinstance(files.protocol, str) else files.protocol[0]
    with pytest.raises(MoecError, match="the source does not exist"):
        driver.compile(f"{name}://models/other", out=f"{name}://results/x")
    files.pipe_file("/home/notes.txt", b"mine")
    with pytest.raises(MoecError, match="did not write"):
        driver.compile(f"{name}://models/tiny", out=f"{name}://home")
    assert files.cat_file("/home/notes.txt") == b"mine"

    def refuse(*_, **__):
        raise StoreError("403 Forbidden")

    monkeypatch.setattr(type(files), "get_file", refuse)
    with pytest.raises(MoecError, match="the URL cannot be read: 403 Forbidden"):
        driver.compile(f"{name}://models/tiny", out=f"{name}://results/x")


def test_a_file_system_that_nothing_here_reads(tmp_path):
    with pytest.raises(MoecError, match=r"nothing here reads such URLs|cannot be read"):
        driver.compile("unheard-of://models/tiny", out=tmp_path / "out")
