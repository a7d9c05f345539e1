"""Tuning files of the fused-MoE Triton kernels of vLLM and SGLang, from the same search as moec's own kernels.

Both engines look for `E=64,N=1024,device_name=NVIDIA_H200.json` (dtype and block shape in the name for quantized
weights): E experts, N the numbers between an expert's two products, on the device that torch names so. The file says
for numbers of tokens M which tile, how many rows of tiles run side by side, warps and stages. Their kernel multiplies
by one matrix at a time, so what is searched is the product without the activation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from .chip import Profile
from .choices import Tile
from .experts_touched import expected_tiles
from .kernels_experts import Experts, grouped_up
from .kinds_experts import touched
from .search import Fit, Kernel, row_choices, search, shapes

TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)
DEVICES: Mapping[str, str] = {  # profile -> torch.cuda.get_device_name() as the engines' own files spell it
    "nvidia-h100": "NVIDIA_H100_80GB_HBM3",
    "nvidia-h200": "NVIDIA_H200",
    "nvidia-h20": "NVIDIA_H20",
    "nvidia-b200": "NVIDIA_B200",
    "nvidia-gb200": "NVIDIA_GB200",
    "nvidia-rtx4090": "NVIDIA_GeForce_RTX_4090",
    "nvidia-rtx5090": "NVIDIA_GeForce_RTX_5090",
    "nvidia-rtxpro6000": "NVIDIA_RTX_PRO_6000_Blackwell_Workstation_Edition",
    "amd-mi300x": "AMD_Instinct_MI300X",
    "amd-mi355x": "AMD_Instinct_MI355X",
}
GROUP_LIMIT = 16  # rows of tiles side by side at most: their columns of the weight are read once from the cache
TRITON = "3.4.0"  # the version of the folder that SGLang looks into


def file_name(engine: str, e: Experts, device: str) -> str | None:
    """Return the name of the tuning file of an engine; None for a weight format that its kernel does not have."""
    block = "[128,128]" if engine == "vllm" else "[128, 128]"
    match e.up.format:
        case "bf16":
            suffix = ""
        case "fp8_b128":
            suffix = f",dtype=fp8_w8a8,block_shape={block}"
        case name if name.startswith(("int4", "uint4")):
            suffix = ",dtype=int4_w4a16"
        case _:
            return None
    return f"E={e.experts},N={e.inner},device_name={device}{suffix}.json"


def entries(e: Experts, profile: Profile, tokens: tuple[int, ...] = TOKENS) -> dict[str, dict[str, int]]:
    """Return what a file says for each number of tokens."""
    product = replace(e, gated=False, inner=e.up.rows, act="identity")
    fits: dict[Tile, Fit] = {}
    return {str(count): _entry(_tile(product, profile, count, fits), e, count) for count in tokens}


def _tile(product: Experts, profile: Profile, tokens: int, fits: dict[Tile, Fit]) -> Tile:
    kernel = Kernel(
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


def engine_files(problems: Iterable[Experts], profile: Profile) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (path, content) of the files for all routed experts of a model; none for a chip that the engines' kernel
    does not run on."""
    device = DEVICES.get(profile.name)
    done: set[str] = set()
    for e in problems:
        names = {engine: file_name(engine, e, device) if device else None for engine in ("vllm", "sglang")}
        if names["vllm"] is None or names["vllm"] in done:
            continue
        done.add(names["vllm"])
        content = entries(e, profile)
        yield f"vllm/{names['vllm']}", content
        yield f"sglang/triton_{TRITON.replace('.', '_')}/{names['sglang']}", content
