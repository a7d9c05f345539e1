"""Imports a GGUF file: llama.cpp's names for weights; gguf_config.py has the config.

Only architectures whose converter is known to leave the numbers as they are (or, for llama, to reorder the rows of q
and k) are read; a tensor without a place in the model is an error.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from ...errors import MoecError
from ...ir.code_steps import BLOCKS
from ...ir.module import Module
from ...ir.recipes import Recipe, Tensor, step
from ...weights.sources.gguf import Gguf, open_gguf
from ..replaced.stand_ins import StandIn
from ..skeleton import build
from ..stored.stored import first_number, layer_types
from ..transformers.model import import_model
from .config import gguf_config
from .rope import FREQUENCIES

REORDERED = ("llama",)  # the rows of q and k lie as interleaved rope wants them (convert_hf_to_gguf.py, permute)

# a part of a name of transformers -> llama.cpp's; the order matters
_NAMES = (
    (r"^model\.embed_tokens\.", "token_embd."), (r"^model\.norm\.", "output_norm."), (r"^lm_head\.", "output."),
    (r"^model\.layers\.", "blk."), (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."), (r"\.self_attn\.o_proj\.", ".attn_output."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn_\1."), (r"\.self_attn\.([qk])_norm\.", r".attn_\1_norm."),
    (r"\.mlp\.gate\.", ".ffn_gate_inp."), (r"\.mlp\.shared_expert_gate\.", ".ffn_gate_inp_shexp."),
    (r"\.mlp\.shared_expert\.(gate|up|down)_proj\.", r".ffn_\1_shexp."),
    (r"\.mlp\.experts\.(gate_up|down)_proj$", r".ffn_\1_exps.weight"), (r"\.mlp\.(gate|up|down)_proj\.", r".ffn_\1."),
)  # fmt: skip


def import_gguf(file: Path, name: str, replaced: list[StandIn] | None = None) -> tuple[Module, Gguf]:
    """Return the module of a GGUF file and the opened file; config.json is read where it lies beside it.

    `replaced` gets what code of transformers functions of moec stand for.
    """
    opened = open_gguf(file)
    config = gguf_config(opened, file)
    kinds, types = layer_types(opened.checkpoint), opened.kinds

    def stored_as(layer: int) -> Hashable:
        return kinds(layer), tuple(
            sorted((n.partition(".")[2].partition(".")[2], k) for n, k in types.items() if first_number(n) == layer)
        )

    mapper = lambda wanted: gguf_parameters(wanted, opened, config, file)  # noqa: E731
    return import_model(build(config), mapper, name, replaced, stored_as), opened


def gguf_parameters(wanted: list[str], opened: Gguf, config: Any, file: Path) -> dict[str, Recipe]:
    """Return a recipe for each wanted parameter that the file has; MoecError for a tensor that none is made of."""
    architecture = str(opened.metadata["general.architecture"])
    found = {w: r for w in wanted if (r := _recipe(w, opened, config, architecture)) is not None}
    _check_all_used(opened, wanted, found, file)
    return found


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a parameter of transformers."""
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _recipe(name: str, opened: Gguf, config: Any, architecture: str) -> Recipe | None:
    """Return how a parameter is made; None where the file has no tensor for it."""
    theirs = gguf_name(name)
    if "ffn_gate_up_exps" in theirs:
        halves = [_numbers(theirs.replace("gate_up", half), opened) for half in ("gate", "up")]
        return step("concat", *halves, axis=1) if all(h is not None for h in halves) else None  # type: ignore[arg-type]
    found = _numbers(theirs, opened)
    if found is None:
        return None
    if "ffn_gate_inp_shexp" in theirs and len(found.type.shape) == 1:
        return step("reshape", found, shape=(1, *found.type.sizes))
    if architecture in REORDERED and (part := re.search(r"attn_([qk])\.", theirs)):
        heads = config.num_attention_heads if part[1] == "q" else config.num_key_value_heads
        return _half_rotated(found, heads)
    return found


def _half_rotated(found: Recipe, heads: int) -> Recipe:
    """Return the rows of each head with the first elements of all pairs first, as transformers has them."""
    rows, *rest = found.type.sizes
    pairs = step("reshape", found, shape=(heads, rows // heads // 2, 2, *rest))
    turned = step("transpose", pairs, perm=(0, 2, 1, *range(3, 3 + len(rest))))
    return step("reshape", turned, shape=(rows, *rest))


def _numbers(name: str, opened: Gguf) -> Recipe | None:
    """Return a tensor of the file as numbers."""
    info = opened.checkpoint.tensors.get(name)
    if info is None:
        return None
    tensor = Tensor(name, info.type)
    return tensor if name not in opened.kinds else dequantized(tensor, opened.kinds[name])


def dequantized(tensor: Tensor, kind: str) -> Recipe:
    """Return the numbers of a tensor of blocks."""
    block = BLOCKS[kind]
    parts = ("codes", "scales", *(["minimums"] if block.minimums else []))
    codes, *others = (step("blocks", tensor, of=kind, part=part) for part in parts)
    shape = (*(1 for _ in tensor.type.shape[1:]), block.group)
    if block.element != "int":
        return step("dequantize", step("decode", codes, of=block.element), *others, block=shape)
    return step("dequantize", codes, *others, block=shape, bits=block.bits)


def _check_all_used(opened: Gguf, wanted: list[str], found: Mapping[str, Recipe], file: Path) -> None:
    """Raise MoecError for a tensor of a wanted layer, or outside of layers, that no parameter is made of."""
    from ...ir.recipes import tensors

    numbers = {first_number(name) for name in wanted} | {None}
    used = {t.name for recipe in found.values() for t in tensors(recipe)}
    left = [n for n in opened.checkpoint.tensors if first_number(n) in numbers and n not in used and n != FREQUENCIES]
    if left:
        raise MoecError(
            f"the tensor {left[0]} has no place in the model"
            + (f", nor have {len(left) - 1} more" if left[1:] else ""),
            where=str(file),
            todo="this variant of the architecture is not understood: give the safetensors checkpoint",
        )
