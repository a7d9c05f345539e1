"""Triton source printed from tile programs: what it refuses, that it means the same, that it compiles for every chip."""

import os
import subprocess
import sys

import pytest
import torch
from chips_for_tests import needs_triton
from moec.compiler.errors import MoecError
from moec.targets.accelerator.kernels.choices import RowTile, Tile
from moec.targets.accelerator.kernels.dense import Linear, linear_kernel
from moec.targets.accelerator.kernels.experts import Experts, combine_kernel, grouped_down, grouped_up, sort_kernel
from moec.targets.accelerator.kernels.norm import Norm, norm_kernel
from moec.targets.accelerator.run.launch import GpuKernel
from moec.targets.accelerator.tile.builder import Builder, Layout
from moec.targets.accelerator.tile.packing import Packing
from moec.targets.accelerator.tile.serialize import program_from_json, program_to_json
from moec.targets.accelerator.triton.architectures import ARCHITECTURES
from moec.targets.accelerator.triton.compile import compile_request, compile_request_of
from moec.targets.accelerator.triton.predict import (
    matrix_unit,
    predict_shared,
    predict_spills,
    predict_units,
)
from moec.targets.accelerator.triton.source import triton_source
from moec.targets.accelerator.triton.workers import compile_all
from places import SUPPORT, TESTS

LAYOUT = Layout(("shared",), ("shared",), "registers", "registers")
TENSOR = Layout(("shared",), ("shared",), "tensor", "registers", ("registers",))


def experts(fmt: str, hidden=512, inner=256) -> Experts:
    return Experts(8, 2, hidden, inner, Packing(fmt, 2 * inner, hidden, 8), Packing(fmt, hidden, inner, 8))


def program_of(*lets: tuple[str, str], stored: str = "0"):
    """Return a program over i, j i32[32], f f32[32], u u8[32], c i8[32], h bf16[32] and T, with these values in turn."""
    b = Builder("tried", LAYOUT)
    b.scalar("T")
    b.grid("point", 1)
    for name, dtype in (("i", "i32"), ("j", "i32"), ("f", "f32"), ("u", "u8"), ("c", "i8"), ("h", "bf16")):
        b.tensor(name, dtype, 32)
        b.load(name, name, ["arange(32)"])
    b.tensor("out", "f32", 32, role="output")
    for name, value in lets:
        b.let(name, value)
    b.store("out", ["arange(32)"], stored)
    return b.program()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("i * f", "i32 with f32"),
        ("i / j", "f64"),
        ("i * 0.5", "i32 with float"),
        ("T * 0.5", "only known at launch"),
        ("u + T", "u8 with int"),
        ("u + c", "u8 with i8"),
        ("u & 256", "u8 with int"),
        ("i ^ 1 << 31", "i32 with int"),
        ("i // j", "may be negative"),
        ("f // 2.0", "// of f32"),
        ("f & 1", "& of f32"),
        ("(f > 0.0) + (f < 1.0)", "of bools"),
        ("where(f > 0.0, 1.0, 0.0)", "at least one number that has a dtype"),
        ("exp(i)", "exp of i32"),
        ("sum(u, 0)", "sum of u8"),
        ("arange(24)", "powers of two"),
        ('bitcast(f, "i64")', "not the same bits"),
        ("nothing + 1", "has no value"),
        ("f + full(16, 0.0, \"f32\")", "[32] with [16]"),
        ("f[:, None] + f", "as many axes"),
        ("f[:, :]", "more axes"),
        ("max(f, 1)", "axis 1 of [32]"),
        ("i << 32", "a shift by 32"),
        ("f + True", "no numbers of the tile language"),
        ("f.real", "not of the tile language"),
        ('cast(f, "f64")', "cast of 1 values"),
        ("reshape(f, 4, 4)", "reshape of [32] to [4, 4]"),
        ("f[:, None]", "without a buffer"),
    ],
)  # fmt: skip
def test_what_numpy_and_triton_take_otherwise_is_refused(text, why):
    with pytest.raises(MoecError) as error:
        triton_source(program_of(("value", text)))
    assert why in str(error.value) and "tried" in error.value.where


def test_a_name_is_gone_behind_its_loop_and_keeps_its_type_in_it():
    b = Builder("tried", LAYOUT)
    b.grid("point", 4)
    b.tensor("out", "i32", 4, role="output")
    with b.loop("k", 0, 4, 1):
        b.let("last", "k")
    with pytest.raises(MoecError, match="last has no value here"):
        b.store("out", ["point"], "last")
    b = Builder("tried", LAYOUT)
    b.grid("point", 4)
    b.let("total", 'full(2, 0.0, "f32")')
    with pytest.raises(MoecError, match="has one type: cast it"), b.loop("k", 0, 4, 1):
        b.let("total", 'cast(total, "bf16")')


@pytest.mark.parametrize(
    ("at", "mask", "why"),
    [
        (["arange(32)", "0"], "", "f has 1 axes, 2 indices were given"),
        (["f"], "", "an index that is f32"),
        (["32"], "", "index 32 of an axis of 32 of f"),
        (["arange(32)"], "i", "a mask that is i32"),
        (["arange(32)"], "(arange(16) < 3)", "[32] with [16]"),
    ],
)
def test_a_load_that_does_not_reach_its_tensor_is_refused_where_it_is_added(at, mask, why):
    b = Builder("tried", LAYOUT)
    for name, dtype in (("i", "i32"), ("f", "f32")):
        b.tensor(name, dtype, 32)
        b.load(name, name, ["arange(32)"])
    with pytest.raises(MoecError) as error:
        b.load("again", "f", at, mask)
    assert why in str(error.value) and "tried" in error.value.where


def test_a_tile_is_what_its_buffer_states_and_products_fit():
    b = Builder("tried", LAYOUT)
    b.tensor("x", "bf16", 16, 32)
    at = ["arange(16)[:, None]", "arange(32)[None, :]"]
    b.operand("a", "x", at, "", (16, 32), second=False)
    b.accumulator("acc", (16, 32))
    with pytest.raises(MoecError, match=r"acc\[16, 32\] \+= \[16, 32\] times \[32, 16\]"):
        b.dot("acc", "a", "a")
    with pytest.raises(MoecError, match=r"y is stated as f32\[16, 16\] and gets bf16\[16, 32\]"):
        b.let("y", "a", (16, 16), "f32")
    for start, step in (("0", "0"), ("0.5", "1")):
        with pytest.raises(MoecError, match="of k"), b.loop("k", start, 4, step):
            pass


def test_division_of_what_may_be_negative_is_not_tritons():
    source = triton_source(program_of(("a", "i // 8"), ("b", "i % 8"), ("c", "i // 6"), ("d", "arange(32) // 6")))
    for line in ("a = i >> 3", "b = i & 7", "c = floor_div(i, 6)", "d = tl.arange(0, 32) // 6"):
        assert f"    {line}\n" in source


def test_offsets_have_64_bits_where_a_tensor_may_be_long():
    e = Experts(256, 8, 7168, 2048, Packing("bf16", 4096, 7168, 256), Packing("bf16", 7168, 2048, 256))
    source = " ".join(triton_source(grouped_up(e, Tile(64, 64, 64), LAYOUT)).split())
    assert "up_ptr + (expert.to(tl.int64) * 29360128) + (gate_row[:, None] * 7168)" in source
    assert "token[:, None].to(tl.int64) * 7168" in source


def test_an_accumulator_in_tensor_memory_prints_as_one_in_registers_does():
    e = experts("bf16")
    printed = triton_source(grouped_up(e, Tile(128, 64, 64), TENSOR))
    assert "gate_registers = gate" in printed and "value = tl.dot(a, tl.trans(w_value), value)" in printed


def test_source_is_printed_the_same_again_and_says_how_it_is_launched():
    program = grouped_down(experts("int4_g128"), Tile(16, 32, 128, 3), LAYOUT)
    source = triton_source(program, 8, 255)
    assert source == triton_source(program_from_json(program_to_json(program)), 8, 255)
    assert "num_warps=8, maxnreg=255)" in source and "num_stages=3" in source
    assert all(len(line) <= 120 for line in source.splitlines())


@needs_triton
def test_the_interpreter_gives_what_the_simulator_and_the_reference_give():
    file = SUPPORT / "triton_interpreted.py"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=short", file],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:]


@needs_triton
@pytest.mark.parametrize("cases", [["--first-cases"], pytest.param([], marks=pytest.mark.long)], ids=["first", "all"])
def test_kernels_that_are_simulated_are_the_same_in_triton(cases):
    files = sorted((TESTS / "targets/accelerator/kernels").glob("test_*.py"))
    paths = [str(SUPPORT), *sys.path]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "triton_beside_simulator", "--tb=short", *cases, *map(str, files)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:]


# --- compiled ------------------------------------------------------------------------------------------------------

UNIT = {
    "sm_80": "mma", "sm_89": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "sm_103": "tcgen05", "sm_120": "mma", "sm_121": "mma",
    "gfx942": "mfma", "gfx950": "mfma", "gfx1151": "wmma",
}  # fmt: skip


def large(fmt: str, arch: str):
    """Return a program with a prefill-sized tile for an architecture."""
    depth = 64 if fmt == "bf16" else 128
    rows = 128 if UNIT[arch] == "tcgen05" or (arch == "sm_90" and fmt == "bf16") else 64
    if UNIT[arch] == "wmma":  # wavefronts of 32 threads: half of the registers for as many warps
        return grouped_up(experts(fmt), Tile(64, 32, 32, 2), LAYOUT)
    return grouped_up(experts(fmt), Tile(rows, 64, depth, 2), TENSOR if UNIT[arch] == "tcgen05" else LAYOUT)


@pytest.fixture(scope="module")
def compiled():
    """Compile what the tests look at, in two processes: {(format, arch, size): (program, what became of it)}."""
    programs = {("bf16", arch, "large"): large("bf16", arch) for arch in ARCHITECTURES}
    programs |= {(fmt, "sm_90", "large"): large(fmt, "sm_90") for fmt in ("int4_g128", "fp8_b128")}
    programs["int4_g128", "sm_100", "large"] = large("int4_g128", "sm_100")
    small = grouped_down(experts("int4_g128"), Tile(16, 64, 128, 3), LAYOUT)
    programs |= {("int4_g128", arch, "small"): small for arch in ("sm_120", "gfx950")}
    made = compile_all([compile_request_of(p, arch, 4) for (_, arch, _), p in programs.items()], 2)
    return {key: (p, result) for (key, p), result in zip(programs.items(), made, strict=True)}


@needs_triton
def test_kernels_compile_for_every_chip_without_spills(compiled):
    for key, (_, result) in compiled.items():
        assert not isinstance(result, MoecError), (key, str(result))
        assert result.spills == 0, key
        assert result.object[:4] == b"\x7fELF" and result.suffix == (".hsaco" if key[1].startswith("gfx") else ".cubin")


@needs_triton
def test_large_tiles_use_the_matrix_unit_that_is_made_for_them(compiled):
    for key, (program, result) in compiled.items():
        assert result.uses == predict_units(program, key[1], 4), key
        if key[2] == "large":
            assert result.uses == {UNIT[key[1]]}, key
    assert compiled["bf16", "sm_100", "large"][1].tensor_memory == 128  # columns: two sums of 64


@needs_triton
def test_shared_memory_is_what_was_predicted(compiled):
    for key, (program, result) in compiled.items():
        assert predict_shared(program, key[1], 4) == pytest.approx(result.shared, rel=0.25), key


@needs_triton
def test_sums_that_are_stored_pass_through_the_bytes_that_were_predicted():
    tiles = (Tile(256, 64, 32, 2, 8), Tile(16, 256, 64, 2, 2), Tile(64, 128, 32, 1, 4), Tile(128, 32, 64, 2, 8))
    cases = [(a, out, t) for a in ("sm_89", "sm_90", "sm_121") for out in ("f32", "bf16") for t in tiles]
    programs = [linear_kernel(Linear(512, 1024, Packing("bf16", 512, 1024), out=out), t, LAYOUT) for _, out, t in cases]
    jobs = [compile_request_of(p, arch, t.warps) for p, (arch, _, t) in zip(programs, cases, strict=True)]
    found = {}
    for case, program, result in zip(cases, programs, compile_all(jobs, 2), strict=True):
        assert not isinstance(result, MoecError), (case, str(result))
        assert predict_shared(program, case[0], case[2].warps) == result.shared, case
        found[case] = result.shared
    exact = linear_kernel(
        Linear(512, 1024, Packing("f32", 512, 1024), dtype="f32", out="f32"), Tile(16, 64, 32, 1, 4), LAYOUT
    )
    assert (
        predict_shared(exact, "sm_90", 4)
        == compile_request(compile_request_of(exact, "sm_90", 4)).shared
        == (16 + 64) * 32 * 4
    )
    # these sums, and not the loop's operands, are what the block needs the memory for
    assert found["sm_121", "f32", tiles[0]] > found["sm_121", "bf16", tiles[0]] == (256 + 64) * 32 * 2


@needs_triton
def test_rows_that_are_stored_as_codes_too_pass_through_the_bytes_that_were_predicted():
    cases = [("gfx942", "fp8_g128", RowTile(2, 4096)), ("gfx942", "", RowTile(4, 4096, 8)),
             ("gfx950", "mxfp8", RowTile(1, 4096, 1)), ("sm_90", "fp8_g128", RowTile(1, 8192, 8)), ("sm_90", "", RowTile(1, 4096))]  # fmt: skip
    programs = [norm_kernel(Norm(t.n, 1e-6, rounded=form), t, LAYOUT) for _, form, t in cases]
    jobs = [compile_request_of(p, arch, t.warps) for p, (arch, _, t) in zip(programs, cases, strict=True)]
    for case, program, result in zip(cases, programs, compile_all(jobs, 2), strict=True):
        assert predict_shared(program, case[0], case[2].warps) == result.shared > 0, case


def test_the_units_of_tiles():
    assert [matrix_unit("sm_90", m, 64, "bf16", w) for m, w in ((64, 4), (64, 2), (32, 4))] == ["wgmma", "mma", "mma"]
    assert [matrix_unit("sm_100", m, 64, "bf16", 4) for m in (128, 64, 32)] == ["tcgen05", "tcgen05", "mma"]
    assert matrix_unit("sm_90", 128, 64, "f32", 4) == "fma" and matrix_unit("gfx950", 16, 16, "bf16", 4) == "mfma"


def test_sums_that_do_not_fit_the_registers_are_said_to_spill():
    e = experts("bf16")
    assert predict_spills(grouped_up(e, Tile(128, 128, 64), LAYOUT), "sm_90", 4)
    assert not predict_spills(grouped_up(e, Tile(128, 128, 64), LAYOUT), "sm_90", 8)
    assert predict_spills(grouped_up(experts("fp8_b128"), Tile(128, 64, 128), LAYOUT), "sm_90", 4)


@needs_triton
def test_the_kernels_without_products_compile_and_objects_reproduce():
    e = experts("bf16")
    for program in (sort_kernel(e, LAYOUT), combine_kernel(e, 512, LAYOUT)):
        first = compile_request(compile_request_of(program, "sm_90", 4))
        assert not first.uses and not first.spills
        compile_request.cache_clear()
        again = compile_request(compile_request_of(program, "sm_90", 4))
        assert again is not first and again.object == first.object
        assert compile_request(compile_request_of(program, "sm_90", 4)) is again


@needs_triton
def test_one_kernel_that_fails_fails_alone():
    program = combine_kernel(experts("bf16"), 512, LAYOUT)
    good, bad = compile_request_of(program, "sm_90", 4), compile_request_of(program, "sm_90", 3)
    dies = compile_request_of(program, "sm_90", 4, "import os\nos._exit(3)\n")
    results = compile_all([good, bad, dies, good], 2)
    assert results[0] is results[3] and results[0].name == "combine"
    assert "does not compile combine for sm_90" in str(results[1]) and "died over combine" in str(results[2])
    with pytest.raises(MoecError, match="no kernels are compiled for sm_10"):
        compile_request_of(program, "sm_10", 4)


def test_without_triton_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    program = combine_kernel(experts("bf16"), 512, LAYOUT)
    assert "def combine(" in triton_source(program)
    compile_request.cache_clear()
    with pytest.raises(MoecError) as error:
        compile_request(compile_request_of(program, "sm_90", 4))
    assert "pip install 'moec[kernels]'" in error.value.todo


@needs_triton
def test_a_launch_without_a_gpu_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    kernel = GpuKernel(combine_kernel(experts("bf16"), 512, LAYOUT))
    tensors = {"rows": torch.zeros(2, 512, dtype=torch.bfloat16), "y": torch.zeros(1, 512, dtype=torch.bfloat16)}
    with pytest.raises(MoecError, match="kernels run on a GPU, not on cpu"):
        kernel(tensors, {"T": 1})
    with pytest.raises(MoecError, match=r"rows is bf16\[2, 512\]"):
        kernel(tensors | {"rows": torch.zeros(3, 512, dtype=torch.bfloat16)}, {"T": 1})
