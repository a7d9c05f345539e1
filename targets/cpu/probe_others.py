"""Programs of the probe for what is not routed experts: linears, lookups, attention, norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from ...compiler.formats import format_of
from ...compiler.ir import TensorType
from .capabilities import ODD_HEADS, Variant
from .emit import IR_VERSION, MODEL, OPSET
from .graph import CONTRIB
from .probe_cases import TOKENS, Case, P, S, T, large, quantized, refer, write

ROWS = 72  # of a weight or table: no multiple of what a kernel does at once
EXPERTS, CHOSEN = 6, 2
LARGE_WIDTH = 4096


def write_linear(variant: Variant, folder: Path, weight_bytes: int = 0) -> Case:
    """Write a program of one MatMulNBits; with `weight_bytes` of weights, to take its speed."""
    format = format_of(variant.format)
    options = {"bits": format.bits, "group": format.group, "accuracy": variant.accuracy}
    if weight_bytes:
        rows = int(weight_bytes * 8 / format.bits_per_weight / LARGE_WIDTH)
        inputs = {"x": TensorType.of("f32", T, LARGE_WIDTH)}
        write("ort.matmul_nbits", inputs, large(format, rows, LARGE_WIDTH), folder, **options)
        return Case(steps=[{"x": torch.randn(1, LARGE_WIDTH)}], bytes_read=weight_bytes)
    width = format.group * (1 if variant.one_group else 3)
    parts = quantized(format, ROWS, width, seed=1)
    x = torch.randn(TOKENS[-1], width, generator=torch.Generator().manual_seed(2))
    write("ort.matmul_nbits", {"x": TensorType.of("f32", T, width)}, parts, folder, **options)
    return Case({"x": x}, refer("ort.matmul_nbits", {"x": x, **parts}, **options), rows=True)


def write_lookup(variant: Variant, folder: Path, weight_bytes: int = 0) -> Case:
    """Write a program of one GatherBlockQuantized, or of the Loop over experts that uses it."""
    format = format_of(variant.format)
    options = {"bits": format.bits, "group": format.group}
    generator = torch.Generator().manual_seed(2)
    width = 3 * format.group
    if variant.option != "experts":
        parts = quantized(format, ROWS, width, seed=1)
        ids = torch.randint(0, ROWS, (TOKENS[-1],), generator=generator)
        write("ort.gather_nbits", {"ids": TensorType.of("i64", T)}, parts, folder, **options)
        return Case({"ids": ids}, refer("ort.gather_nbits", {"ids": ids, **parts}, **options), rows=True)
    inner = 2 * format.group
    up = quantized(format, EXPERTS, 2 * inner, width, seed=1)
    down = quantized(format, EXPERTS, width, inner, seed=2)
    parts = {f"up_{n}": t for n, t in up.items()} | {f"down_{n}": t for n, t in down.items()}
    feeds = {
        "x": torch.randn(TOKENS[-1], width, generator=generator),
        "ids": torch.rand(TOKENS[-1], EXPERTS, generator=generator).argsort(-1)[:, :CHOSEN],
        "gates": torch.randn(TOKENS[-1], CHOSEN, generator=generator),
    }
    inputs = {"x": TensorType.of("f32", T, width), "ids": TensorType.of("i64", T, CHOSEN)}
    inputs["gates"] = TensorType.of("f32", T, CHOSEN)
    write("ort.experts_nbits", inputs, parts, folder, **options)
    return Case(feeds, refer("ort.experts_nbits", feeds | parts, **options), rows=True)


# --- attention -------------------------------------------------------------------------------------------------


def write_attention(variant: Variant, folder: Path, weight_bytes: int = 0) -> Case:
    """Write a program of one GroupQueryAttention: 5 past tokens, 4 new ones, two sequences."""
    batch, new, past, heads, groups = 2, 4, 5, 4, 2
    width = 12 if variant.option == ODD_HEADS else 64
    generator = torch.Generator().manual_seed(1)
    sizes = {
        "q": (batch, new, heads, width), "k": (batch, new, groups, width), "v": (batch, new, groups, width),
        "past_key": (batch, groups, past, width), "past_value": (batch, groups, past, width),
    }  # fmt: skip
    feeds = {name: torch.randn(shape, generator=generator) for name, shape in sizes.items()}
    inputs = {n: TensorType.of("f32", batch, S, *sizes[n][2:]) for n in ("q", "k", "v")}
    inputs |= {n: TensorType.of("f32", batch, groups, P, width, state=True) for n in ("past_key", "past_value")}
    inputs["bias"] = TensorType.of("f32", batch, 1, S, P + S)
    feeds["bias"] = torch.zeros(batch, 1, new, past + new)
    if variant.option == "bias":
        feeds["bias"][1, ..., :3] = -torch.inf
    weights = {"sinks": torch.randn(heads, generator=generator) if variant.option == "sinks" else None}
    extra: dict[str, dict[str, Any]] = {"window": {"window": 3}, "softcap": {"softcap": 2.0}}
    attrs = {"scale": 0.2, **extra.get(variant.option, {})}
    write("ort.group_query_attention", inputs, weights, folder, **attrs)
    return Case(feeds, refer("ort.group_query_attention", feeds | weights, **attrs))


def write_rotary(variant: Variant, folder: Path, weight_bytes: int = 0) -> Case:
    """Write a program of one RotaryEmbedding."""
    batch, new, heads, width = 2, 4, 3, 16
    generator = torch.Generator().manual_seed(1)
    rows = 1 if variant.option else batch
    angles = torch.rand(rows, new, width // 2, generator=generator).repeat(1, 1, 2) * 6
    feeds = {"x": torch.randn(batch, new, heads, width, generator=generator), "cos": angles.cos(), "sin": angles.sin()}
    inputs = {"x": TensorType.of("f32", batch, S, heads, width)}
    inputs |= {n: TensorType.of("f32", rows, S, width) for n in ("cos", "sin")}
    write("ort.rotary_embedding", inputs, {}, folder)
    return Case(feeds, refer("ort.rotary_embedding", feeds))


def write_skip_norm(variant: Variant, folder: Path, weight_bytes: int = 0) -> Case:
    """Write a program of one SkipSimplifiedLayerNormalization: RMSNorm of a sum."""
    generator = torch.Generator().manual_seed(1)
    width, eps = 24, 1e-5
    x, skip = (torch.randn(2, 3, width, generator=generator) for _ in range(2))
    scale, bias = (torch.randn(width, generator=generator) for _ in range(2))
    inputs = ["x", "skip", "scale"] + (["bias"] if variant.option == "bias" else [])
    outputs = ["y"] + (["", "", "sum"] if variant.option == "sum as an output" else [])
    node = helper.make_node("SkipSimplifiedLayerNormalization", inputs, outputs, domain=CONTRIB, epsilon=eps)
    sizes: list[str | int | None] = ["B", "S", width]
    given = [helper.make_tensor_value_info(n, TensorProto.FLOAT, sizes) for n in ("x", "skip")]
    results = [helper.make_tensor_value_info(n, TensorProto.FLOAT, sizes) for n in outputs if n]
    tensors = [onnx.numpy_helper.from_array(np.asarray(t), n) for n, t in (("scale", scale), ("bias", bias))]
    graph = helper.make_graph([node], "main", given, results, [t for t in tensors if t.name in inputs])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION), folder / MODEL)
    total = x + skip + (bias if variant.option == "bias" else 0)
    (y,) = refer("nn.rms_norm", {"x": total, "w": scale}, eps=eps)
    return Case({"x": x, "skip": skip}, [y, total][: len(results)])
