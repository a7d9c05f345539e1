"""Triton sources for Ascend: what is rewritten for triton-ascend, its environment, and what it lowers (marked `ascend`)."""

import json
import os
import platform
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ascend_programs import FORMATS, TOKENS, programs, routed
from chips_for_tests import CHIPS, cast, close, run
from moec.compiler.errors import MoecError
from moec.targets.accelerator import ascend
from moec.targets.accelerator.ascend import Environment, Kernel, environment, is_newer, kernel_of, lower
from moec.targets.accelerator.ascend_program import for_ascend
from moec.targets.accelerator.builder import Builder
from moec.targets.accelerator.profile import shipped_profiles
from moec.targets.accelerator.tiles import Load, walk

OLDER, NEWER = "Ascend910B4", "Ascend950DT_9582"
ALL = [case for form in FORMATS for case in programs(CHIPS["ascend-950"][0], [form])]
built = f"{sys.version_info[0]}.{sys.version_info[1]}" in ascend.PYTHONS and platform.machine() in ascend.MACHINES
needs_build = pytest.mark.skipif(not built, reason="triton-ascend is not built for this Python or machine")


# --- what is rewritten ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("label, program, given", ALL, ids=[case[0] for case in ALL])
def test_a_rewritten_program_computes_the_same(label, program, given, newer):
    _, chip = CHIPS["ascend-950"]
    roomy = replace(chip, capacity=dict.fromkeys(chip.capacity, 1 << 30))
    wanted = run(program, roomy, {"T": TOKENS}, **given)
    rewritten = for_ascend(program, newer)
    found = run(rewritten, roomy, {"T": TOKENS}, **as_rewritten(program, rewritten, given))
    for name, value in wanted.items():
        close(found[name], torch.tensor(value.astype(np.float32)), 1e-2 if value.dtype.itemsize == 2 else 1e-5)


def as_rewritten(program, rewritten, given):
    """Return tensors as the rewritten program takes them: the same bytes."""
    arrays = {a.name: cast(given[a.name], a.dtype) for a in program.arguments if a.name in given}
    return {
        a.name: arrays[a.name].view(np.uint8) if a.dtype == "u8" else arrays[a.name]
        for a in rewritten.arguments
        if a.name in given
    }


def test_weights_in_fractals_are_loaded_without_quotients():
    layout, _ = CHIPS["ascend-950"]
    for label, program, _given in routed("bf16", layout):
        for statement in walk(for_ascend(program, True).body):
            if isinstance(statement, Load) and statement.tensor in ("up", "down"):
                assert not any("%" in index for index in statement.at), label
                assert sum("//" in index for index in statement.at) == 1  # of the first column, which is a scalar


def test_fp8_is_not_computed_before_the_950():
    b = Builder("narrow", CHIPS["ascend-910b"][0])
    b.tensor("x", "f32", 32)
    b.tensor("y", "f8e4m3", 32, role="output")
    b.grid("i", 1)
    b.load("v", "x", ["arange(32)"])
    b.store("y", ["arange(32)"], 'cast(v, "f8e4m3")')
    program = b.program()
    with pytest.raises(MoecError, match="an Ascend before the 950 has not"):
        for_ascend(program, False)
    x = np.linspace(-3, 3, 32, dtype=np.float32)
    found = run(for_ascend(program, True), CHIPS["ascend-950"][1], {}, x=x)["y"]
    np.testing.assert_array_equal(found, cast(x, "f8e4m3").view(np.uint8))


@pytest.mark.parametrize("dtype", ["f8e4m3", "f8e5m2"])
def test_fp8_is_decoded_as_numpy_does(dtype):
    b = Builder("wide", CHIPS["ascend-910b"][0])
    b.tensor("x", dtype, 256)
    b.tensor("y", "f32", 256, role="output")
    b.grid("i", 1)
    b.load("v", "x", ["arange(256)"])
    b.store("y", ["arange(256)"], 'cast(v, "f32")')
    codes = np.arange(256, dtype=np.uint8)
    found = run(for_ascend(b.program(), False), CHIPS["ascend-910b"][1], {}, x=codes)["y"]
    wanted = codes.view(cast(0.0, dtype).dtype).astype(np.float32)
    finite = np.isfinite(wanted)
    assert finite.sum() > 240
    np.testing.assert_array_equal(found[finite], wanted[finite])


def test_the_generation_of_every_ascend_is_known():
    chips = [p for p in shipped_profiles().values() if p.family == "ascend"]
    assert {p.name: is_newer(p.arch) for p in chips} == {p.name: p.name.startswith("ascend-950") for p in chips}
    assert len(chips) >= 4
    with pytest.raises(MoecError, match="Ascend310B4 is no Ascend"):
        is_newer("Ascend310B4")


# --- the environment -----------------------------------------------------------------------------------------------


def test_no_environment_is_made_unless_asked_for(tmp_path):
    assert environment(tmp_path / "none") is None
    assert list(tmp_path.iterdir()) == []


def test_the_environment_lies_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ascend.default_folder() == tmp_path / "moec" / "triton-ascend-3.2.0"
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert ascend.default_folder() == tmp_path / ".cache" / "moec" / "triton-ascend-3.2.0"


def make_folder(folder, requirements=ascend.REQUIREMENTS, python=sys.executable):
    """Write what an environment looks like, with a Python that has no triton-ascend."""
    (folder / "bin").mkdir(parents=True)
    (folder / "moec.json").write_text(json.dumps({"requirements": list(requirements)}))
    if python:
        (folder / "bin" / "python").symlink_to(python)
    return folder


def test_a_damaged_environment_is_said_to_be_one(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    for folder, said in (
        (tmp_path / "other", "was not made by moec, or not to its end"),
        (
            make_folder(tmp_path / "old", ["triton-ascend==3.1.0"]),
            "has triton-ascend==3.1.0 and not triton-ascend==3.2.0",
        ),
        (make_folder(tmp_path / "gone", python=tmp_path / "no-python"), "has lost its Python"),
    ):
        with pytest.raises(MoecError, match=said) as error:
            environment(folder)
        assert error.value.where == str(folder)
    with pytest.raises(MoecError):
        environment(tmp_path / "other", create=True, python=sys.executable)
    assert (tmp_path / "other" / "file").read_text() == "mine"


def test_a_python_that_does_not_do(tmp_path):
    for python, said in (
        ("no-such-python", "no-such-python is none that runs"),
        (shutil.which("false"), "false is none that runs"),
    ):
        with pytest.raises(MoecError, match=said):
            environment(tmp_path / "new", create=True, python=python)
    assert list(tmp_path.iterdir()) == []


def test_another_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(MoecError, match="no build for Linux on riscv64"):
        environment(tmp_path / "new", create=True)


@needs_build
def test_without_a_network_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(MoecError, match=r"cannot install triton-ascend==3\.2\.0") as error:
        environment(tmp_path / "new", create=True, python=sys.executable)
    assert "No matching distribution" in error.value.excerpt
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_does_not_start(tmp_path):
    kernel = Kernel("", "k", {})
    with pytest.raises(MoecError, match="triton-ascend does not start") as error:
        lower([kernel], OLDER, Environment(make_folder(tmp_path / "empty")))
    assert "ModuleNotFoundError" in error.value.excerpt
    with pytest.raises(MoecError, match="cannot run the environment's Python"):
        lower([kernel], OLDER, Environment(make_folder(tmp_path / "gone", python=None)))
    assert lower([], OLDER, Environment(tmp_path / "gone")) == []


# --- lowering ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def triton_ascend(request):
    """Return the environment, made in pytest's cache folder by the first run."""
    return environment(Path(request.config.cache.mkdir("ascend")) / "environment", create=True)
