"""Products of MX codes on an Ascend 950: the cube takes the codes; triton-ascend, which has no such product, widened ones."""

from dataclasses import replace

import numpy as np
import pytest
from chips_for_tests import CHIPS, cast, named, run
from moec.compiler.ir.activation import SILU
from moec.targets.accelerator.ascend.lower import kernel_of
from moec.targets.accelerator.ascend.program import for_ascend
from moec.targets.accelerator.kernels.choices import RowTile, Tile
from moec.targets.accelerator.kernels.dense import Linear, linear_kernel
from moec.targets.accelerator.kernels.low_precision import Quantize, quantize_kernel
from moec.targets.accelerator.kernels.norm import Norm, norm_kernel
from moec.targets.accelerator.tile.packing import Packing
from moec.targets.accelerator.tile.tiles import Dot, walk_statements

TOKENS = 5


def programs(form):
    """Yield the kernels that make and multiply codes of a format, with what they read."""
    layout, chip = CHIPS["ascend-950"]
    rng = np.random.default_rng(3)
    x = cast(rng.standard_normal((TOKENS, 256)), "bf16")
    rounding = quantize_kernel(Quantize(256, form), RowTile(2, 128), layout)
    yield rounding, {"x": x}
    yield norm_kernel(Norm(256, 1e-6, rounded=form), RowTile(2, 128), layout), {"x": x, "w": rng.random(256)}
    packing = Packing(form, 80, 256, pairs=form == "mxfp4")
    numbers = rng.integers(0, 16, (80, 256)).astype(np.uint8)
    numbers = numbers if packing.pairs else cast(rng.standard_normal((80, 256)), "f8e4m3")
    parts = packing.pack(codes=numbers, scales=rng.integers(118, 126, (80, 8)).astype(np.uint8))
    codes = run(rounding, chip, {"T": TOKENS}, x=x)
    given = {f"x{name[1:]}": value for name, value in codes.items()} | named(parts, "w")
    p = Linear(40, 256, packing, act=SILU, dtype=form, out=form)
    yield linear_kernel(p, Tile(16, 32, 128), layout), given


def dots(program):
    return [s for s in walk_statements(program.body) if isinstance(s, Dot)]


@pytest.mark.parametrize("form", ["mxfp8", "mxfp4"])
def test_codes_are_widened_without_changing_a_number(form):
    _, chip = CHIPS["ascend-950"]
    roomy = replace(chip, capacity=dict.fromkeys(chip.capacity, 1 << 30))
    for program, given in programs(form):
        wanted = run(program, chip, {"T": TOKENS}, **given)
        rewritten = for_ascend(program, True)
        taken = {a.name: a.dtype for a in rewritten.arguments}
        given = {n: v.view(np.uint8) if taken[n] == "u8" and v.itemsize == 1 else v for n, v in given.items()}
        found = run(rewritten, roomy, {"T": TOKENS}, **given)
        for name, value in wanted.items():
            assert np.array_equal(found[name].view(np.uint8), value.view(np.uint8)), f"{program.name}: {name}"
        assert {d.scales for d in dots(program)} <= {("a_scale_l0a", f"w_{n}_scale_l0b") for n in ("gate", "value")}
        assert not any(d.scales for d in dots(rewritten)) and len(dots(rewritten)) == len(dots(program))
        compile(kernel_of(program, "Ascend950DT_9582").source, program.name, "exec")
