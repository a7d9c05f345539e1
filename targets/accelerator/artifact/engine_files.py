"""Tuning files of the fused-MoE Triton kernels of vLLM and SGLang, from the same search as moec's own kernels.

Both engines look for `E=64,N=1024,device_name=NVIDIA_H200.json` (dtype and block shape in the name for quantized
weights): E experts, N the values between an expert's two matmuls, on the device that torch names so. The file says
for numbers of tokens M which tile, how many rows of tiles run side by side, warps and stages. Their kernel multiplies
by one matrix at a time, so what is searched is the matmul without the activation. The engines run the checkpoint as it is:
FP8 weights with one scale for a tensor or a row are FP8 in the name, whatever format moec's own kernels read them in.

The files are predictions and take the place of the engines' own choices, so that they are written only when asked for.
Both engines read numbers of tokens as keys and nothing else: that they are predicted stands in a file beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from ....compiler.ir.activation import IDENTITY
from ....compiler.ir.module import Module
from ....compiler.ir.notes import Note, distinct_notes
from ....compiler.ir.recipes import Recipe, steps_of
from ....compiler.version import __version__
from ..chip.chip import Profile
from ..kernels.choices import Tile
from ..kernels.experts import Experts, grouped_up
from ..kernels.order import axis_of_tiles
from ..predict.experts_touched import expected_tiles
from ..select.experts import experts_of, touched_shares
from ..select.search import GROUPS, Fit, KernelTemplate, row_choices, search_tile, tile_shapes
from ..tile.machine import chip_of, layout_of
from ..tile.packing import Packing
from .options import Tuning

TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)
DEVICES: Mapping[str, str] = {  # profile -> torch.cuda.get_device_name() as the engines' own files spell it
    "nvidia-h100": "NVIDIA_H100_80GB_HBM3",
    "nvidia-h200": "NVIDIA_H200",
    "nvidia-a100": "NVIDIA_A100-SXM4-80GB",
    "nvidia-h20": "NVIDIA_H20",
    "nvidia-h20-3e": "NVIDIA_H20-3e",
    "nvidia-h800": "NVIDIA_H800",
    "nvidia-l40s": "NVIDIA_L40S",
    "nvidia-b200": "NVIDIA_B200",
    "nvidia-b300": "NVIDIA_B300_SXM6_AC",
    "nvidia-gb200": "NVIDIA_GB200",
    "nvidia-gb300": "NVIDIA_GB300",
    "nvidia-gb10": "NVIDIA_GB10",
    "nvidia-rtx6000ada": "NVIDIA_RTX_6000_Ada_Generation",
    "nvidia-rtx4090": "NVIDIA_GeForce_RTX_4090",
    "nvidia-rtx5090": "NVIDIA_GeForce_RTX_5090",
    "nvidia-rtxpro6000": "NVIDIA_RTX_PRO_6000_Blackwell_Workstation_Edition",
    "amd-mi300x": "AMD_Instinct_MI300X",
    "amd-mi325x": "AMD_Instinct_MI325X",
    "amd-mi350x": "AMD_Instinct_MI350X",
    "amd-mi355x": "AMD_Instinct_MI355X",
}
NOT_ASKED = "no tuning files of vLLM or SGLang were written: they would be predictions, and -D engines=vllm,sglang asks for them"
TRITON = "3.4.0"  # the version of the folder that SGLang looks into
FOLDERS = {"vllm": "vllm", "sglang": f"sglang/configs/triton_{TRITON.replace('.', '_')}"}


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


@dataclass(frozen=True)
class Shard:
    """The experts of one device: one part of `experts` of all of them, one part of `inner` of each one's values."""

    experts: int = 1
    inner: int = 1


def find_shard(engine: str, e: Experts, tuning: Tuning) -> Shard | str:
    """Return what one device has of the experts, or why an engine does not divide them so.

    vLLM with expert parallelism gives whole experts to all tp x dp ranks. SGLang parts its tp ranks into ep groups, each
    of which divides its experts' values over the rest.
    """
    tp, ep = tuning.tp, tuning.ep
    if engine == "vllm":
        if ep > 1 and ep % tp:
            return f"its ep is 1 or a multiple of tp, not ep={ep} with tp={tp}"
        shard = Shard(ep, tp if ep == 1 else 1)
    else:
        if tp % ep:
            return f"its ep divides tp, ep={ep} does not divide tp={tp}"
        shard = Shard(ep, tp // ep)
    least = 128 if e.up.format == "fp8_b128" else 1
    if e.experts % shard.experts or e.inner % (shard.inner * least):
        return f"{e.experts} experts of {e.inner} values cannot be divided over tp={tp}, ep={ep}"
    return shard


def file_name(engine: str, p: Problem, device: str, shard: Shard = Shard()) -> str | None:
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
    return f"E={e.experts // shard.experts},N={e.inner // shard.inner},device_name={device}{suffix}.json"


def tuning_entries(p: Problem, profile: Profile, shard: Shard) -> dict[str, dict[str, int]]:
    """Return what a file says for each number of tokens."""
    e = p.experts
    if p.scale and e.up.columns % 128 == 0:  # as FP8 tiles are read, with any number of scales
        e = replace(e, up=replace(e.up, format="fp8_b128"))
    fits: dict[Tile, Fit] = {}
    return {str(count): _tuning_entry(_tile_for_device(e, shard, profile, count, fits), e, profile) for count in TOKENS}


def _tile_for_device(e: Experts, shard: Shard, profile: Profile, tokens: int, fits: dict[Tile, Fit]) -> Tile:
    """Return the tile for the experts of one device, which get their share of the pairs of all tokens."""
    own, rows = e.experts // shard.experts, e.up.rows // shard.inner
    alone = replace(e, experts=own, inner=rows, act=IDENTITY, up=replace(e.up, experts=own, rows=rows))
    kernel = KernelTemplate(
        "fused_moe", lambda t, layout: grouped_up(alone, t, layout), {"T": tokens},
        tile_shapes(row_choices(tokens * e.chosen / e.experts), e.up.step),
        lambda t: axis_of_tiles(t.group, expected_tiles(e.experts, e.chosen, tokens, t.m) / shard.experts),
        touched_shares(e, "up", tokens), GROUPS,
    )  # fmt: skip
    return search_tile(kernel, profile, fits).best.tile


def _tuning_entry(tile: Tile, e: Experts, profile: Profile) -> dict[str, int]:
    """Return a tile as the engines' kernel takes it, which keeps operands in shared memory as they are multiplied."""
    layout = layout_of(profile, tile.m)
    room = chip_of(profile, layout).capacity[layout.first[0]]
    buffer = (tile.m + tile.n) * tile.k * (1 if e.up.format == "fp8_b128" else 2)
    return {
        "BLOCK_SIZE_M": tile.m,
        "BLOCK_SIZE_N": tile.n,
        "BLOCK_SIZE_K": tile.k,
        "GROUP_SIZE_M": tile.group,
        "num_warps": tile.warps,
        "num_stages": max(2, min(tile.stages, 1 + room // buffer)),
    }


def engine_files(
    problems: Iterable[Problem], profile: Profile, tuning: Tuning
) -> tuple[dict[str, Mapping[str, Any]], tuple[Note, ...]]:
    """Return the files for all routed experts of a model by their paths, and notes: what is left out, and what they are.

    Where no engine is asked for there are no files, and one note says so for chips that the engines run on.
    """
    if not tuning.engines:
        left_out = any(True for _ in problems) and profile.name in DEVICES
        return {}, (Note(NOT_ASKED),) if left_out else ()
    device = tuning.device or DEVICES.get(profile.name)
    files: dict[str, Mapping[str, Any]] = {}
    made: dict[tuple[Problem, Shard], Mapping[str, Any]] = {}
    notes: list[Note] = []
    for engine, p in product(tuning.engines, problems):
        shard, reason = find_shard(engine, p.experts, tuning), ""
        if device is None:
            reason = f"what it calls {profile.name} is not known, or it does not run on it (-D device=NAME says it)"
        elif isinstance(shard, str):
            reason = shard
        elif (name := file_name(engine, p, device, shard)) is None:
            reason = f"its fused-MoE kernel has no weights in {p.experts.up.format}"
        else:
            if (p, shard) not in made:
                made[p, shard] = tuning_entries(p, profile, shard)
            files.setdefault(f"{FOLDERS[engine]}/{name}", made[p, shard])
            continue
        notes.append(Note(f"no tuning file of {engine} for experts of {p.experts.up.format}: {reason}"))
    if files:
        notes.append(
            Note("the tuning files in engines/ are predicted, not measured, and replace the engine's own choices")
        )
    return files, distinct_notes(notes)


def introduction_text(target: str) -> str:
    """Return the text of the file beside the tuning files, which says what they are."""
    return f"""# Predicted tuning files

These files for the fused-MoE kernels of vLLM and SGLang were predicted by moec {__version__} from what is known of
{target}; nobody has measured them. They take the place of the engine's own choice of tiles: compare both, with
benchmarks/kernels/benchmark_moe.py of vLLM or benchmark/kernels/fused_moe_triton of SGLang, before you keep them.

    VLLM_TUNED_CONFIG_FOLDER=$PWD/vllm vllm serve ...
    SGLANG_MOE_CONFIG_DIR=$PWD/sglang python -m sglang.launch_server ...
"""
