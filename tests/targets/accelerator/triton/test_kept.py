"""Compiled kernels in the user's cache: an equal one is not compiled again, any other is, and a damaged file is no answer."""

import dataclasses

import pytest
from chips_for_tests import needs_triton
from moec.compiler.errors import MoecError
from moec.targets.accelerator.kernels.experts import Experts, combine_kernel
from moec.targets.accelerator.tile.builder import Layout
from moec.targets.accelerator.tile.packing import Packing
from moec.targets.accelerator.triton import compile as compile_file
from moec.targets.accelerator.triton import workers
from moec.targets.accelerator.triton.compile import compile_request, compile_request_of
from moec.targets.accelerator.triton.kept import keep_kernel
from moec.targets.accelerator.triton.workers import compile_all

LAYOUT = Layout(("shared",), ("shared",), "registers", "registers")
EXPERTS = Experts(8, 2, 512, 256, Packing("bf16", 512, 512, 8), Packing("bf16", 512, 256, 8))

pytestmark = needs_triton


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Make the user's cache an empty folder, and return it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moec" / "objects"


WANTED = compile_request_of(combine_kernel(EXPERTS, 512, LAYOUT), "sm_90", 4)


@pytest.fixture(scope="module")
def made():
    """Return what the compiler makes of a kernel."""
    return compile_request(WANTED)


@pytest.fixture
def compiled(made, monkeypatch):
    """Return the list of what is asked of the compiler from now on, which makes the same of all but three warps."""
    seen = []

    def compile_one(self, wanted):
        seen.append(wanted)
        return MoecError("three warps are no power of two") if wanted.warps == 3 else made

    monkeypatch.setattr(workers._Worker, "compile", compile_one)
    return seen


def test_an_equal_kernel_is_compiled_once(cache, made, compiled):
    made = dataclasses.replace(made, uses=frozenset({"mma", "wgmma"}), limit=168)
    keep_kernel(WANTED, made)
    assert compile_all([WANTED, WANTED]) == [made, made] and not compiled and made.object.startswith(b"\x7fELF")
    assert len(list(cache.iterdir())) == 1  # and nothing is left of how the file was written


def test_what_changes_an_object_is_compiled_again(cache, made, compiled, monkeypatch, tmp_path):
    compile_all([WANTED])
    others = [
        dataclasses.replace(WANTED, warps=2), dataclasses.replace(WANTED, arch="gfx950"),
        dataclasses.replace(WANTED, source=WANTED.source + "\n# another\n"),
    ]  # fmt: skip
    compile_all(others)
    assert sorted(map(repr, compiled[1:])) == sorted(map(repr, others))
    compiled.clear()
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")
    compile_all([WANTED])
    newer = tmp_path / "newer.py"
    newer.write_text("# a version that compiles in another way\n")
    monkeypatch.setattr(compile_file, "__file__", str(newer))
    compile_all([WANTED])
    assert compiled == [WANTED, WANTED] and len(list(cache.iterdir())) == 6


def test_damaged_files_and_failures_are_not_answers(cache, made, compiled):
    compile_all([WANTED])
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:100], whole[:-200] + bytes(200), b"\0" + whole):
        file.write_bytes(damaged)
        assert compile_all([WANTED]) == [made] and file.read_bytes() == whole
    assert compiled == 5 * [WANTED]
    bad = dataclasses.replace(WANTED, warps=3)
    assert all(isinstance(compile_all([bad])[0], MoecError) for _ in range(2))
    assert compiled[5:] == [bad, bad] and list(cache.iterdir()) == [file]


def test_a_cache_that_cannot_be_written_costs_time_only(cache, made, compiled):
    cache.parent.parent.write_text("a file where the folder would be")
    assert compile_all([WANTED]) == compile_all([WANTED]) == [made] and compiled == [WANTED, WANTED]
