"""Small tile programs of every kernel kind, with what they read, for the tests of Ascend."""

import numpy as np
import torch
from chips_for_tests import named, weight
from moec.compiler.ir.activation import Activation
from moec.compiler.ops import OPS
from moec.targets import declare_kernel_ops
from moec.targets.accelerator.kernels.choices import Tile
from moec.targets.accelerator.kernels.dense import Linear, linear_kernel, linear_sum
from moec.targets.accelerator.kernels.experts import Experts, combine_kernel, grouped_down, grouped_up, sort_kernel
from moec.targets.accelerator.tile.packing import Packing

EXPERTS, CHOSEN, TOKENS = 6, 2, 5
FORMATS = ("bf16", "int4_g128", "uint4_g32", "int8_g64", "mxfp4", "fp8_b128")


def routed(form, layout, sizes=(100, 40), direct=False):
    """Yield (label, program, tensors) of routed experts with weights in a format; bf16 lies in fractals."""
    hidden, inner = sizes
    rng = np.random.default_rng(1)
    up = Packing(form, 2 * inner, hidden, EXPERTS, fractal=form == "bf16")
    down = Packing(form, hidden, inner, EXPERTS, fractal=form == "bf16")
    act = Activation(limit=7.0, layout="interleaved" if form == "mxfp4" else "concat")
    e = Experts(EXPERTS, CHOSEN, hidden, inner, up, down, up_bias=True, act=act)
    tile = Tile(16, 32, max(up.step, 32))
    ids = np.stack([rng.permutation(EXPERTS - 1)[:CHOSEN] for _ in range(TOKENS)]).astype(np.int32)  # one has no token
    pairs = ids.reshape(-1)
    order = np.argsort(pairs, kind="stable").astype(np.int32)
    declare_kernel_ops()
    _, tiles = OPS["acc.sort"].reference(torch.tensor(ids).long(), experts=EXPERTS)
    where = {"ids": pairs} if direct else {"order": order, "tiles": tiles.numpy().astype(np.int32)}
    up_parts, _ = weight(up, rng)
    down_parts, _ = weight(down, rng)
    given = {"x": rng.standard_normal((TOKENS, hidden)), "up_bias": rng.standard_normal((EXPERTS, 2 * inner))}
    label = f"{form}{' direct' if direct else ''}"
    yield f"up {label}", grouped_up(e, tile, layout, direct), {**given, **where, **named(up_parts, "up")}
    given = {"h": rng.standard_normal((TOKENS * CHOSEN, inner)), "gates": rng.random(TOKENS * CHOSEN), **where}
    yield f"down {label}", grouped_down(e, tile, layout, direct), {**given, **named(down_parts, "down")}
    if not direct and form == "bf16":
        yield "sort", sort_kernel(e, layout), {"ids": pairs}
        rows = rng.standard_normal((TOKENS * CHOSEN, hidden))
        yield "combine", combine_kernel(e, 64, layout, 2), {"rows": rows}


def dense(form, layout):
    """Yield (label, program, tensors) of dense layers with a weight in a format."""
    rng = np.random.default_rng(2)
    rows, depth, tile = 40, 136, Tile(16, 16, 128)
    packing = Packing(form, rows, depth, fractal=form == "bf16")
    parts, _ = weight(packing, rng)
    x = torch.tensor(rng.standard_normal((TOKENS, depth)), dtype=torch.bfloat16)
    p = Linear(rows, depth, packing, bias=True, act=Activation("gelu", gated=False))
    end = {"bias": rng.standard_normal(rows)}
    yield f"linear {form}", linear_kernel(p, tile, layout), {"x": x, **named(parts, "w"), **end}
    yield f"linear {form} in parts", linear_kernel(p, tile, layout, 2), {"x": x, **named(parts, "w")}
    if form == "bf16":
        yield "linear_sum", linear_sum(p, Tile(4, 32, 0), layout, 2), {"parts": rng.random((2, TOKENS, rows)), **end}


def programs(layout, forms=FORMATS):
    """Yield (label, program, tensors) of everything."""
    for form in forms:
        yield from routed(form, layout)
        yield from routed(form, layout, direct=True)
        yield from dense(form, layout)
