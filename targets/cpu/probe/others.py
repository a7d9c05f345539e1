"""Programs of the probe for all but routed experts: linears, lookups, attention, norms, activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from onnx import TensorProto, helper

from ....compiler.formats.format import Format
from ....compiler.formats.table import format_of
from ....compiler.ir.types import TensorType
from ..capabilities import ODD_HEADS, ODD_TURNED, Variant
from ..onnx.graph import CONTRIB
from .cases import (
    TOKENS,
    Case,
    P,
    S,
    T,
    edit_model,
    large_parts,
    random_quantized_parts,
    run_reference,
    set_attributes,
    stored_tensors,
    weight_inputs,
    write_node,
    write_program,
)

ROWS = 72  # of a weight or table: no multiple of what a kernel does at once
EXPERTS, CHOSEN = 6, 2
LARGE_WIDTH = 4096
EPS = 1e-5


def write_linear(variant: Variant, folder: Path, weight_bytes: int = 0) -> Case:
    """Write a program of one MatMulNBits; with `weight_bytes` of weights, to take its speed."""
    format = format_of(variant.format)
    if format.element != "int":
        return _float_linear(format, folder)
    options = {"bits": format.bits, "group": format.group, "accuracy": variant.accuracy}
    if weight_bytes:
        rows = int(weight_bytes * 8 / format.bits_per_weight / LARGE_WIDTH)
        inputs = {"x": TensorType.of("f32", T, LARGE_WIDTH)}
        write_program("ort.matmul_nbits", inputs, large_parts(format, rows, LARGE_WIDTH), folder, **options)
        return Case(steps=[{"x": torch.randn(1, LARGE_WIDTH)}], bytes_read=weight_bytes)
    width = format.group * (1 if variant.one_group else 3)
    parts = random_quantized_parts(format, ROWS, width, seed=1)
    x = torch.randn(TOKENS[-1], width, generator=torch.Generator().manual_seed(2))
    write_program("ort.matmul_nbits", {"x": TensorType.of("f32", T, width)}, parts, folder, **options)
    return Case({"x": x}, run_reference("ort.matmul_nbits", {"x": x, **parts}, **options), rows=True)


def write_lookup(variant: Variant, folder: Path, weight_bytes: int = 0) -> Case:
    """Write a program of one GatherBlockQuantized, or of the Loop over experts that uses it."""
    format = format_of(variant.format)
    if format.element != "int":
        return _float_lookup(format, folder)
    options = {"bits": format.bits, "group": format.group}
    generator = torch.Generator().manual_seed(2)
    width = 3 * format.group
    if variant.option != "experts":
        parts = random_quantized_parts(format, ROWS, width, seed=1)
        ids = torch.randint(0, ROWS, (TOKENS[-1],), generator=generator)
        write_program("ort.gather_nbits", {"ids": TensorType.of("i64", T)}, parts, folder, **options)
        return Case({"ids": ids}, run_reference("ort.gather_nbits", {"ids": ids, **parts}, **options), rows=True)
    inner = 2 * format.group
    up = random_quantized_parts(format, EXPERTS, 2 * inner, width, seed=1)
    down = random_quantized_parts(format, EXPERTS, width, inner, seed=2)
    parts = {f"up_{n}": t for n, t in up.items()} | {f"down_{n}": t for n, t in down.items()}
    feeds = {
        "x": torch.randn(TOKENS[-1], width, generator=generator),
        "ids": torch.rand(TOKENS[-1], EXPERTS, generator=generator).argsort(-1)[:, :CHOSEN],
        "gates": torch.randn(TOKENS[-1], CHOSEN, generator=generator),
    }
    inputs = {"x": TensorType.of("f32", T, width), "ids": TensorType.of("i64", T, CHOSEN)}
    inputs["gates"] = TensorType.of("f32", T, CHOSEN)
    write_program("ort.experts_nbits", inputs, parts, folder, **options)
    return Case(feeds, run_reference("ort.experts_nbits", feeds | parts, **options), rows=True)


# --- floating-point weights ------------------------------------------------------------------------------------


def _float_linear(format: Format, folder: Path) -> Case:
    """Write a MatMulNBits on E2M1 or E4M3 weights: moec has no op for it on this target."""
    width = 3 * format.group
    weight, parts = _encoded_weight(format, width)
    kept: dict[str, Any] = {"K": width, "N": len(weight), "bits": format.bits, "block_size": format.group}
    node = helper.make_node("MatMulNBits", ["x", "w.codes", "w.scales"], ["y0"], domain=CONTRIB, **kept)
    write_node(node, {"x": (TensorProto.FLOAT, "T", width)}, ("T", len(weight)), parts, folder)
    x = torch.randn(TOKENS[-1], width, generator=torch.Generator().manual_seed(2))
    return Case({"x": x}, [x @ weight.T], rows=True)


def _float_lookup(format: Format, folder: Path) -> Case:
    """Write a GatherBlockQuantized on E2M1 or E4M3 weights."""
    width = 3 * format.group
    weight, parts = _encoded_weight(format, width)
    kept: dict[str, Any] = {"bits": format.bits, "block_size": format.group, "gather_axis": 0, "quantize_axis": 1}
    node = helper.make_node("GatherBlockQuantized", ["w.codes", "ids", "w.scales"], ["y0"], domain=CONTRIB, **kept)
    write_node(node, {"ids": (TensorProto.INT64, "T")}, ("T", width), parts, folder)
    ids = torch.randint(0, len(weight), (TOKENS[-1],), generator=torch.Generator().manual_seed(2))
    return Case({"ids": ids}, [weight[ids]], rows=True)


def _encoded_weight(format: Format, width: int) -> tuple[torch.Tensor, list[TensorProto]]:
    """Return a weight as its codes decode to it, and its parts; rows that share a scale are of several sizes."""
    rows = ROWS if format.rows == 1 else 2 * format.rows
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(1)) / width**0.5
    parts = format.encode(weight * torch.linspace(0.5, 2, rows)[:, None])
    return format.decode(parts, width), stored_tensors("w", parts, format)


# --- attention -------------------------------------------------------------------------------------------------


def write_attention(variant: Variant, folder: Path, weight_bytes: int = 0) -> Case:
    """Write a program of one GroupQueryAttention: 5 past tokens, 4 new ones, two sequences."""
    batch, new, past, heads, groups = 2, 4, 5, 4, 2
    option = variant.option
    width = {ODD_HEADS: 12, ODD_TURNED: 24}.get(option, 64)
    generator = torch.Generator().manual_seed(1)
    sizes: dict[str, tuple[int, ...]] = {"q": (heads * width,), "k": (groups * width,), "v": (groups * width,)}
    if "packed" in option:
        sizes = {"q": ((heads + 2 * groups) * width,)}
    feeds = {n: torch.randn(batch, new, *shape, generator=generator) for n, shape in sizes.items()}
    inputs = {n: TensorType.of("f32", batch, S, *shape) for n, shape in sizes.items()}
    for name in ("past_key", "past_value"):
        feeds[name] = torch.randn(batch, groups, past, width, generator=generator)
        inputs[name] = TensorType.of("f32", batch, groups, P, width, state=True)
    if "rotary" in option:
        turned = width // 2 if "part" in option else width
        angles = torch.rand(batch, new, turned // 2, generator=generator).repeat(1, 1, 2) * 6
        feeds |= {"cos": angles.cos(), "sin": angles.sin()}
        inputs |= {n: TensorType.of("f32", batch, S, turned) for n in ("cos", "sin")}
    inputs["bias"] = TensorType.of("f32", batch, 1, S, P + S)
    feeds["bias"] = torch.zeros(batch, 1, new, past + new)
    if option == "bias":
        feeds["bias"][1, ..., :3] = -torch.inf
    weights = {"sinks": torch.randn(heads, generator=generator) if option == "sinks" else None}
    extra: dict[str, dict[str, Any]] = {"window": {"window": 3}, "softcap": {"softcap": 2.0}}
    attrs = {"heads": heads, "scale": 0.2, **extra.get(option, {})}
    write_program("ort.group_query_attention", inputs, weights, folder, **attrs)
    if option == "norms of heads":
        norms = {f"{n}_norm": torch.rand(width, generator=generator) + 0.5 for n in "qk"}
        edit_model(
            folder,
            set_attributes(q_norm_epsilon=EPS, k_norm_epsilon=EPS),
            weight_inputs({14: "q_norm", 15: "k_norm"}, norms),
        )
        given = feeds | norms | {"mask": torch.ones(batch, past + new, dtype=torch.long)}
        return Case(feeds, run_reference("nn.cached_attention", given, eps=EPS, **attrs))
    return Case(feeds, run_reference("ort.group_query_attention", feeds | weights, **attrs))


def write_rotary(variant: Variant, folder: Path, weight_bytes: int = 0) -> Case:
    """Write a program of one RotaryEmbedding."""
    batch, new, heads, width = 2, 4, 3, 16
    generator = torch.Generator().manual_seed(1)
    rows = 1 if variant.option else batch
    angles = torch.rand(rows, new, width // 2, generator=generator).repeat(1, 1, 2) * 6
    feeds = {"x": torch.randn(batch, new, heads, width, generator=generator), "cos": angles.cos(), "sin": angles.sin()}
    inputs = {"x": TensorType.of("f32", batch, S, heads, width)}
    inputs |= {n: TensorType.of("f32", rows, S, width) for n in ("cos", "sin")}
    write_program("ort.rotary_embedding", inputs, {}, folder)
    return Case(feeds, run_reference("ort.rotary_embedding", feeds))


# --- norms and activations -------------------------------------------------------------------------------------


def write_skip_norm(variant: Variant, folder: Path, weight_bytes: int = 0) -> Case:
    """Write a program of one SkipSimplifiedLayerNormalization: RMSNorm of a sum."""
    generator = torch.Generator().manual_seed(1)
    width = 24
    feeds = {n: torch.randn(TOKENS[-1], width, generator=generator) for n in ("x", "residual")}
    weights = {"w": torch.randn(width, generator=generator)}
    write_program("nn.add_rms_norm", dict.fromkeys(feeds, TensorType.of("f32", T, width)), weights, folder, eps=EPS)
    return Case(feeds, run_reference("nn.add_rms_norm", feeds | weights, eps=EPS), rows=True)


def write_quick_gelu(variant: Variant, folder: Path, weight_bytes: int = 0) -> Case:
    """Write a program of one QuickGelu."""
    alpha = float(variant.option.removeprefix("alpha=") or 1)
    x = torch.randn(TOKENS[-1], 24, generator=torch.Generator().manual_seed(1)) * 4
    write_program("ort.quick_gelu", {"x": TensorType.of("f32", T, 24)}, {}, folder, alpha=alpha)
    return Case({"x": x}, run_reference("ort.quick_gelu", {"x": x}, alpha=alpha), rows=True)
