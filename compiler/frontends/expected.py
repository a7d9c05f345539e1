"""The tensors of a quantized checkpoint of which only config.json is at hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import MoecError
from ..ir.recipes import Recipe, Tensor, step
from ..ir.types import TensorType
from .schemes import MXFP4
from .stored.layouts import Stored, gpt_oss


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
                "blocks": TensorType.of("u8", count, n, k // 32, 16),
                "scales": TensorType.of("u8", count, n, k // 32),
            }
            parts = {leaf: Tensor(f"{name}_{leaf}", type_) for leaf, type_ in types.items()}
            found[name] = gpt_oss(Stored(parts, lambda name: torch.empty(0)), MXFP4)
    return found
