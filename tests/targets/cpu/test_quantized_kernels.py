"""The ops on quantized weights, run by ONNX Runtime and compared with their torch references."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moec.compiler.formats.table import format_of
from moec.compiler.ir.activation import Activation
from moec.compiler.ir.dims import dim
from moec.compiler.ir.types import TensorType
from moec.targets.cpu.probe.cases import random_quantized_parts, run_reference, write_program
from moec.targets.cpu.probe.probe import INT8_MOST
from onnx_session import open_session

T = dim("T")
FORMATS = [f"{sign}int{bits}_g{group}" for bits in (2, 4, 8) for group in (16, 32, 64, 128, 256) for sign in ("", "u")]
INTERLEAVED = Activation(layout="interleaved")
GPT_OSS = replace(INTERLEAVED, alpha=1.702, beta=1.0, limit=0.7)
EXACT = 1e-5  # f32 activations; sums of up to 2880 products


def f32(*sizes: Any) -> TensorType:
    return TensorType.of("f32", *sizes)


def runs_right(
    name: str, feeds: dict[str, torch.Tensor], weights: dict[str, Any], folder: Path, limit: float = EXACT, **attrs: Any
) -> None:
    """Check a program of one op against the reference, on all tokens, on the first one, and on a middle one."""
    types = {"float32": "f32", "int64": "i64", "uint8": "u8"}
    inputs = {n: TensorType.of(types[str(x.numpy().dtype)], T, *x.shape[1:]) for n, x in feeds.items()}
    write_program(name, inputs, weights, folder, **attrs)
    session = open_session(folder)
    (want,) = run_reference(name, feeds | weights, **attrs)
    scale = want.abs().max().item()
    tokens = want.shape[0]
    for part in (slice(0, tokens), slice(0, 1), slice(tokens // 2, tokens // 2 + 1)):
        (got,) = session.run(None, {n: x[part].numpy() for n, x in feeds.items()})
        assert got.shape == want[part].shape
        assert np.abs(got - want[part].numpy()).max() <= limit * scale


# --- linear, embedding -----------------------------------------------------------------------------------------


def linear(format: str, rows: int, width: int, biased: bool = False, tokens: int = 9) -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(4)
    weights = random_quantized_parts(format_of(format), rows, width, seed=5)
    if biased:
        weights["b"] = torch.randn(rows, generator=generator)
    return {"x": torch.randn(tokens, width, generator=generator)}, weights


@pytest.mark.parametrize("format", FORMATS)
def test_linear(format: str, tmp_path: Path) -> None:
    group = format_of(format).group
    feeds, weights = linear(format, rows=37, width=3 * group, biased=group == 32)
    runs_right("ort.matmul_nbits", feeds, weights, tmp_path, bits=format_of(format).bits, group=group)


@pytest.mark.parametrize(
    "format", ["int4_g16", "uint4_g32", "uint4_g128", "int8_g64", "uint8_g32", "uint2_g32", "int2_g64"]
)
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_linear_with_int8_activations(format: str, groups: int, tmp_path: Path) -> None:
    found = format_of(format)
    feeds, weights = linear(format, rows=48, width=groups * found.group, biased=groups == 2, tokens=40)
    runs_right("ort.matmul_nbits", feeds, weights, tmp_path, INT8_MOST, bits=found.bits, group=found.group, accuracy=4)


@pytest.mark.parametrize(
    ("format", "width"), [("uint4_g64", 2880), ("int4_g32", 96), ("uint8_g16", 2880), ("uint4_g32", 2880)]
)
def test_rows_that_are_no_power_of_two(format: str, width: int, tmp_path: Path) -> None:
    feeds, weights = linear(format, rows=40, width=width)
    runs_right("ort.matmul_nbits", feeds, weights, tmp_path, bits=format_of(format).bits, group=format_of(format).group)


@pytest.mark.parametrize(("format", "accuracy"), [("int4_g32", 0), ("uint4_g16", 4), ("int8_g64", 4), ("uint8_g32", 4)])
@pytest.mark.parametrize(("blocks", "rows"), [(1, 5), (3, 8), (5, 7)])
def test_linear_of_blocks(format: str, accuracy: int, blocks: int, rows: int, tmp_path: Path) -> None:
    found = format_of(format)
    width = 3 * found.group
    weights = random_quantized_parts(found, blocks * rows, width, seed=8)
    feeds = {"x": torch.randn(6, 2, blocks, width, generator=torch.Generator().manual_seed(9))}
    limit = INT8_MOST if accuracy else EXACT
    attrs = {"bits": found.bits, "group": found.group, "accuracy": accuracy}
    runs_right("ort.block_matmul_nbits", feeds, weights, tmp_path, limit, **attrs)


@pytest.mark.parametrize("format", FORMATS)
def test_embedding(format: str, tmp_path: Path) -> None:
    found = format_of(format)
    ids = torch.tensor([0, 28, 3, 3, 17])
    weights = random_quantized_parts(found, 29, 3 * found.group, seed=6)
    runs_right("ort.gather_nbits", {"ids": ids}, weights, tmp_path, 0.0, bits=found.bits, group=found.group)


def test_decoding_by_plain_ops(tmp_path: Path) -> None:
    found = format_of("mxfp4")
    feeds = dict(found.encode(torch.randn(7, 2, 96, generator=torch.Generator().manual_seed(1))))
    runs_right("ort.decode", feeds, {}, tmp_path, 0.0, format="mxfp4")


# --- routed experts --------------------------------------------------------------------------------------------


def parts(
    format: str, experts: int, width: int, inner: int, gated: bool = True, biased: bool = False
) -> dict[str, torch.Tensor | None]:
    found, generator = format_of(format), torch.Generator().manual_seed(7)
    rows = inner * (2 if gated else 1)
    up, down = (
        random_quantized_parts(found, experts, rows, width, seed=8),
        random_quantized_parts(found, experts, width, inner, seed=9),
    )
    weights = {f"up_{n}": t for n, t in up.items()} | {f"down_{n}": t for n, t in down.items()}
    if biased:
        weights["up_bias"] = torch.randn(experts, rows, generator=generator) * 0.3
        weights["down_bias"] = torch.randn(experts, width, generator=generator) * 0.3
    return weights


def scores(tokens: int, experts: int, width: int, mixing: bool, routing: str = "mixed") -> dict[str, torch.Tensor]:
    """Return inputs of QMoE; `idle` sends no token to the last expert, `one` sends all to the first ones."""
    generator = torch.Generator().manual_seed(10)
    choice = torch.randn(tokens, experts, generator=generator)
    if routing == "idle":
        choice[:, -1] = -9
    if routing == "one":
        choice = torch.arange(experts, 0, -1.0).expand(tokens, experts).contiguous()
    feeds = {"x": torch.randn(tokens, width, generator=generator), "choice": choice}
    return feeds | ({"mixing": torch.rand(tokens, experts, generator=generator)} if mixing else {})


@pytest.mark.parametrize("accuracy", [0, 4])
@pytest.mark.parametrize("format", ["int4_g16", "uint4_g32", "uint4_g64", "int4_g128", "uint4_g256", "uint8_g32", "int8_g128",
                                    "int2_g16", "uint2_g64"])  # fmt: skip
def test_qmoe_formats(format: str, accuracy: int, tmp_path: Path) -> None:
    found = format_of(format)
    weights = parts(format, 5, 2 * found.group, 3 * found.group, biased=True)
    exact = accuracy == 0 and (found.bits == 4 or found.group == 16)
    runs_right(
        "ort.qmoe", scores(9, 5, 2 * found.group, mixing=True), weights, tmp_path, EXACT if exact else INT8_MOST,
        k=2, bits=found.bits, group=found.group, accuracy=accuracy,
    )  # fmt: skip


@pytest.mark.parametrize(
    "act",
    [INTERLEAVED, GPT_OSS, replace(INTERLEAVED, limit=0.5),
     *(Activation(kind, gated=False) for kind in ("silu", "relu", "identity", "gelu_tanh"))],
)  # fmt: skip
@pytest.mark.parametrize("mixing", [False, True])
def test_qmoe_activations_and_routings(act: Activation, mixing: bool, tmp_path: Path) -> None:
    weights = parts("uint4_g32", 6, 96, 160, gated=act.gated, biased=mixing)
    runs_right("ort.qmoe", scores(11, 6, 96, mixing), weights, tmp_path, k=3, bits=4, group=32, act=act)


@pytest.mark.parametrize("routing", ["idle", "one"])
@pytest.mark.parametrize(("experts", "k"), [(4, 1), (4, 4), (33, 2)])
def test_qmoe_loads(routing: str, experts: int, k: int, tmp_path: Path) -> None:
    weights = parts("int4_g16", experts, 48, 32)
    runs_right("ort.qmoe", scores(70, experts, 48, True, routing), weights, tmp_path, k=k, bits=4, group=16)


def test_qmoe_leaves_out_weights_of_zero(tmp_path: Path) -> None:
    feeds = scores(8, 4, 64, mixing=True)
    feeds["mixing"][:, 1] = 0
    feeds["mixing"][0] = 0
    runs_right("ort.qmoe", feeds, parts("uint4_g32", 4, 64, 64), tmp_path, k=2, bits=4, group=32)


def test_qmoe_on_rows_of_gpt_oss(tmp_path: Path) -> None:
    weights = parts("uint4_g32", 3, 2880, 2880, biased=True)
    feeds = scores(3, 3, 2880, mixing=False)
    runs_right("ort.qmoe", feeds, weights, tmp_path, k=2, bits=4, group=32, act=replace(GPT_OSS, limit=7.0))


@pytest.mark.parametrize("format", ["uint2_g16", "int4_g32", "uint4_g64", "uint8_g16", "int8_g128"])
@pytest.mark.parametrize(
    "act",
    [Activation(), GPT_OSS, Activation("gelu"), Activation("relu2", gated=False), Activation(limit=0.5, clamp_after=True)],
)  # fmt: skip
def test_loop_over_experts(format: str, act: Activation, tmp_path: Path) -> None:
    found, generator = format_of(format), torch.Generator().manual_seed(11)
    width, inner = 3 * found.group, 2 * found.group
    ids = torch.rand(9, 5, generator=generator).argsort(-1)[:, :2].clone()
    ids[5:] = torch.tensor([1, 0])
    gates = torch.randn(9, 2, generator=generator)  # of any sign
    feeds = {"x": torch.randn(9, width, generator=generator), "ids": ids, "gates": gates}
    weights = parts(format, 5, width, inner, gated=act.gated, biased=act.gated)
    options = {"bits": found.bits, "group": found.group, "act": act}
    runs_right("ort.experts_nbits", feeds, weights, tmp_path, **options)


def test_loop_over_experts_that_plain_ops_decode(tmp_path: Path) -> None:
    found, generator = format_of("mxfp4"), torch.Generator().manual_seed(11)
    weights = {
        f"{name}_{part}": tensor
        for name, rows, width in (("up", 128, 96), ("down", 96, 64))
        for part, tensor in found.encode(torch.randn(5, rows, width, generator=generator) / width**0.5).items()
    }
    ids = torch.rand(9, 5, generator=generator).argsort(-1)[:, :2].clone()
    feeds = {"x": torch.randn(9, 96, generator=generator), "ids": ids, "gates": torch.randn(9, 2, generator=generator)}
    runs_right("ort.experts_nbits", feeds, weights, tmp_path, bits=4, group=32, format="mxfp4")
