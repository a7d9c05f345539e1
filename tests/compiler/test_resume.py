"""A compile that was killed goes on where it was: the same bytes as one that was not, and what was written is not made again."""

import subprocess
import sys

import pytest
from moec.compiler import driver
from moec.compiler.artifact.manifest import read_manifest
from moec.compiler.text.printer import print_module
from moec.compiler.weights.sink import TiledFile
from places import TINY

LIMIT = 4_000_000  # bytes for tiles: many small ones
KILLED = """
import os, signal, sys
from moec.compiler import driver
from moec.compiler.weights.sink import TiledFile

write, left = TiledFile.write, int(sys.argv[4])

def dying(self, offset, chunk):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, offset, chunk)

TiledFile.write = dying
driver.compile(sys.argv[1], sys.argv[5], sys.argv[3], weights=sys.argv[2], memory_limit={limit}, quantize="experts=int8")
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "tiny.moir"
    path.write_text(print_module(driver.compile(TINY, stop_after="moe")))
    return path


def compiled(program, out, target="cpu", **options):
    return driver.compile(
        program, target, out, weights=TINY, memory_limit=LIMIT, quantize="experts=int8", **options
    )  # fmt: skip


def kill(program, out, writes, target="cpu"):
    """Compile in a process that kills itself after so many writes; return the folder that it leaves."""
    code = KILLED.format(limit=LIMIT)
    arguments = [str(program), str(TINY), str(out), str(writes), target]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, timeout=300)
    assert done.returncode == -9, done.stderr.decode()
    (left,) = [p for p in out.parent.iterdir() if p.name.startswith(f".{out.name}.partial-")]
    return left


def counted_jobs(monkeypatch):
    """Return a list that grows by one for each write of a tile."""
    writes, write = [], TiledFile.write
    monkeypatch.setattr(TiledFile, "write", lambda self, o, chunk: (writes.append(o), write(self, o, chunk)))
    return writes


@pytest.mark.long
def test_killed_and_resumed_equals_byte_for_byte(program, tmp_path, monkeypatch):
    whole = compiled(program, tmp_path / "whole")
    everything = counted_jobs(monkeypatch)
    compiled(program, tmp_path / "again")
    left = kill(program, tmp_path / "out", len(everything) // 2)
    assert (left / "model.onnx.data").stat().st_size > 0
    before = len(everything)
    artifact = compiled(program, tmp_path / "out", resume=True)
    made = len(everything) - before
    assert made <= before - len(everything[: before // 2]) + 8  # the jobs that were under way, once more
    assert read_manifest(artifact.folder)["files"] == read_manifest(whole.folder)["files"]
    for name in whole.manifest["files"]:
        assert (artifact.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "out", "whole"]


@pytest.mark.long
def test_bytes_that_were_lost_are_written_again(program, tmp_path):
    whole = compiled(program, tmp_path / "whole")
    left = kill(program, tmp_path / "out", 20)
    data = left / "model.onnx.data"
    with data.open("r+b") as file:
        file.seek(4096)
        file.write(bytes(4096))
    journal = next((left / ".journal").glob("model*"))
    journal.write_text(journal.read_text() + "77 12:")  # a line that was cut short
    artifact = compiled(program, tmp_path / "out", resume=True)
    assert read_manifest(artifact.folder)["files"] == read_manifest(whole.folder)["files"]


@pytest.mark.long
def test_another_compile_does_not_go_on_with_it(program, tmp_path):
    left = kill(program, tmp_path / "out", 20)
    other = driver.compile(program, "cpu", tmp_path / "out", weights=TINY, memory_limit=LIMIT, resume=True)
    assert not left.exists()
    plain = driver.compile(program, "cpu", tmp_path / "plain", weights=TINY, memory_limit=LIMIT)
    assert read_manifest(other.folder)["files"] == read_manifest(plain.folder)["files"]


def test_what_is_interrupted_is_kept_where_it_is_asked_for(program, tmp_path, monkeypatch):
    writes, write = [], TiledFile.write

    def interrupted(self, offset, chunk):
        writes.append(offset)
        if len(writes) == 12:
            raise KeyboardInterrupt
        write(self, offset, chunk)

    for resume, left in ((False, 0), (True, 1)):
        writes.clear()
        with monkeypatch.context() as patched:
            patched.setattr(TiledFile, "write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                compiled(program, tmp_path / "out", resume=resume)
        assert len(list(tmp_path.glob(".out.partial-*"))) == left
    artifact = compiled(program, tmp_path / "out", resume=True)
    assert artifact.manifest["target"] == "cpu"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
