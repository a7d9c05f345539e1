"""What a checkpoint stores for each weight: one tensor, or codes with scales and zero points in one of many layouts.

The config says by which method a checkpoint was quantized; which modules were, and with how many bits, is read off the
tensors themselves, since lists of exceptions in configs are patterns that every tool matches in its own way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ...errors import MoecError
from ...ir.recipes import Recipe, Tensor, step
from ...ir.types import TensorType
from ...weights.sources.checkpoint import Checkpoint, first_number
from .layouts import Layout, Stored, awq, float4, gpt_oss, gptq, packed_integers, scaled

# leaves of a module that say something about activations or caches, which stay floats here, or that others imply
UNUSED = {
    "input_scale", "activation_scale", "input_global_scale", "input_zero_point", "output_scale", "k_scale", "v_scale",
    "qscale_act", "weight_shape",
}  # fmt: skip
# the leaf that holds the codes -> the leaves that may stand beside it, and how they are decoded
LAYOUTS: Mapping[str, tuple[set[str], Layout]] = {
    "weight_packed": ({"weight_scale", "weight_global_scale", "weight_zero_point", "weight_g_idx"}, packed_integers),
    "qweight": ({"qzeros", "scales", "g_idx"}, gptq),
    "weight": (
        {"weight_scale", "weight_scale_inv", "weight_scale_2", "weight_zero_point", "scale", "qscale_weight"}, scaled,
    ),
    "_blocks": ({"_scales"}, gpt_oss),
}  # fmt: skip
_PLAIN = {"bias"}
_CT_FORMATS = (
    "dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision",
)  # fmt: skip
METHODS = ("fp8", "mxfp4", "mxfp8", "compressed-tensors", "gptq", "awq", "modelopt")


def read_quantization(config: Any, folder: Path) -> dict[str, Any] | None:
    """Return how a checkpoint says that it is quantized, None if it is not; MoecError for what is not understood."""
    raw = getattr(config, "quantization_config", None)
    if raw is None:
        raw = getattr(config.get_text_config(decoder=True), "quantization_config", None)
    where = folder / "config.json"
    if raw is None and (folder / "hf_quant_config.json").is_file():
        where = folder / "hf_quant_config.json"
        raw = _modelopt(where)
    if raw is None:
        return None
    found = dict(raw if isinstance(raw, dict) else raw.to_dict())
    found["quant_method"] = str(found.get("quant_method")).replace("_", "-").removesuffix("-fp4").removesuffix("-mxfp8")
    reason = _not_understood(found)
    if reason:
        raise MoecError(reason[0], where=str(where), todo=reason[1])
    return found


def _modelopt(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {"quant_method": "modelopt", **content["quantization"]}
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise MoecError(
            f"the file has no `quantization`: {error}", where=str(file), todo="remove or repair it"
        ) from None


def _not_understood(found: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return what in a quantization_config is not understood, and what to do; None if all is."""
    method = found["quant_method"]
    if method not in METHODS:
        return (
            f"weights quantized with {method!r} are not understood",
            f"quant_method can be {', '.join(METHODS)}; or give an unquantized checkpoint",
        )
    if method == "awq" and str(found.get("version", "gemm")).lower() != "gemm":
        return f"AWQ weights of version {found['version']!r} are not understood", "version gemm is"
    format = str(found.get("checkpoint_format") or "gptq")
    if method == "gptq" and format not in ("gptq", "gptq_v2"):
        return f"GPTQ weights with checkpoint_format {format!r} are not understood", "gptq and gptq_v2 are"
    formats = [found.get("format"), *(g.get("format") for g in (found.get("config_groups") or {}).values())]
    strange = [f for f in formats if f not in (None, *_CT_FORMATS)]
    if method == "compressed-tensors" and strange:
        return (
            f"compressed tensors with format {strange[0]!r} are not understood",
            f"there are {', '.join(_CT_FORMATS)}",
        )
    if method == "compressed-tensors" and (found.get("sparsity_config") or {}).get("format", "dense") != "dense":
        return f"sparsity_config {found['sparsity_config']['format']!r} is not understood", "save the model as dense"
    if found.get("transform_config"):
        return "transform_config is not understood: weights were rotated", "save the model without transforms"
    return None


def stored_tensors(
    checkpoint: Checkpoint, wanted: Iterable[str], quantization: Mapping[str, Any] | None
) -> dict[str, Recipe]:
    """Return the stored weights that can matter, by name: those of the wanted layers and those outside of layers.

    A name that ends with a number may be outside of layers and belong to another layer than that of the number.

    MoecError names a tensor of a quantized module that is not understood.
    """
    numbers = {first_number(name) for name in wanted} | {None}
    modules: dict[str, dict[str, Tensor]] = {}
    for name, info in checkpoint.tensors.items():
        if first_number(name) in numbers or name.rpartition(".")[2].isdigit():
            module, leaf = _split(name)
            modules.setdefault(module, {})[leaf] = Tensor(name, info.type)
    found: dict[str, Recipe] = {}
    for module, leaves in modules.items():
        found |= _weights(module, leaves, quantization, checkpoint)
    return found


def _split(name: str) -> tuple[str, str]:
    """Return the module and the leaf of a tensor name; the parts of gpt-oss' experts count as leaves of a weight."""
    for leaf in ("_blocks", "_scales"):
        if name.endswith(leaf):
            return name.removesuffix(leaf), leaf
    module, _, leaf = name.rpartition(".")
    return module, leaf


def _weights(
    module: str, leaves: Mapping[str, Tensor], quantization: Mapping[str, Any] | None, checkpoint: Checkpoint
) -> dict[str, Recipe]:
    """Return the weights of a module: that which its codes make, and tensors that are what they are."""
    codes = next((leaf for leaf, (beside, _) in LAYOUTS.items() if leaf in leaves and beside & leaves.keys()), None)
    plain = {leaf: t for leaf, t in leaves.items() if leaf not in UNUSED}
    if codes is None:
        return {(t.name): t for t in plain.values()}
    beside, layout = LAYOUTS[codes]
    if quantization is None:
        raise MoecError(
            f"{leaves[codes].name} has scales, but config.json has no quantization_config",
            where=str(checkpoint.folder / "config.json"),
            todo="the config of another checkpoint? Copy the one that belongs to the weights",
        )
    parts = {leaf: t for leaf, t in plain.items() if leaf == codes or leaf in beside}
    others = {leaf: t for leaf, t in plain.items() if leaf not in parts}
    strange = next((t.name for leaf, t in others.items() if leaf not in _PLAIN and codes != "_blocks"), None)
    if strange:
        raise MoecError(
            f"{strange} beside {leaves[codes].name} is not understood",
            where=str(checkpoint.tensors[strange].file),
            todo="this way of quantizing is not supported: give an unquantized checkpoint",
        )
    if quantization["quant_method"] == "awq" and codes == "qweight":
        layout = awq
    elif codes == "weight_packed" and leaves[codes].type.dtype == "u8":
        layout = float4
    shape = leaves.get("weight_shape")
    sizes = tuple(checkpoint.read(shape.name).tolist()) if shape is not None and layout is packed_integers else None
    stored = Stored(parts, quantization, sizes, lambda name: checkpoint.read(name))
    name = module if codes == "_blocks" else f"{module}.weight"
    return {name: _decoded(layout, stored, parts[codes].name, checkpoint), **{t.name: t for t in others.values()}}


def _decoded(layout: Layout, stored: Stored, name: str, checkpoint: Checkpoint) -> Recipe:
    try:
        return layout(stored)
    except (ValueError, KeyError) as error:
        what = f"a tensor {error} is missing" if isinstance(error, KeyError) else str(error)
        todo = "config.json does not belong to the weights, or this layout is not supported"
        raise MoecError(
            f"{name} is not understood: {what}", where=str(checkpoint.tensors[name].file), todo=todo
        ) from None


def layer_types(checkpoint: Checkpoint) -> Callable[[int], Hashable]:
    """Return a function that says how the tensors of a layer are stored: layers stored alike get the same answer."""
    found: dict[int | None, list[tuple[str, TensorType]]] = {}
    for name, info in checkpoint.tensors.items():
        number = first_number(name)
        if number is not None:
            found.setdefault(number, []).append((name.partition(f"{number}.")[2], info.type))
    kinds = {number: tuple(sorted(own, key=lambda item: item[0])) for number, own in found.items()}
    return lambda layer: kinds.get(layer)


# --- a config without weights --------------------------------------------------------------------------------------


def expected_quantized(
    model: Any, stored: Mapping[str, Recipe], quantization: Mapping[str, Any], where: Path
) -> dict[str, Recipe]:
    """Return the tensors of a quantized checkpoint that is not at hand: FP8 blocks, or the MXFP4 of gpt-oss."""
    skipped = (*(quantization.get("modules_to_not_convert") or ()), "lm_head")
    modules = dict(model.named_modules())
    found = dict(stored)
    block = quantization.get("weight_block_size")
    if quantization["quant_method"] not in ("fp8", "mxfp4") or (quantization["quant_method"] == "fp8" and not block):
        raise MoecError(
            f"a config alone does not say how weights of {quantization['quant_method']} are stored",
            where=str(where),
            todo="put the safetensors files beside config.json",
        )
    for name, recipe in stored.items():
        owner = name.removesuffix(".weight")
        if block and len(recipe.type.shape) == 2 and not any(s in owner for s in skipped):
            if isinstance(modules.get(owner), torch.nn.Linear) or ".experts." in name:
                n, k = recipe.type.sizes
                scales = TensorType.of("f32", math.ceil(n / block[0]), math.ceil(k / block[1]))
                items = (Tensor(name, TensorType.of("f8e4m3", n, k)), Tensor(f"{name}_scale_inv", scales))
                found[name] = step("dequantize", *items, block=tuple(block))
        elif not block and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            count, k, n = recipe.type.sizes
            types = {
                "_blocks": TensorType.of("u8", count, n, k // 32, 16),
                "_scales": TensorType.of("u8", count, n, k // 32),
            }
            parts = {leaf: Tensor(f"{name}{leaf}", type_) for leaf, type_ in types.items()}
            found[name] = gpt_oss(Stored(parts, quantization, None, lambda name: torch.empty(0)))
    return found
