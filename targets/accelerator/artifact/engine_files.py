"""Tuning files of the fused-MoE Triton kernels of vLLM and SGLang, from the same search as moec's own kernels.

Both engines look for `E=64,N=1024,device_name=NVIDIA_H200.json` (dtype and block shape in the name for quantized
weights): E experts, N the values between an expert's two matmuls, on the device that torch names so. The file says
for numbers of tokens M which tile, how many rows of tiles run side by side, warps and stages. Their kernel multiplies
by one matrix at a time, so what is searched is the matmul without the activation. The engines run the checkpoint as it is:
FP8 weights with one scale for a tensor or a row are FP8 in the name, whatever format moec's own kernels read them in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ....compiler.ir.activation import IDENTITY
from ....compiler.ir.module import Module
from ....compiler.ir.notes import Note, distinct
from ....compiler.ir.recipes import Recipe, steps_of
from ..chip.chip import Profile
from ..kernels.choices import Tile
from ..kernels.experts import Experts, grouped_up
from ..predict.experts_touched import expected_tiles
from ..select.experts import experts_of, touched
from ..select.search import Fit, KernelTemplate, row_choices, search, shapes
from ..tile.packing import Packing

TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)
DEVICES: Mapping[str, str] = {  # profile -> torch.cuda.get_device_name() as the engines' own files spell it
    "nvidia-h100": "NVIDIA_H100_80GB_HBM3",
    "nvidia-h200": "NVIDIA_H200",
    "nvidia-h20": "NVIDIA_H20",
    "nvidia-b200": "NVIDIA_B200",
    "nvidia-b300": "NVIDIA_B300_SXM6_AC",
    "nvidia-gb200": "NVIDIA_GB200",
    "nvidia-gb10": "NVIDIA_GB10",
    "nvidia-rtx4090": "NVIDIA_GeForce_RTX_4090",
    "nvidia-rtx5090": "NVIDIA_GeForce_RTX_5090",
    "nvidia-rtxpro6000": "NVIDIA_RTX_PRO_6000_Blackwell_Workstation_Edition",
    "amd-mi300x": "AMD_Instinct_MI300X",
    "amd-mi355x": "AMD_Instinct_MI355X",
}
GROUP_LIMIT = 16  # rows of tiles side by side at most: their columns of the weight are read once from the cache
TRITON = "3.4.0"  # the version of the folder that SGLang looks into


@dataclass(frozen=True)
class Problem:
    """Routed experts, and how many of a weight's values share a scale in an FP8 checkpoint: `tensor`, `row` or `` (none do)."""

    experts: Experts
    scale: str = ""


def find_problems(module: Module, weights: Mapping[tuple[str, str], Packing]) -> list[Problem]:
    """Return the routed experts of a module of stage kernel, in order."""
    found = []
    for function in module.functions:
        recipes = {const.value.name: const.recipe for const in function.consts}
        for op in function.ops:
            if op.name == "acc.grouped_up":
                name = next(v.name for v in op.inputs if (function.name, v.name) in weights)
                found.append(Problem(experts_of(op, weights[function.name, name]), _scale_of(recipes.get(name))))
    return found


def _scale_of(recipe: Recipe | None) -> str:
    for step in steps_of(recipe) if recipe else ():
        if step.name == "dequantize" and step.items[0].type.dtype == "f8e4m3":
            block, sizes = step.attributes.get("block"), step.items[0].type.sizes[-2:]
            return "tensor" if block == sizes else "row" if block == (1, sizes[1]) else ""
    return ""


def file_name(engine: str, p: Problem, device: str) -> str | None:
    """Return the name of the tuning file of an engine; None for a weight format that its kernel does not have."""
    block = "[128,128]" if engine == "vllm" else "[128, 128]"
    e = p.experts
    match p.scale, e.up.format:
        case "tensor", _:
            suffix = ",dtype=fp8_w8a8"
        case "row", _:
            suffix = ",dtype=fp8_w8a8" if engine == "vllm" else ",dtype=fp8_w8a8,per_channel_quant=True"
        case _, "bf16":
            suffix = ""
        case _, "fp8_b128":
            suffix = f",dtype=fp8_w8a8,block_shape={block}"
        case _, name if name.startswith(("int4", "uint4")):
            suffix = ",dtype=int4_w4a16"
        case _, name if name.startswith(("int8", "uint8")):
            suffix = ",dtype=int8_w8a16"
        case _:
            return None
    return f"E={e.experts},N={e.inner},device_name={device}{suffix}.json"


def entries(p: Problem, profile: Profile, tokens: tuple[int, ...] = TOKENS) -> dict[str, dict[str, int]]:
    """Return what a file says for each number of tokens."""
    e = p.experts
    if p.scale and e.up.columns % 128 == 0:  # as FP8 tiles are read, with any number of scales
        e = replace(e, up=replace(e.up, format="fp8_b128"))
    product = replace(e, inner=e.up.rows, act=IDENTITY)
    fits: dict[Tile, Fit] = {}
    return {str(count): _entry(_tile(product, profile, count, fits), e, count) for count in tokens}


def _tile(product: Experts, profile: Profile, tokens: int, fits: dict[Tile, Fit]) -> Tile:
    kernel = KernelTemplate(
        "fused_moe", lambda t, layout: grouped_up(product, t, layout), {"T": tokens},
        shapes(row_choices(tokens * product.chosen / product.experts), product.up.step),
        lambda t: {"tile": expected_tiles(product.experts, product.chosen, tokens, t.m)},
        touched(product, "up", tokens),
    )  # fmt: skip
    return search(kernel, profile, fits).best.tile


def _entry(tile: Tile, e: Experts, tokens: int) -> dict[str, int]:
    side_by_side = 1
    while side_by_side < GROUP_LIMIT and side_by_side * tile.m * e.experts < tokens * e.chosen:
        side_by_side *= 2
    return {
        "BLOCK_SIZE_M": tile.m,
        "BLOCK_SIZE_N": tile.n,
        "BLOCK_SIZE_K": tile.k,
        "GROUP_SIZE_M": side_by_side,
        "num_warps": tile.warps,
        "num_stages": max(tile.stages, 2),
    }


def engine_files(
    problems: Iterable[Problem], profile: Profile
) -> tuple[dict[str, Mapping[str, Any]], tuple[Note, ...]]:
    """Return the files for all routed experts of a model by their paths, and notes where experts have no such file."""
    device = DEVICES.get(profile.name)
    files: dict[str, Mapping[str, Any]] = {}
    notes: list[Note] = []
    for p in problems:
        if device is None:
            reason = f"what the engines call {profile.name} is not known, or they do not run on it"
        else:
            names = {engine: file_name(engine, p, device) for engine in ("vllm", "sglang")}
            reason = f"their fused-MoE kernel has no weights in {p.experts.up.format}"
            if names["vllm"] is not None:
                if (path := f"vllm/{names['vllm']}") not in files:
                    files[path] = entries(p, profile)
                    files[f"sglang/triton_{TRITON.replace('.', '_')}/{names['sglang']}"] = files[path]
                continue
        notes.append(Note(f"no tuning files of vLLM and SGLang for experts of {p.experts.up.format}: {reason}"))
    return files, distinct(notes)
