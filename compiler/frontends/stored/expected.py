"""The tensors that a quantized checkpoint would hold, from its config.json alone.

Tools quantize the linear layers and the experts, but for what the config lists as left out; each method has its own way of
listing. The names here are those that transformers saves the family with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import torch

from ...errors import MoecError
from ...ir.recipes import Recipe, Tensor
from ...ir.types import TensorType
from .layouts import Layout, Stored, block_scaled_float4, gpt_oss, packed_integers, scaled_codes
from .layouts_gptq import gptq_weight
from .schemes import Scheme, Unquantized, matches_module, read_schemes, text_name

_ROUTERS = ("gate", "router", "shared_expert_gate")
Parts = dict[str, tuple[str, tuple[int, ...]]]  # role -> dtype, shape


def expected_quantized(
    model: Any,
    state: Mapping[str, torch.Tensor],
    stored: Mapping[str, Recipe],
    quantization: Mapping[str, Any],
    where: Path,
) -> dict[str, Recipe]:
    """Return the tensors that a quantized checkpoint would hold in place of unquantized ones, as recipes by name.

    `state` are parameters of a model, `stored` what they are saved as.
    """
    try:
        schemes = read_schemes(quantization)
        left_out = _LEFT_OUT[quantization["quant_method"]](quantization)
        found = dict(stored)
        for name, module in _quantizable_weights(model, state, stored).items():
            owner = name.removesuffix(".weight")
            if not left_out(owner) and not left_out(module):
                found[name] = _quantized_recipe(name, owner, stored[name], schemes(owner), quantization)
    except Unquantized:
        raise AssertionError("left_out says so first") from None
    except ValueError as error:
        raise MoecError(
            f"a config alone does not say how these weights are stored: {error}",
            where=str(where),
            todo="put the safetensors files beside config.json",
        ) from None
    return found


def expected_storage(model: Any, quantization: Mapping[str, Any], layers: str) -> Callable[[int], Hashable]:
    """Return a function that says of a layer which of its modules the config quantizes, and how; `layers` is their name."""
    found: dict[int, list[tuple[str, Hashable]]] = {}
    try:
        schemes, left_out = read_schemes(quantization), _LEFT_OUT[quantization["quant_method"]](quantization)
        for name, module in model.named_modules():
            number, _, tail = name.removeprefix(f"{layers}.").partition(".")
            if name.startswith(f"{layers}.") and (isinstance(module, torch.nn.Linear) or tail.endswith("experts")):
                found.setdefault(int(number), []).append((tail, None if left_out(name) else schemes(name)))
    except ValueError:
        return lambda layer: None  # said where the weights are looked at
    return lambda layer: tuple(found.get(layer, ()))


def _quantizable_weights(model: Any, state: Mapping[str, torch.Tensor], stored: Mapping[str, Recipe]) -> dict[str, str]:
    """Return the weights of linear layers and experts by their names in a checkpoint, with the model's name of the module."""
    from transformers.core_model_loading import revert_weight_conversion

    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    found: dict[str, str] = {}
    for name, tensor in state.items():
        experts = tensor.dim() == 3 and ".experts." in f"{name}."
        if name in linear or experts:
            names = [name] if name in stored else revert_weight_conversion(model, {name: tensor})
            found |= {own: name.removesuffix(".weight") for own in names if own in stored}
    return found


# --- what the config leaves out -----------------------------------------------------------------------------------


def _listed_names(config: Mapping[str, Any], *keys: str) -> list[str]:
    found: Any = next((config[key] for key in keys if config.get(key)), [])
    if not isinstance(found, (list, tuple)) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{keys[0]} in quantization_config is not a list of names")
    return list(found)


def _not_converted(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Return transformers' rule for modules_to_not_convert; the head is left out in any case."""
    listed = _listed_names(config, "modules_to_not_convert", "ignored_layers")
    patterns = [re.compile(rf"(?:{re.escape(text_name(p)).replace(chr(92) + '*', '.*')})(?:\.|$)") for p in listed]

    def left_out(module: str) -> bool:
        own = text_name(module)
        ends = any(own == name or own.endswith(f".{name}") for name in listed)
        return own in ("lm_head", "head") or ends or any(p.match(own) for p in patterns)

    return left_out


def _modelopt_ignore_rule(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Return ModelOpt's rule: names and patterns with `*`; a mixed config names what is quantized."""
    listed = _listed_names(config, "ignore", "exclude_modules")
    layers = list(config.get("quantized_layers") or ()) if config.get("quant_algo") == "MIXED_PRECISION" else None

    def left_out(module: str) -> bool:
        if any(matches_module(pattern, module) for pattern in listed):
            return True
        return layers is not None and not any(matches_module(name, module) for name in layers)

    return left_out


def _compressed_ignore_rule(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Return compressed-tensors' rule: `ignore`, and modules that no group of modules targets."""
    ignored = _listed_names(config, "ignore")
    targets = [t for group in config["config_groups"].values() for t in _listed_names(group, "targets")]

    def named(module: str, names: list[str]) -> bool:
        own = text_name(module)
        return any(
            any(re.match(name[3:], known) for known in (module, own))
            if name.startswith("re:")
            else name == "Linear" or text_name(name) == own
            for name in names
        )

    return lambda module: named(module, ignored) or not named(module, targets)


def _gptq_left_out(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Return the rule of GPTQ and AutoRound: linear layers inside of layers but routers, and what patterns leave out."""
    schemes = read_schemes(config)
    not_converted = _not_converted(config)

    def left_out(module: str) -> bool:
        own = text_name(module)
        head = own == "lm_head" and not config.get("lm_head")
        if head or own.rpartition(".")[2] in _ROUTERS or (own != "lm_head" and not_converted(module)):
            return True
        try:
            schemes(module)
        except Unquantized:
            return True
        return False

    return left_out


_LEFT_OUT: Mapping[str, Callable[[Mapping[str, Any]], Callable[[str], bool]]] = {
    "fp8": _not_converted,
    "mxfp8": _not_converted,
    "mxfp4": lambda config: lambda module: not module.endswith((".experts.gate_up_proj", ".experts.down_proj")),
    "modelopt": _modelopt_ignore_rule,
    "compressed-tensors": _compressed_ignore_rule,
    "gptq": _gptq_left_out,
    "awq": _gptq_left_out,
    "auto-round": _gptq_left_out,
}


# --- what stands in its place -------------------------------------------------------------------------------------


def _quantized_recipe(
    name: str, owner: str, plain: Recipe, schemes: tuple[Scheme, ...], config: Mapping[str, Any]
) -> Recipe:
    """Return the recipe of a weight stored by the first of the schemes that a config allows."""
    method, scheme = config["quant_method"], schemes[0]
    sizes = plain.type.sizes
    if method == "mxfp4":
        layout, parts = _gpt_oss_parts(sizes)
    elif scheme.layout:
        layout, parts = _gptq_parts(scheme, sizes)
    else:
        layout, parts = _scheme_parts(scheme, sizes, method, plain.type.dtype)
    prefix = f"{owner}." if name != owner else f"{owner}_"
    named = {
        role: Tensor(name if role == "weight" else f"{prefix}{role}", TensorType.of(dtype, *shape))
        for role, (dtype, shape) in parts.items()
    }
    values = {
        "weight_shape": lambda: torch.tensor(sizes),
        "g_idx": lambda: (
            torch.arange(sizes[-1]) // (scheme.block[1] if scheme.block and scheme.block[1] else sizes[-1])
        ),
    }
    if "qzeros" in named:
        values["qzeros"] = lambda: torch.zeros(named["qzeros"].type.sizes, dtype=torch.int32)
    by_name = {tensor.name: role for role, tensor in named.items()}
    return layout(Stored(named, lambda own: values[by_name[own]]()), scheme)


def _gpt_oss_parts(sizes: tuple[int, ...]) -> tuple[Layout, Parts]:
    count, inputs, outputs = sizes
    types: Parts = {
        "blocks": ("u8", (count, outputs, inputs // 32, 16)),
        "scales": ("u8", (count, outputs, inputs // 32)),
    }
    return gpt_oss, types


def _gptq_parts(scheme: Scheme, sizes: tuple[int, ...]) -> tuple[Layout, Parts]:
    rows, columns = _matrix_sizes(sizes)
    assert scheme.block is not None
    groups = -(-columns // (scheme.block[1] or columns))
    if scheme.layout == "awq":
        codes, zeros = (columns, rows // 8), (groups, rows // 8)
    else:
        codes, zeros = (-(-columns * scheme.bits // 32), rows), (groups, -(-rows * scheme.bits // 32))
    parts: Parts = {"qweight": ("i32", codes), "scales": ("f16", (groups, rows)), "qzeros": ("i32", zeros)}
    if scheme.layout == "gptq":
        parts["g_idx"] = ("i32", (columns,))
    return gptq_weight, parts


def _scheme_parts(scheme: Scheme, sizes: tuple[int, ...], method: str, dtype: str) -> tuple[Layout, Parts]:
    *lead, rows, columns = sizes
    high, wide = scheme.block or (0, 0)
    counts = (*lead, -(-rows // (high or rows)), -(-columns // (wide or columns)))
    compressed = method == "compressed-tensors"
    if (scheme.kind, scheme.bits) == ("float", 4):
        codes = "weight_packed" if compressed else "weight"
        parts: Parts = {
            codes: ("u8", (*lead, rows, columns // 2)),
            "weight_scale": ("f8e4m3" if scheme.scale == "e4m3" else "u8", counts),
        }
        if scheme.scale == "e4m3":
            parts["weight_global_scale" if compressed else "weight_scale_2"] = (
                "f32",
                (1,) if compressed else tuple(lead),
            )
        return block_scaled_float4 if compressed else scaled_codes, parts
    if scheme.kind == "int" and compressed and scheme.bits < 8:
        _matrix_sizes(sizes)
        parts = {
            "weight_packed": ("i32", (rows, -(-columns * scheme.bits // 32))),
            "weight_scale": (dtype, counts),
            "weight_shape": ("i64", (2,)),
        }
        if scheme.symmetric is False:
            parts["weight_zero_point"] = ("i32", (-(-rows * scheme.bits // 32), counts[-1]))
        return packed_integers, parts
    scale = "u8" if scheme.scale == "e8m0" else dtype if compressed else "f32"
    if method == "modelopt" and high > 1:
        counts = (*lead, counts[-2], 1, counts[-1], 1)
    role = "weight_scale_inv" if method == "fp8" and high else "weight_scale"
    tensor = (high, wide) == (0, 0)
    parts = {
        "weight": ("i8" if scheme.kind == "int" else "f8e4m3", sizes),
        role: (scale, (*lead, *((1,) if compressed and not lead else ())) if tensor else counts),
    }
    if scheme.symmetric is False:
        parts["weight_zero_point"] = ("i8", parts[role][1])
    return scaled_codes, parts


def _matrix_sizes(sizes: tuple[int, ...]) -> tuple[int, int]:
    if len(sizes) != 2:
        raise ValueError("experts of this family are stored in one tensor, which this method takes apart")
    return sizes[0], sizes[1]
