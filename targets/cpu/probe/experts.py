"""Programs of MoE and QMoE for the probe: formats, activations, routings, and the traps among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from onnx import TensorProto, helper

from ....compiler.formats.format import Format
from ....compiler.formats.table import format_of, integers_of
from ....compiler.ir.activation import Activation
from ....compiler.ir.types import TensorType
from ..capabilities import Variant
from ..onnx.graph import CONTRIB
from ..ops import INTERLEAVED
from .cases import (
    TOKENS,
    Case,
    Edit,
    T,
    cast_inputs,
    edit_model,
    large_parts,
    random_quantized_parts,
    run_reference,
    set_attributes,
    stored_tensors,
    without_last_axis,
    write_node,
    write_program,
)
from .variants import QUANT_TYPES

EXPERTS, CHOSEN = 6, 2
LARGE_WIDTH, LARGE_INNER, LARGE_CHOSEN = 1024, 512, 8
SCALES = (3, 6)  # inputs of QMoE whose dtype is not that of the activations

# activation of a variant -> what moe.experts computes there
ACTS = {
    "swiglu": INTERLEAVED,
    "swiglu_clamped": replace(INTERLEAVED, alpha=1.702, beta=1.0, limit=0.7),
    "gated_gelu": replace(INTERLEAVED, kind="gelu"),
    "gated_gelu_tanh": replace(INTERLEAVED, kind="gelu_tanh"),
    **{name: Activation(name, gated=False) for name in ("silu", "relu", "identity", "gelu", "gelu_tanh", "relu2")},
}
# activations that moec does not emit -> what replaces them in the program, and what the node is told afterwards
UNKNOWN: dict[str, tuple[Activation, str]] = {
    "gated_gelu": (INTERLEAVED, "geglu"),
    "gated_gelu_tanh": (INTERLEAVED, "geglu"),
    "gelu": (ACTS["gelu_tanh"], "gelu"),
    "relu2": (ACTS["identity"], "relu2"),
}
BENT: dict[str, list[Edit]] = {
    "weights_prepacked=0": [set_attributes(weights_prepacked=0)],
    "weights_prepacked=1": [set_attributes(weights_prepacked=1)],
    "swiglu_fusion=2": [set_attributes(swiglu_fusion=2)],
    "one scale a row without block_size": [set_attributes(block_size=None), without_last_axis(*SCALES)],
}


def write_qmoe(variant: Variant, folder: Path, weight_bytes: int = 0) -> Case:
    """Write a program of one QMoE; with `weight_bytes` of weights, to take its speed."""
    if variant.option == "blocks of 24":
        format = integers_of(4, 24, zeros=False)
    else:
        format = format_of(variant.format)
    if format.element != "int":
        return _write_float_qmoe(variant, format, folder)
    options = {"bits": format.bits, "group": format.group, "accuracy": variant.accuracy}
    if weight_bytes:
        return _write_large(format, options, folder, weight_bytes)
    one = variant.one_group or "one scale" in variant.option
    width, inner = (1, 1) if one else (3, 2)
    parts = _expert_parts(format, width * format.group, inner * format.group, gated=_is_gated(variant))
    x, choice, mixing = _random_inputs(width * format.group, negative=variant.routing == "negative weights")
    mixed = "weights" in variant.routing
    act, edits = _emitted_activation(variant)
    inputs = {"x": _f32_type(T, x.shape[1]), "choice": _f32_type(T, EXPERTS)} | (
        {"mixing": _f32_type(T, EXPERTS)} if mixed else {}
    )
    write_program("ort.qmoe", inputs, parts, folder, k=CHOSEN, **options, act=act)
    edit_model(folder, *edits)
    ids, gates = _expected_routing(variant.routing, choice, mixing)
    given = {"x": x, "ids": ids, "gates": gates, **parts}
    wants = run_reference(
        "ort.experts_nbits", given, bits=format.bits, group=format.group, act=_expected_activation(variant)
    )
    feeds = {"x": x, "choice": choice} | ({"mixing": mixing} if mixed else {})
    return Case(feeds, wants, rows=True)


def write_moe(variant: Variant, folder: Path, weight_bytes: int = 0) -> Case:
    """Write a program of one MoE, with its routing turned into scores; with `weight_bytes`, to take its speed."""
    width, inner = (LARGE_WIDTH, LARGE_INNER) if weight_bytes else (96, 64)
    experts = max(CHOSEN, weight_bytes // (12 * width * inner)) if weight_bytes else EXPERTS
    rows = inner * (2 if _is_gated(variant) else 1)
    generator = torch.Generator().manual_seed(1)
    up = torch.randn(experts, rows, width, generator=generator) / width**0.5
    down = torch.randn(experts, width, inner, generator=generator) / inner**0.5
    weights = {"up": up, "down": down}
    chosen = min(LARGE_CHOSEN, experts // 2) if weight_bytes else CHOSEN
    act, edits = _emitted_activation(variant)
    inputs = {"x": _f32_type(T, width), "ids": TensorType.of("i64", T, chosen), "gates": _f32_type(T, chosen)}
    write_program("ort.moe", inputs, weights, folder, act=act)
    edit_model(folder, *edits)
    if weight_bytes:
        steps = [{"x": torch.randn(1, width), "ids": ids, "gates": torch.full((1, chosen), 1 / chosen)}
                 for ids in _rounds_over_experts(experts, chosen)]  # fmt: skip
        return Case(steps=steps, bytes_read=4 * (up.numel() + down.numel()) * chosen // experts)
    x, choice, _ = _random_inputs(width, negative=False)
    ids, gates = _expected_routing("softmax", choice, None)
    gates = gates * 1.5  # any sum
    if variant.routing == "zero weights":
        gates[::2, 0] = 0
    if variant.routing == "negative weights":
        gates[::2, 0] *= -1
    given = {"x": x, "ids": ids, "gates": gates}
    wants = run_reference("moe.experts", given | weights, act=_expected_activation(variant))
    return Case(given, wants, rows=True)


def _f32_type(*sizes: Any) -> TensorType:
    return TensorType.of("f32", *sizes)


def _is_gated(variant: Variant) -> bool:
    return ACTS[variant.activation].gated


def _expected_activation(variant: Variant) -> Activation:
    """Return the activation whose numbers a node should give."""
    act = ACTS[variant.activation]
    return replace(act, layout="concat") if variant.option == "swiglu_fusion=2" else act


def _emitted_activation(variant: Variant) -> tuple[Activation, list[Edit]]:
    """Return the activation to emit, and what to change in the node afterwards."""
    act, name = UNKNOWN.get(variant.activation, (ACTS[variant.activation], ""))
    edits = [set_attributes(activation_type=name)] if name else []
    if variant.routing == "normalized weights":
        edits.append(set_attributes(normalize_routing_weights=1))
    if variant.routing == "softmax over all experts":
        edits.append(set_attributes(normalize_routing_weights=0))
    if variant.dtype != "f32":
        edits.append(cast_inputs(variant.dtype))
    return act, [*edits, *BENT.get(variant.option, [])]


def _expert_parts(format: Format, width: int, inner: int, gated: bool) -> dict[str, torch.Tensor | None]:
    up = random_quantized_parts(format, EXPERTS, inner * (2 if gated else 1), width, seed=1)
    down = random_quantized_parts(format, EXPERTS, width, inner, seed=2)
    return {f"up_{n}": t for n, t in up.items()} | {f"down_{n}": t for n, t in down.items()}


def _random_inputs(width: int, negative: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return activations, scores that choose, and weights that mix; one expert has no token."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(TOKENS[-1], width, generator=generator)
    choice = torch.randn(TOKENS[-1], EXPERTS, generator=generator)
    choice[:, -1] = -9
    mixing = torch.rand(TOKENS[-1], EXPERTS, generator=generator) + 0.1
    if negative:
        mixing[:, ::2] *= -1
    return x, choice, mixing


def _expected_routing(
    routing: str, choice: torch.Tensor, mixing: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the experts of each token and their weights."""
    top, ids = torch.topk(choice, CHOSEN, dim=-1)
    if routing == "softmax":
        return ids, torch.softmax(top, -1)
    if routing == "softmax over all experts":
        return ids, torch.gather(torch.softmax(choice, -1), 1, ids)
    assert mixing is not None
    gates = torch.gather(mixing, 1, ids)
    return ids, gates / gates.sum(-1, keepdim=True) if routing == "normalized weights" else gates


# --- speed -----------------------------------------------------------------------------------------------------


def _write_large(format: Format, options: dict[str, Any], folder: Path, weight_bytes: int) -> Case:
    expert = int(3 * LARGE_WIDTH * LARGE_INNER * format.bits_per_weight / 8)
    experts = max(LARGE_CHOSEN, weight_bytes // expert)
    up = large_parts(format, experts, 2 * LARGE_INNER, LARGE_WIDTH)
    down = large_parts(format, experts, LARGE_WIDTH, LARGE_INNER)
    parts = {f"up_{n}": t for n, t in up.items()} | {f"down_{n}": t for n, t in down.items()}
    inputs = {"x": _f32_type(T, LARGE_WIDTH), "choice": _f32_type(T, experts), "mixing": _f32_type(T, experts)}
    write_program("ort.qmoe", inputs, parts, folder, k=LARGE_CHOSEN, **options)
    steps = []
    for ids in _rounds_over_experts(experts, LARGE_CHOSEN):
        dense = torch.zeros(1, experts).scatter(1, ids, 1 / LARGE_CHOSEN)
        steps.append({"x": torch.randn(1, LARGE_WIDTH), "choice": dense, "mixing": dense})
    return Case(steps=steps, bytes_read=expert * LARGE_CHOSEN)


def _rounds_over_experts(experts: int, chosen: int) -> Sequence[torch.Tensor]:
    """Return which experts each step reads: all of them, a few a step, so that none is still in a cache."""
    return [torch.arange(start, start + chosen)[None] for start in range(0, experts - chosen + 1, chosen)]


# --- floating-point weights ------------------------------------------------------------------------------------


def _write_float_qmoe(variant: Variant, format: Format, folder: Path) -> Case:
    """Write a QMoE on E2M1 or E4M3 weights by hand: moec has no op for it on this target."""
    width = inner = 256
    generator = torch.Generator().manual_seed(1)
    up = format.encode(torch.randn(EXPERTS, 2 * inner, width, generator=generator) / width**0.5)
    down = format.encode(torch.randn(EXPERTS, width, inner, generator=generator) / inner**0.5)
    tensors = [*stored_tensors("up", up, format), *stored_tensors("down", down, format)]
    names = ["x", "choice", "up.codes", "up.scales", "", "down.codes", "down.scales", *[""] * 7, "mixing"]
    if format.rows == 1:
        whole = [float(p.get("tensor_scale", torch.tensor(1.0))) for p in (up, down)]
        for name, value in zip(("up.whole", "down.whole"), whole, strict=True):
            tensors.append(helper.make_tensor(name, TensorProto.FLOAT, [EXPERTS], [value] * EXPERTS))
        names += ["up.whole", "down.whole"]
    node = helper.make_node(
        "QMoE", names, ["y"], domain=CONTRIB, k=CHOSEN, activation_type="swiglu", swiglu_fusion=1,
        expert_weight_bits=format.bits, block_size=format.group, quant_type=QUANT_TYPES[format.name],
    )  # fmt: skip
    sizes = {"x": width, "choice": EXPERTS, "mixing": EXPERTS}
    inputs = {name: (TensorProto.FLOAT, "T", size) for name, size in sizes.items()}
    write_node(node, inputs, ("T", width), tensors, folder)
    x, choice, mixing = _random_inputs(width, negative=False)
    ids, gates = _expected_routing(variant.routing, choice, mixing)
    given = {"x": x, "ids": ids, "gates": gates, "up": format.decode(up, width), "down": format.decode(down, inner)}
    return Case(
        {"x": x, "choice": choice, "mixing": mixing}, run_reference("moe.experts", given, act=INTERLEAVED), rows=True
    )
