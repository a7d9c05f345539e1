"""Kernels of dense layers, simulated on a chip of every family, equal the reference ops."""

import numpy as np
import pytest
import torch
from chips_for_tests import CHIPS, bf16, close, named, run, weight
from moec.compiler.errors import MoecError
from moec.compiler.ir.activation import Activation
from moec.compiler.ir.fragments import parse_activation
from moec.compiler.ops.compressed import block_linear
from moec.compiler.ops.mlp import gated_mlp as gated_mlp_op
from moec.targets.accelerator.kernels.choices import Tile
from moec.targets.accelerator.kernels.dense import Linear, linear_kernel, linear_sum
from moec.targets.accelerator.tile.packing import Packing

FORMATS = ("bf16", "f32", "int4_g128", "uint4_g32", "int8_g64", "mxfp4", "fp8_b128")
chips = pytest.mark.parametrize("name", CHIPS)


def tokens(rng, *shape):
    return torch.tensor(rng.standard_normal(shape), dtype=torch.float32)


@chips
@pytest.mark.parametrize("form", FORMATS)
def test_linear_in_every_format(name, form):
    layout, chip = CHIPS[name]
    rng = np.random.default_rng(1)
    for rows, depth, count, dtype, out in ((40, 72, 1, "bf16", "bf16"), (33, 256, 19, "f32", "f32")):
        packing = Packing(form, rows, depth, fractal=name.startswith("ascend") and form == "bf16")
        parts, w = weight(packing, rng)
        x = bf16(tokens(rng, count, depth))
        t = Tile(16, 32, max(packing.step, 32))
        y = run(linear_kernel(Linear(rows, depth, packing, dtype=dtype, out=out), t, layout), chip, {"T": count}, x=x,
                **named(parts, "w"))["y"]  # fmt: skip
        close(y, x @ (w if form == "f32" else bf16(w)).T, 5e-3 if out == "bf16" else 1e-5)


@chips
def test_linear_with_bias_and_activation_cut_along_its_depth(name):
    layout, chip = CHIPS[name]
    rng = np.random.default_rng(2)
    p = Linear(24, 100, Packing("bf16", 24, 100), bias=True, act=Activation("gelu", gated=False), out="f32")
    parts, w = weight(p.weight, rng)
    x, bias = bf16(tokens(rng, 5, 100)), tokens(rng, 24)
    wanted = torch.nn.functional.gelu(x @ w.T + bias)
    whole = run(linear_kernel(p, Tile(16, 16, 16), layout), chip, {"T": 5}, x=x, bias=bias, **named(parts, "w"))["y"]
    close(whole, wanted)
    for split in (2, 3, 9):  # the last one leaves parts without a step
        sums = run(linear_kernel(p, Tile(16, 16, 16), layout, split), chip, {"T": 5}, x=x, **named(parts, "w"))["parts"]
        y = run(linear_sum(p, Tile(4, 32, 0), layout, split), chip, {"T": 5}, parts=sums, bias=bias)["y"]
        close(y, wanted)


@pytest.mark.parametrize("name", ["hopper", "amd"])
@pytest.mark.parametrize(("blocks", "split"), [(1, 1), (2, 1), (1, 3)])
def test_a_weight_as_the_first_operand(name, blocks, split):
    layout, chip = CHIPS[name]
    rng = np.random.default_rng(8)
    packing = Packing("bf16", blocks * 80, 96)
    parts, w = weight(packing, rng)
    x, bias = bf16(tokens(rng, 21, blocks, 96)), tokens(rng, blocks * 80)
    p = Linear(80, 96, packing, blocks, bias=split == 1, out="f32")
    end = {"bias": bias} if split == 1 else {}
    program = linear_kernel(p, Tile(16, 64, 32, swapped=True), layout, split)
    found = run(program, chip, {"T": 21}, x=x, **named(parts, "w"), **end)
    wanted = block_linear(x[None], bf16(w))[0] + (bias if split == 1 else 0)
    close(found["y"] if split == 1 else found["parts"].sum(0), wanted)
    assert {b.shape for n, b in program.buffers.items() if n == "gate"} == {(64, 16)}


@chips
def test_tiles_of_rows_side_by_side(name):
    """The order of the grid changes no number, nor do tiles of the last group that do not exist."""
    layout, chip = CHIPS[name]
    rng = np.random.default_rng(6)
    for blocks in (1, 2):
        packing = Packing("bf16", blocks * 40, 32)
        parts, w = weight(packing, rng)
        x = bf16(tokens(rng, 70, blocks, 32))
        p = Linear(40, 32, packing, blocks, out="f32")
        program = linear_kernel(p, Tile(16, 16, 32, group=4), layout)
        y = run(program, chip, {"T": 70}, x=x, **named(parts, "w"))["y"]
        close(y, block_linear(x[None], bf16(w))[0])


@chips
@pytest.mark.parametrize("form", ["bf16", "fp8_b128"])
def test_blocks(name, form):
    layout, chip = CHIPS[name]
    rng = np.random.default_rng(3)
    blocks, rows, depth = 3, 128, 40
    x = bf16(tokens(rng, 7, blocks, depth))
    for packing in (Packing(form, blocks * rows, depth), Packing(form, rows, depth, blocks)):
        parts, w = weight(packing, rng)
        p = Linear(rows, depth, packing, blocks, out="f32")
        y = run(linear_kernel(p, Tile(16, 64, 128), layout), chip, {"T": 7}, x=x, **named(parts, "w"))["y"]
        close(y, block_linear(x[None], bf16(w).reshape(-1, depth))[0])


@chips
@pytest.mark.parametrize("form", ["layout=interleaved, alpha=1.7, beta=1.0", "alpha=1.7", "clamp_after=true"])
def test_gated_mlp(name, form):
    act = parse_activation(f"gated(silu, limit=0.7, {form})")
    layout, chip = CHIPS[name]
    rng = np.random.default_rng(4)
    for count in (1, 18):
        up_packing, down_packing = Packing("bf16", 80, 48), Packing("bf16", 48, 40)
        first = Linear(40, 48, up_packing, bias=True, act=act)
        second = Linear(48, 40, down_packing, bias=True)
        up_parts, up = weight(up_packing, rng, 1.0)
        down_parts, down = weight(down_packing, rng)
        x, up_bias, down_bias = bf16(tokens(rng, count, 48)), tokens(rng, 80), tokens(rng, 48)
        scalars = {"T": count}
        h = run(
            linear_kernel(first, Tile(16, 16, 32), layout), chip, scalars, x=x, bias=up_bias, **named(up_parts, "w")
        )["y"]
        down_program = linear_kernel(second, Tile(16, 32, 16), layout)
        y = run(down_program, chip, scalars, x=h, bias=down_bias, **named(down_parts, "w"))["y"]
        wanted = gated_mlp_op(x, up, down, up_bias, down_bias, None, act=act)
        close(y, wanted, 1e-2)


def test_a_gated_linear_is_not_cut():
    p = Linear(8, 32, Packing("bf16", 16, 32), act=Activation())
    with pytest.raises(MoecError, match="not cut along its depth"):
        linear_kernel(p, Tile(16, 16, 16), CHIPS["hopper"][0], 2)


@pytest.mark.parametrize("stacked", [False, True])
def test_blocks_with_gates_and_biases(stacked):
    layout, chip = CHIPS["ascend-950"]
    rng = np.random.default_rng(5)
    blocks, rows, depth = 2, 24, 32
    packing = Packing("bf16", 2 * rows, depth, blocks) if stacked else Packing("bf16", blocks * 2 * rows, depth)
    parts, w = weight(packing, rng)
    x, bias = bf16(tokens(rng, 3, blocks, depth)), tokens(rng, blocks * 2 * rows)
    p = Linear(rows, depth, packing, blocks, bias=True, act=Activation(), out="f32")
    y = run(linear_kernel(p, Tile(16, 16, 16), layout), chip, {"T": 3}, x=x, bias=bias, **named(parts, "w"))["y"]
    each = w.reshape(blocks, 2 * rows, depth)
    h = torch.einsum("tgk,gnk->tgn", x, each) + bias.reshape(blocks, 2 * rows)
    close(y, (torch.nn.functional.silu(h[..., :rows]) * h[..., rows:]).flatten(1))
