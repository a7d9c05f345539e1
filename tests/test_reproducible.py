"""The same source gives the same bytes, from any point of the way; a killed compile leaves a whole artifact."""

import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import moec
import pytest
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.runtime.artifact import Artifact
from moec.compiler.text.parser import parse_module
from moec.compiler.text.printer import print_module
from moec_command import MOEC
from places import SUPPORT
from tiny_models import random_model, save


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return a tiny Qwen3-MoE checkpoint."""
    return save(random_model(FAMILIES["qwen3_moe"]), tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def compiled(checkpoint, tmp_path_factory):
    """Return (artifact, the folder with a dump after every pass)."""
    folder = tmp_path_factory.mktemp("compiled")
    return moec.compile(checkpoint, out=folder / "artifact", dump=folder / "dump"), folder / "dump"


def hashes(artifact):
    """Return the sha256 of every file, checked against the files, with moec.json's own content."""
    Artifact.open(artifact.folder, check=True)
    return {**artifact.manifest["files"], "moec.json": json.dumps(artifact.manifest, sort_keys=True)}


def test_two_compiles_give_the_same_bytes(checkpoint, compiled, tmp_path):
    # another process: hash seeds and import order differ
    subprocess.run([*MOEC, "compile", str(checkpoint), "-o", str(tmp_path / "again")], check=True, capture_output=True)
    assert hashes(moec.load(tmp_path / "again")) == hashes(compiled[0])


def test_dumps_parse_back_and_compile_to_the_same_bytes(compiled, tmp_path):
    artifact, dump = compiled
    files = [*sorted(dump.glob("*.moir")), artifact.folder / "program.moir"]
    stages = set()
    for i, file in enumerate(files):
        text = file.read_text()
        module = parse_module(text, str(file))
        assert print_module(module) == text
        assert parse_module(print_module(module)) == module
        stages.add(module.stage)
        assert hashes(moec.compile(file, out=tmp_path / str(i))) == hashes(artifact), file.name
    assert stages == {"graph", "moe", "kernel"}


def test_dump_without_its_weights_says_so(compiled, tmp_path):
    dump = next(compiled[1].glob("00.*.moir"))
    moved = tmp_path / "program.moir"
    moved.write_text("\n".join(line for line in dump.read_text().splitlines() if not line.startswith("source")))
    with pytest.raises(moec.MoecError, match="no weights to compile"):
        moec.compile(moved, out=tmp_path / "out")


def test_dump_compiles_with_weights_from_elsewhere(checkpoint, compiled, tmp_path):
    dump = next(compiled[1].glob("00.*.moir"))
    artifact = moec.compile(dump, out=tmp_path / "out", weights=shutil.copytree(checkpoint, tmp_path / "moved"))
    assert artifact.manifest["files"] == compiled[0].manifest["files"]


def test_a_full_disk_leaves_the_old_artifact(checkpoint, compiled, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(compiled[0].folder, out)
    before = hashes(Artifact.open(out))

    def no_room() -> None:
        # files end at 64 KiB: what a full disk does to the data file, without mounting one
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))

    command = [*MOEC, "compile", str(checkpoint), "-o", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=no_room)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("error:") == 1 and "Traceback" not in result.stderr
    assert hashes(Artifact.open(out)) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.long
def test_killed_compiles_leave_a_whole_artifact(checkpoint, compiled, tmp_path):
    """Kill a compile at 20 of its changes to the files, first and last among them; the old or the new artifact is there, whole."""
    out = tmp_path / "out"
    program = (compiled[0].folder / "program.moir").read_text()
    old = hashes(compiled[0])
    other = tmp_path / "other.moir"
    other.write_text(program.replace("eps=1e-06", "eps=2e-06"))

    def compile_killed(at: int) -> subprocess.CompletedProcess:
        for left in (out, *tmp_path.glob(".out.*")):
            shutil.rmtree(left, ignore_errors=True)
        shutil.copytree(compiled[0].folder, out)
        command = f"compile {other} --weights {checkpoint} -o {out}"
        command = [sys.executable, str(SUPPORT / "killed_at.py"), str(at), str(tmp_path), *command.split()]
        return subprocess.run(command, capture_output=True, text=True)

    whole = compile_killed(0)
    assert whole.returncode == 0, whole.stderr
    new, changes = hashes(Artifact.open(out)), int(whole.stdout.splitlines()[-1])
    assert new != old and changes > 20
    seen = []
    for at in sorted({round(1 + i * (changes - 1) / 19) for i in range(20)}):
        assert compile_killed(at).returncode == -signal.SIGKILL
        found = hashes(Artifact.open(out))
        assert found in (old, new)
        seen.append(found == new)
    # what a reader finds changes once, from the old one to the new
    assert seen == sorted(seen) and set(seen) == {False, True}
    assert hashes(moec.compile(other, out=out, weights=checkpoint)) == new
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_sources_are_left_alone(checkpoint):
    assert not [p for p in Path(checkpoint).iterdir() if p.suffix in (".moir", ".onnx")]
