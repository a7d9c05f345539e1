"""Triton sources for Ascend: what is rewritten for triton-ascend, its environment, and what it lowers (marked `ascend`)."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import kernel_checks as checks
import numpy as np
import pytest
import torch
from ascend_programs import FORMATS, TOKENS, dense, programs, routed
from chips_for_tests import CHIPS, cast, close, run
from linalg_interpreter import run_linalg
from moec.compiler.errors import MoecError
from moec.compiler.ir.dtypes import DTYPES
from moec.targets.accelerator.artifact.ascend_objects import MISSING, find_environment
from moec.targets.accelerator.ascend import lower as ascend
from moec.targets.accelerator.ascend.blocks import blocks_of, one_block_a_core
from moec.targets.accelerator.ascend.lower import (
    AscendKernel,
    Environment,
    is_newer,
    kernel_of,
    lower_on_ascend,
    open_environment,
)
from moec.targets.accelerator.ascend.program import for_ascend
from moec.targets.accelerator.chip.profile import find_profile, shipped_profiles
from moec.targets.accelerator.kernels.choices import RowTile
from moec.targets.accelerator.target import find_accelerator
from moec.targets.accelerator.tile.builder import Builder
from moec.targets.accelerator.tile.expr import evaluate_expr
from moec.targets.accelerator.tile.tiles import Dot, Load, Program, walk_statements
from moec_command import invoke
from places import TINY

OLDER, NEWER = "Ascend910B4", "Ascend950DT_9582"
REWRITTEN = list(programs(CHIPS["ascend-950"][0], ["bf16", "fp8_b128"]))
built = f"{sys.version_info[0]}.{sys.version_info[1]}" in ascend.PYTHONS and platform.machine() in ascend.MACHINES
needs_build = pytest.mark.skipif(not built, reason="triton-ascend is not built for this Python or machine")


# --- what is rewritten ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("label, program, given", REWRITTEN, ids=[case[0] for case in REWRITTEN])
def test_a_rewritten_program_computes_the_same(label, program, given, newer):
    _, chip = CHIPS["ascend-950"]
    roomy = replace(chip, capacity=dict.fromkeys(chip.capacity, 1 << 30))
    wanted = run(program, roomy, {"T": TOKENS}, **given)
    rewritten = for_ascend(program, newer)
    found = run(rewritten, roomy, {"T": TOKENS}, **as_rewritten(program, rewritten, given))
    for name, value in wanted.items():
        close(found[name], torch.tensor(value.astype(np.float32)), 1e-2 if value.dtype.itemsize == 2 else 1e-5)


@pytest.mark.parametrize("label, program, given", REWRITTEN, ids=[case[0] for case in REWRITTEN])
def test_one_block_a_core_computes_the_same(label, program, given):
    """Three blocks, which take points of the grid one after another: what the simulator counts as written stays written once."""
    _, chip = CHIPS["ascend-950"]
    roomy = replace(chip, capacity=dict.fromkeys(chip.capacity, 1 << 30))
    looped = one_block_a_core(program, 3)
    assert [str(extent).startswith("minimum") for _, extent in looped.grid] == [True]
    wanted, found = (run(p, roomy, {"T": TOKENS}, **given) for p in (program, looped))
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)
    source = kernel_of(looped, NEWER).source
    assert "in tl.range(tl.program_id(0)," in source or "in tl.range(core," in source
    compile(source, label, "exec")


def test_products_run_on_cube_cores_and_the_rest_on_vector_cores():
    profile = find_profile("ascend-950dt", {})
    assert blocks_of(profile, REWRITTEN[0][1]) == 32  # white paper: 32 cube cores, two vector cores beside each
    b = Builder("narrow", CHIPS["ascend-950"][0])
    b.tensor("y", "f32", 32, role="output")
    b.grid("i", 1)
    b.store("y", ["arange(32)"], 'cast(arange(32), "f32")')
    assert blocks_of(profile, b.program()) == 64


def test_only_gathers_are_kept_inside_their_tensors():
    layout, _ = CHIPS["ascend-910b"]
    for _, program, _ in dense("int4_g128", layout):
        assert for_ascend(program, False) == program
    _, program, _ = next(iter(routed("int4_g128", layout)))
    changed = [
        (a, b)
        for a, b in zip(walk_statements(program.body), walk_statements(for_ascend(program, False).body), strict=True)
        if a != b
    ]
    loads = [(a, b) for a, b in changed if isinstance(a, Load)]  # the others are what they stand in
    assert {a.tensor for a, _ in loads} == {"x"}
    for before, after in loads:
        assert str(after.at[0]) == "maximum(minimum(token, T - 1), 0)[:, None]"
        assert after == replace(before, at=(after.at[0], *before.at[1:]))


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
        for statement in walk_statements(for_ascend(program, True).body):
            if isinstance(statement, Load) and statement.tensor in ("up", "down"):
                assert not any("%" in str(index) for index in statement.at), label
                assert sum("//" in str(index) for index in statement.at) == 1  # of the first column, which is a scalar


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
    chips = [p for p in shipped_profiles().values() if p.family.name == "ascend"]
    assert {p.name: is_newer(p.arch) for p in chips} == {p.name: p.name.startswith("ascend-950") for p in chips}
    assert len(chips) >= 4
    with pytest.raises(MoecError, match="Ascend310B4 is no Ascend"):
        is_newer("Ascend310B4")


# --- the environment -----------------------------------------------------------------------------------------------


def test_no_environment_is_made_unless_asked_for(tmp_path):
    assert open_environment(tmp_path / "none") is None
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
            open_environment(folder)
        assert error.value.where == str(folder)
    with pytest.raises(MoecError):
        open_environment(tmp_path / "other", create=True, python=sys.executable)
    assert (tmp_path / "other" / "file").read_text() == "mine"


def test_a_python_that_does_not_do(tmp_path):
    for python, said in (
        ("no-such-python", "no-such-python is a program that does not run"),
        (shutil.which("false"), "false is a program that does not run"),
    ):
        with pytest.raises(MoecError, match=said):
            open_environment(tmp_path / "new", create=True, python=python)
    assert list(tmp_path.iterdir()) == []


def test_another_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(MoecError, match="no build for Linux on riscv64"):
        open_environment(tmp_path / "new", create=True)


def test_a_worker_that_does_not_start(tmp_path):
    kernel = AscendKernel("", "k", {})
    with pytest.raises(MoecError, match="triton-ascend does not start") as error:
        lower_on_ascend([kernel], OLDER, Environment(make_folder(tmp_path / "empty")))
    assert "ModuleNotFoundError" in error.value.excerpt
    with pytest.raises(MoecError, match="cannot run the environment's Python"):
        lower_on_ascend([kernel], OLDER, Environment(make_folder(tmp_path / "gone", python=None)))
    assert lower_on_ascend([], OLDER, Environment(tmp_path / "gone")) == []


def test_without_an_environment_it_is_said_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setattr(ascend, "default_folder", lambda: tmp_path / "none")
    assert find_environment(False) == (None, MISSING)
    monkeypatch.setattr(ascend, "default_folder", lambda: make_folder(tmp_path / "old", ["triton-ascend==3.1.0"]))
    where, why = find_environment(False)
    assert where is None and "has triton-ascend==3.1.0" in why and "make it anew" in why
    with pytest.raises(MoecError, match="toolchain cannot be build"):
        find_accelerator("ascend-950dt", {"toolchain": "build"})


# --- lowering ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def triton_ascend(request):
    """Return the environment, made in pytest's cache folder by the first run."""
    if not built:
        pytest.skip("triton-ascend is not built for this Python or machine")
    return open_environment(Path(request.config.cache.mkdir("ascend")) / "environment", create=True)


@dataclass(frozen=True)
class Case:
    """A program that was simulated: what it was given and its outputs."""

    program: Program
    scalars: dict[str, int]
    given: dict[str, np.ndarray]
    wanted: dict[str, np.ndarray]


def simulated(kind, name, monkeypatch):
    """Return the programs of a kind of kernels, simulated on a chip: small ones of this file, or those of kernel_checks."""
    cases = []

    def record(program, chip, scalars, **given):
        arrays = {a.name: cast(given[a.name], a.dtype) for a in program.arguments if a.name in given}
        wanted = run(program, chip, scalars, **given)
        cases.append(Case(program, scalars, arrays, wanted))
        return wanted

    layout, chip = CHIPS[name]
    if kind in FORMATS:
        for _, program, given in programs(layout, [kind]):
            record(program, chip, {"T": TOKENS}, **given)
        return cases
    monkeypatch.setattr(checks, "run", record)
    if kind == "norm":
        checks.check_norms(name, RowTile(2, 64), 7)
        checks.check_rope_of_halves(name, True)
        checks.check_rope_of_pairs(name, True, True)
        checks.check_before_cached_attention(name, True, 5, 3, 8, True)
    elif kind == "attention":
        checks.check_more_of_attention(name, {"chunk": 12, "window": 5, "sinks": True}, 3)
        checks.check_masked_slots(name, {"sinks": True, "window": 4}, 1)
        checks.check_a_mask_for_each_token(name)
        checks.check_values_in_the_latent(name, 16)
    else:
        checks.check_window_and_entries(name, 1, 4, True)
        checks.check_window_and_entries(name, 3, 8, False)
    return cases


KINDS = (*FORMATS, "norm", "attention", "compressed")


@pytest.mark.ascend
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name, arch", [("ascend-910b", OLDER), ("ascend-950", NEWER)])
def test_what_is_lowered_computes_the_same(name, arch, kind, triton_ascend, monkeypatch):
    cases = [replace(c, program=one_block_a_core(c.program, 3)) for c in simulated(kind, name, monkeypatch)]
    assert cases
    for case, done in zip(
        cases, lower_on_ascend([kernel_of(c.program, arch) for c in cases], arch, triton_ascend), strict=True
    ):
        label = case.program.name
        assert not done.error, f"{label}: {done.stage}: {done.error}"
        check_form(case.program, done.linalg)
        found = lowered_outputs(case, done.linalg, arch, triton_ascend)
        for tensor, wanted in case.wanted.items():
            low = np.isneginf(wanted.astype(np.float32))  # the largest score where there is none
            np.testing.assert_array_equal(np.isneginf(found[tensor].astype(np.float32)), low)
            tolerance = 1e-2 if wanted.dtype.itemsize == 2 else 2e-5
            close(np.where(low, 0, found[tensor]), torch.tensor(np.where(low, 0, wanted).astype(np.float32)), tolerance)


def check_form(program, linalg):
    """Check that a kernel is what bishengir-compile takes: one function of memrefs, products as linalg.matmul."""
    dots = [s for s in walk_statements(program.body) if isinstance(s, Dot)]
    assert linalg.count("linalg.matmul ") == len(dots)
    assert f"func.func @{program.name}(" in linalg
    assert f'mix_mode = "{"mix" if dots else "aiv"}"' in linalg  # on cube and vector cores, or on vector cores alone
    assert linalg.count("tt.tensor_kind = ") == len(program.arguments)
    for dot in dots:
        (m, k), (n, _) = program.buffers[dot.a].shape, program.buffers[dot.b].shape
        n = n if dot.transpose else program.buffers[dot.b].shape[1]
        assert re.search(
            rf"linalg\.matmul .*tensor<{m}x{k}x\w+>, tensor<{k}x{n}x\w+>\) outs.*tensor<{m}x{n}xf32>", linalg
        )


def lowered_outputs(case, linalg, arch, triton_ascend):
    """Run Linalg text on a case's tensors and return its outputs."""
    rewritten = for_ascend(case.program, is_newer(arch))
    tensors = {}
    for argument in case.program.arguments:
        shape = tuple(int(evaluate_expr(n, case.scalars)) for n in argument.shape)
        value = case.given.get(argument.name)
        value = np.full(shape, 77, DTYPES[argument.dtype].numpy) if value is None else value.reshape(shape)
        signless = rewritten.argument(argument.name).dtype in ("u8", "bool")
        tensors[argument.name] = np.array(value.view(np.int8) if signless else value)
    points = np.prod([int(evaluate_expr(extent, case.scalars)) for _, extent in rewritten.grid])
    scalars = [case.scalars[name] for name in rewritten.scalars]
    run_linalg(generic(linalg, triton_ascend), list(tensors.values()), scalars, int(points))
    return {name: tensors[name].view(wanted.dtype).reshape(wanted.shape) for name, wanted in case.wanted.items()}


def generic(text, triton_ascend):
    """Return MLIR in generic form, printed by the adapter program itself."""
    (adapter,) = triton_ascend.folder.glob("lib/python*/site-packages/triton/backends/ascend/triton-adapter-opt")
    command = [str(adapter), "-", "--mlir-print-op-generic"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


COPY = """
import triton
import triton.language as tl

@triton.jit
def copy(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i))
"""


@pytest.mark.ascend
@pytest.mark.parametrize("target", ["ascend-910b", "ascend-950dt"])
def test_all_kernels_of_a_model_are_lowered(target, triton_ascend, tmp_path, monkeypatch):
    monkeypatch.setattr(ascend, "default_folder", lambda: triton_ascend.folder)
    done = invoke("compile", TINY, "--target", target, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    kernels = json.loads((tmp_path / "out" / "kernels.json").read_text())["kernels"]
    for kernel in kernels:
        (made,) = kernel["objects"].values()
        assert "error" not in made, f"{kernel['name']}: {made}"
        assert (tmp_path / "out" / made["file"]).read_text().count("linalg.matmul ") == made["products"]
    assert sum(kernel["objects"][made["arch"]]["products"] > 0 for kernel in kernels) > 10


@pytest.mark.ascend
def test_one_kernel_that_fails_leaves_the_others_alone(triton_ascend):
    copy = AscendKernel(COPY, "copy", {"x": "*fp32", "y": "*fp32"}, {"N": 64})
    kernels = [
        copy,
        replace(copy, source=COPY + "import os; os.abort()\n"),
        replace(copy, source=COPY + "import time; time.sleep(60)\n"),
        replace(copy, source="def copy(:"),
        replace(copy, name="other"),
        replace(copy, signature={"x": "*fp8e4nv", "y": "*fp8e4nv"}),
        copy,
    ]
    done = lower_on_ascend(kernels, OLDER, triton_ascend, seconds=10)
    assert [d.stage for d in done] == ["", "worker", "worker", "source", "source", "triton", ""]
    for found, said in zip(
        done, ["", "it ended the compiler", "longer than 10 s", "SyntaxError", "AttributeError", "unexpected type fp8", ""],
        strict=True,
    ):  # fmt: skip
        assert said in found.error
    for found in (done[0], done[-1]):
        assert "memref.copy" in found.linalg and "tt.func public @copy" in found.ttir
    assert lower_on_ascend(kernels[5:6], NEWER, triton_ascend)[0].error == ""  # the Ascend 950 has these types


@pytest.mark.ascend
def test_what_the_adapter_leaves_undone_is_an_error(triton_ascend):
    source = COPY.replace("tl.load(x + i)", "tl.load(x + i).to(tl.float32)")
    (done,) = lower_on_ascend(
        [AscendKernel(source, "copy", {"x": "*fp8e4nv", "y": "*fp32"}, {"N": 64})], NEWER, triton_ascend
    )
    assert done.stage == "linalg" and "the adapter left tt.fp_to_fp in it" in done.error and not done.linalg


@pytest.mark.ascend
def test_an_environment_that_was_made_is_used_again(triton_ascend):
    before = (triton_ascend.folder / "moec.json").stat().st_mtime_ns
    assert (
        open_environment(triton_ascend.folder) == open_environment(triton_ascend.folder, create=True) == triton_ascend
    )
    assert (triton_ascend.folder / "moec.json").stat().st_mtime_ns == before
    assert not [p for p in triton_ascend.folder.parent.iterdir() if p.name.startswith(".")]


@pytest.mark.ascend
@needs_build
def test_without_a_network_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(MoecError, match=r"cannot install triton-ascend==3\.2\.0") as error:
        open_environment(tmp_path / "new", create=True, python=sys.executable)
    assert "No matching distribution" in error.value.excerpt
    assert list(tmp_path.iterdir()) == []
