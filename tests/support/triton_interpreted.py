"""Printed kernels under Triton's interpreter: equal to the simulator and to the reference op.

Not collected by itself: test_source.py of tests/targets/accelerator/triton runs it with the interpreter on, which
must be so before triton is imported.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
import torch
from moec.compiler.ir.activation import Activation
from moec.compiler.ir.dtypes import DTYPES, dtype_name
from moec.compiler.ops.moe import experts as reference
from moec.targets.accelerator.kernels.choices import Tile
from moec.targets.accelerator.kernels.experts import Experts, combine_kernel, grouped_down, grouped_up, sort_kernel
from moec.targets.accelerator.run.interpreter import mend_interpreter
from moec.targets.accelerator.run.launch import GpuKernel
from moec.targets.accelerator.tile.builder import Builder, Layout
from moec.targets.accelerator.tile.expr import evaluate_expr
from moec.targets.accelerator.tile.packing import Packing
from moec.targets.accelerator.tile.simulate import Chip, simulate_program
from tile_weights import random_weight

mend_interpreter()
LAYOUT = Layout(("shared",), ("shared",), "registers", "registers")
PATHS = {("device", "shared"), ("device", "registers"), ("registers", "device"), ("registers", "shared")}
CHIP = Chip({"shared": 232448, "registers": 1 << 20}, {}, frozenset(PATHS), LAYOUT.operands)
FORMATS = ("bf16", "int4_g128", "uint4_g32", "int8_g64", "fp8_b128", "mxfp4", "nvfp4")


def to_torch(array: np.ndarray) -> torch.Tensor:
    """Return an array of any dtype of the tile language as a tensor of its own."""
    raw = torch.from_numpy(array.reshape(-1).view(np.uint8).copy()) if array.size else torch.empty(0, dtype=torch.uint8)
    return raw.view(DTYPES[dtype_name(array.dtype)].torch).reshape(array.shape)


def plain(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().numpy()


@dataclass(frozen=True)
class Layer:
    """The kernels of one layer of routed experts, in the order in which they run; without `sort` each pair is a tile."""

    up: GpuKernel
    down: GpuKernel
    combine: GpuKernel
    sort: GpuKernel | None = None

    @property
    def kernels(self) -> tuple[GpuKernel, ...]:
        """The kernels that there are."""
        return tuple(k for k in (self.sort, self.up, self.down, self.combine) if k is not None)

    def buffers(
        self, x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor, weights: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return every tensor of the kernels by name, new ones for what they write.

        x [T, D], ids [T, K] and gates [T, K]; `weights` holds the parts of both weights (up_codes, down ...).
        """
        tensors = {"x": x, "ids": ids.int().flatten(), "gates": gates.float().flatten(), **weights}
        for kernel in self.kernels:
            for a in kernel.program.arguments:
                if a.name not in tensors:
                    shape = [int(evaluate_expr(n, {"T": x.shape[0]})) for n in a.shape]
                    tensors[a.name] = torch.zeros(shape, dtype=DTYPES[a.dtype].torch, device=x.device)
        return tensors

    def run(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Run the kernels and return y [T, D]."""
        scalars = {"T": tensors["x"].shape[0]}
        for kernel in self.kernels:
            kernel(tensors, scalars)
        return tensors["y"]


def kernels(e: Experts, tile: Tile, direct: bool) -> Layer:
    down = GpuKernel(grouped_down(e, tile, LAYOUT, direct))
    last = GpuKernel(combine_kernel(e, 64, LAYOUT, 2))
    first = None if direct else GpuKernel(sort_kernel(e, LAYOUT))
    return Layer(GpuKernel(grouped_up(e, tile, LAYOUT, direct)), down, last, first)


def check(e: Experts, tile: Tile, tokens: int, *, direct=False, one_expert=False, seed=0) -> None:
    """Run all kernels of a layer both ways; the outputs of each kernel must agree, and y with moe.experts."""
    generator = np.random.default_rng(seed)
    parts, weights = {}, []
    for name, packing in (("up", e.up), ("down", e.down)):
        found, numbers = random_weight(packing, generator)
        parts |= {f"{name}_{part}" if part else name: array for part, array in found.items()}
        weights.append(torch.from_numpy(numbers.copy()))
    x = torch.from_numpy(generator.standard_normal((tokens, e.hidden), np.float32)).bfloat16()
    ids = [range(e.chosen) if one_expert else generator.choice(e.experts - 1, e.chosen, False) for _ in range(tokens)]
    ids = torch.tensor(np.array([list(i) for i in ids]))  # the last expert never has a token
    gates = torch.from_numpy(generator.random((tokens, e.chosen), np.float32))
    for name, packing in (("up_bias", e.up), ("down_bias", e.down)):
        if getattr(e, name):
            parts[name] = generator.standard_normal((e.experts, packing.rows), np.float32)
    layer = kernels(e, tile, direct)
    tensors = layer.buffers(x, ids, gates, {name: to_torch(array) for name, array in parts.items()})
    simulated = {n: parts.get(n, np.zeros(0)) for n in tensors}
    for name, tensor in tensors.items():
        if name not in parts:
            raw = tensor.contiguous().view(torch.uint8).numpy().copy() if tensor.numel() else np.zeros(0, np.uint8)
            dtype = dtype_name(tensor.dtype)
            simulated[name] = raw.reshape(-1).view(DTYPES[dtype].numpy).reshape(tensor.shape)
    y = layer.run(tensors)
    for kernel in layer.kernels:
        simulate_program(
            kernel.program, {a.name: simulated[a.name] for a in kernel.program.arguments}, {"T": tokens}, CHIP
        )
        for a in kernel.program.arguments:
            if a.role == "output":
                close(plain(tensors[a.name]), simulated[a.name].astype(np.float32), 1e-2 if a.dtype == "bf16" else 5e-3)
    biases = [torch.from_numpy(parts[n]) if n in parts else None for n in ("up_bias", "down_bias")]
    close(plain(y), reference(x.float(), ids, gates, *weights, *biases, act=e.act).numpy(), 2e-2)


def close(found: np.ndarray, wanted: np.ndarray, tolerance: float) -> None:
    """Compare to a share of the largest number."""
    assert found.shape == wanted.shape
    if wanted.size:
        np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * max(float(np.abs(wanted).max()), 1e-9))


def layer_of(fmt: str, hidden=160, inner=40, experts=5, chosen=2, **more) -> Experts:
    """Return experts of sizes that are no multiples of a tile."""
    rows = inner * (2 if more.get("act", Activation()).gated else 1)
    return Experts(
        experts,
        chosen,
        hidden,
        inner,
        Packing(fmt, rows, hidden, experts),
        Packing(fmt, hidden, inner, experts),
        **more,
    )


@pytest.mark.parametrize(("fmt", "tokens"), [*((fmt, 7) for fmt in FORMATS), ("bf16", 1), ("mxfp4", 1)])
def test_a_layer_equals_the_simulator_and_the_reference(fmt, tokens):
    check(layer_of(fmt), Tile(16, 32, 128, 2), tokens)


@pytest.mark.parametrize("fmt", ("bf16", "int4_g128", "fp8_b128", "mxfp4"))
def test_all_tokens_on_one_expert(fmt):
    check(layer_of(fmt, chosen=1), Tile(16, 32, 128, 1), 19, one_expert=True)


@pytest.mark.parametrize("fmt", ("bf16", "nvfp4"))
def test_each_pair_a_tile(fmt):
    check(layer_of(fmt), Tile(16, 32, 128, 2), 3, direct=True)


@pytest.mark.parametrize(
    "more",
    (
        {"act": Activation("silu", True, "interleaved", 1.702, 1.0, 7.0), "up_bias": True, "down_bias": True},
        {"act": Activation("gelu")},
        {"act": Activation("gelu_tanh")},
        {"act": Activation("relu2", gated=False)},
        {"act": Activation(limit=0.5, clamp_after=True)},
        {"chosen": 3, "experts": 6},
    ),
)
def test_activations_biases_and_other_numbers_of_choices(more):
    check(layer_of("bf16", **more), Tile(32, 32, 64, 2), 5)


EXPRESSIONS = (  # over i i32, j i32, f f32, g f32 (some equal, some NaN-free extremes), u u8, c i8, h bf16, all [32], and T
    ("i32", "i // 6"), ("i32", "i % 6"), ("i32", "i // 8"), ("i32", "i % 8"), ("i32", "cdiv(i, 5)"), ("i32", "cdiv(i, 16)"),
    ("i32", "-(i // 7) % 3"), ("i32", "(i - j) * T"), ("i32", "arange(32) // 5 + T % 3"), ("i32", "i >> 3 | (i & 5) << 4"),
    ("i32", "~i ^ j"), ("i32", "cumsum(f > g, 0)"), ("i32", "cumsum(i, 0)"), ("i32", "where(f > g, i, 0 - j)"),
    ("i32", "minimum(i, 3) + maximum(j, T)"), ("i32", "abs(i)"), ("i32", "i + u + c"), ("i32", "i + (f > g)"),
    ("i32", "arange(32) + argmax(f, 0)"), ("i32", "arange(32) + argmax(where(i > 0, 1.0 + 0 * f, 0 * f), 0)"),
    ("i32", "arange(32) + sum(f > 0.0, 0) * 2"), ("i32", "arange(32) + max(i, 0) - min(j, 0)"), ("i32", 'cast(f * 10.0, "i32")'),
    ("i64", 'cast(i, "i64") * 4000000000'), ("u8", "u * u + 3"), ("u8", "u << 4"), ("u8", "(u >> 4) + (u & 15)"), ("u8", 'cast(i, "u8")'),
    ("i8", "c + c"), ("i8", "c >> 2"), ("f32", 'cast(u, "f32") - 8.0'), ("f32", 'cast(c, "f32") * f'), ("f32", "f * u + g"),
    ("f32", "f / g"), ("f32", "exp(-abs(f)) + log(abs(g) + 0.5)"), ("f32", "exp2(-abs(f)) - exp2(g * 4.0)"), ("f32", "sqrt(abs(f)) + rsqrt(abs(g) + 1.0)"), ("f32", "sigmoid(f)"),
    ("f32", "tanh(f)"), ("f32", "erf(f)"), ("f32", "minimum(f, g) - maximum(f, 0.25)"), ("f32", "f * T"), ("f32", "h + f"), ("f32", "f * 0.1"),
    ("f32", 'bitcast(bitcast(f, "i32") ^ 1 << 20, "f32")'), ("f32", "where(f > g, f, -inf)"), ("f32", "cumsum(f, 0)"),
    ("f32", 'cast(cast(f, "f8e4m3"), "f32")'), ("f32", 'cast(cast(f, "f8e5m2"), "f32")'), ("f32", 'cast(bitcast(u & 119, "f8e4m3"), "f32")'),
    ("bf16", "h * h + h"), ("bf16", "h * 0.1"), ("bf16", 'cast(f, "bf16")'), ("bf16", "-h"), ("bf16", "maximum(h, 0.5)"),
    ("bf16", "exp(h)"), ("bf16", "where(f > g, h, h * 2)"), ("bool", "(f > g) & ~(h < f) | (u == 3)"),
    ("bool", 'cast(i, "bool")'), ("f32", "reshape(trans(reshape(f, 4, 8)), 32)"), ("f32", "reshape(reshape(f, 4, 8) * max(reshape(g, 4, 8), 1)[:, None], 32)"),
    ("f32", "reshape(reshape(f, 2, 4, 4) + sum(reshape(g, 2, 4, 4), 2)[:, :, None], 32)"), ("f32", 'full(32, T, "f32") + f'),
)  # fmt: skip


@pytest.mark.parametrize(("dtype", "text"), EXPRESSIONS)
def test_an_expression_means_the_same_in_numpy_and_in_triton(dtype, text):
    generator = np.random.default_rng(7)
    given = {
        "i": generator.integers(-40, 40, 32, np.int32), "j": generator.integers(-9, 9, 32, np.int32),
        "f": (generator.standard_normal(32) * 3).round(1).astype(np.float32),
        "g": (generator.standard_normal(32) * 3).round(1).astype(np.float32) + np.float32(0.03),
        "u": generator.integers(0, 256, 32, np.uint8), "c": generator.integers(-128, 128, 32, np.int8),
        "h": generator.standard_normal(32).astype(ml_dtypes.bfloat16),
    }  # fmt: skip
    b = Builder("expression", LAYOUT)
    b.scalar("T")
    b.grid("point", 1)
    for name, array in given.items():
        b.tensor(name, dtype_name(array.dtype), 32)
    b.tensor("out", dtype, 32, role="output")
    for name in given:
        b.load(name, name, ["arange(32)"])
    b.let("value", text)
    b.store("out", ["arange(32)"], "value")
    program = b.program()
    given["out"] = np.zeros(32, DTYPES[dtype].numpy)
    tensors = {name: to_torch(array) for name, array in given.items()}
    GpuKernel(program)(tensors, {"T": 13})
    simulate_program(program, given, {"T": 13}, CHIP)
    found, wanted = tensors["out"], given["out"]
    if dtype in ("f32", "bf16"):
        np.testing.assert_allclose(plain(found), wanted.astype(np.float32), rtol=3e-6, atol=3e-6)
    else:
        np.testing.assert_array_equal(found.numpy(), wanted)
