"""The artifact folder: whole or not there, whatever happens to the process that writes it."""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from moec.compiler.artifact import atomic
from moec.compiler.artifact.atomic import atomic_folder, clean_up_after_killed
from moec.compiler.errors import MoecError


def write(folder: Path, text: str, files: int = 3) -> None:
    """Write an artifact whose files all hold the same text."""
    with atomic_folder(folder) as partial:
        for i in range(files):
            (partial / f"{i}.data").write_text(text)
        (partial / "moec.json").write_text(text)


def contents(folder: Path) -> set[str]:
    return {f.read_text() for f in folder.iterdir()}


def hidden(parent: Path) -> list[str]:
    return sorted(p.name for p in parent.iterdir() if p.name.startswith("."))


@pytest.fixture(params=["exchange", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "_exchange_folders", lambda first, second: False)
    return request.param


def test_new_and_replaced(tmp_path: Path, way: str) -> None:
    final = tmp_path / "deep" / "artifact"
    write(final, "one")
    assert contents(final) == {"one"}
    write(final, "two", files=2)
    assert contents(final) == {"two"}
    assert sorted(f.name for f in final.iterdir()) == ["0.data", "1.data", "moec.json"]
    assert hidden(final.parent) == []


def test_the_new_folder_has_ordinary_permissions(tmp_path: Path) -> None:
    write(tmp_path / "a", "x")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_empty_folder_is_taken(tmp_path: Path, way: str) -> None:
    (tmp_path / "a").mkdir()
    write(tmp_path / "a", "x")
    assert contents(tmp_path / "a") == {"x"}


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "a").symlink_to(tmp_path / "big")
    write(tmp_path / "a", "x")
    assert (tmp_path / "a").is_symlink() and contents(tmp_path / "big") == {"x"}


def test_an_exception_leaves_the_old_one(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "a") as partial:
        (partial / "moec.json").write_text("new")
        raise KeyboardInterrupt
    assert contents(tmp_path / "a") == {"old"} and hidden(tmp_path) == []
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "b"):  # about another file: not our error
        (tmp_path / "no such file").read_text()
    assert not (tmp_path / "b").exists() and hidden(tmp_path) == []


def test_nothing_else_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("precious")
    for name, reason in (("file", "is a file"), ("folder", "was not written by moec")):
        with pytest.raises(MoecError, match=reason) as caught:
            write(tmp_path / name, "x")
        assert caught.value.where == str(tmp_path / name) and caught.value.todo and caught.value.exit_code == 2
    assert (tmp_path / "folder" / "thesis.tex").read_text() == "precious" and hidden(tmp_path) == []
    with pytest.raises(MoecError, match="cannot write below"):
        write(tmp_path / "file" / "below", "x")


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(MoecError, match="was not written by moec"), atomic_folder(tmp_path / "a"):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "thesis.tex").write_text("precious")
    assert (tmp_path / "a" / "thesis.tex").exists() and hidden(tmp_path) == []


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_are_removed(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")
    other = subprocess.Popen(["sleep", "60"])
    try:
        gone = [f".a.{kind}-{pid}-0123abcd" for kind in ("partial", "old") for pid in (dead_pid(), os.getpid())]
        kept = [f".a.partial-{other.pid}-0123abcd", f".b.partial-{dead_pid()}-0123abcd", ".a.partial-mine"]
        for name in gone + kept:
            (tmp_path / name / "sub").mkdir(parents=True)
        write(tmp_path / "a", "x")
        assert hidden(tmp_path) == sorted(kept)
    finally:
        other.kill()
        other.wait()


def test_two_runs_at_once_in_one_process(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "a") as first:
        (first / "moec.json").write_text("first")
        write(tmp_path / "a", "second")
        assert contents(tmp_path / "a") == {"second"} and first.exists()
    assert contents(tmp_path / "a") == {"first"} and hidden(tmp_path) == []


def test_cut_short_between_two_renames(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")
    (tmp_path / "a").rename(tmp_path / f".a.old-{dead_pid()}-0123abcd")
    clean_up_after_killed(tmp_path / "a")
    assert contents(tmp_path / "a") == {"old"} and hidden(tmp_path) == []


def test_second_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", "old")
    monkeypatch.setattr(atomic, "_exchange_folders", lambda first, second: False)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(MoecError, match="cannot write a: Input/output error"):
        write(tmp_path / "a", "new")
    assert contents(tmp_path / "a") == {"old"} and hidden(tmp_path) == []


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", "old")
    with pytest.raises(MoecError, match="no space left") as caught, atomic_folder(tmp_path / "a"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")
    assert "free some space" in caught.value.todo and caught.value.where == str(tmp_path / "a")
    # some file systems find out only when the data is really written

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(MoecError, match="no space left"):
        write(tmp_path / "a", "new")
    assert contents(tmp_path / "a") == {"old"} and hidden(tmp_path) == []


def test_file_size_limit(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(MoecError, match="larger than a file may be"), atomic_folder(tmp_path / "a") as partial:
            (partial / "moec.json").write_bytes(bytes(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path / "a") == {"old"} and hidden(tmp_path) == []


WRITER = """
import sys
from pathlib import Path
from moec.compiler.artifact import atomic
if sys.argv[2] == "two renames":
    atomic._exchange_folders = lambda first, second: False
atomic._sync_folder = lambda folder: None  # a killed process loses nothing that was written: more swaps a second
print("ready", flush=True)
version = int(sys.argv[3])
while True:
    version += 1
    with atomic.atomic_folder(Path(sys.argv[1])) as partial:
        for name in ("moec.json", "a.data", "b.data", "c.data"):
            (partial / name).write_text(str(version))
"""


@pytest.mark.parametrize("swap", ["exchange", "two renames"])
def test_killed_at_random_points(tmp_path: Path, swap: str) -> None:
    """Kill a process that replaces an artifact again and again; what is at the final name is always one version."""
    final = tmp_path / "artifact"
    write(final, "0")
    luck = random.Random(20)
    version, left = 0, 0
    for count in range(200):
        if count >= 20 and version > 20 and left:
            break  # a busy machine needs more rounds until one is killed on the way
        arguments = [sys.executable, "-c", WRITER, str(final), swap, str(version)]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(luck.uniform(0, 0.03))
        if swap == "exchange":  # never missing, even while it is being replaced
            assert all((final / "moec.json").parent.exists() for _ in range(200))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        left += bool(hidden(tmp_path))
        if swap == "two renames":
            clean_up_after_killed(final)
        (text,) = contents(final)
        assert len(list(final.iterdir())) == 4 and int(text) >= version
        version = int(text)
    assert version > 20 and left > 0  # it did replace, and was killed on the way
    write(final, "last")
    assert contents(final) == {"last"} and hidden(tmp_path) == []


def test_the_system_call_is_there(tmp_path: Path) -> None:
    """On Linux the tests above must not have run without the exchange."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "x").touch()
    done = atomic._exchange_folders(tmp_path / "a", tmp_path / "b")
    assert done == (tmp_path / "b" / "x").exists()
    if sys.platform == "linux":
        assert done
    with pytest.raises(OSError):
        atomic._exchange_folders(tmp_path / "a", tmp_path / "missing")
    shutil.rmtree(tmp_path / "a")
