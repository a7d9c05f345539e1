"""Imports a GGUF file: llama.cpp's names for weights; config.py has the config.

Only architectures whose converter is known to leave the numbers as they are (or, for llama, to reorder the rows of q
and k) are read; a tensor without a place in the model is an error.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import MoecError
from ...ir.module import Module
from ...ir.recipes import Recipe, Tensor, tensors_of
from ...weights.ggml import BLOCKS
from ...weights.sources.gguf import Gguf, open_gguf
from ...weights.steps.table import step
from ..replaced.stand_ins import StandIn
from ..skeleton import build_skeleton
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

    skeleton = build_skeleton(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.model.state_dict().items()}
    mapper = lambda wanted: gguf_parameters({w: shapes[w] for w in wanted}, opened, config, file)  # noqa: E731
    return import_model(skeleton, mapper, name, replaced, stored_as), opened


def gguf_parameters(wanted: Mapping[str, tuple[int, ...]], opened: Gguf, config: Any, file: Path) -> dict[str, Recipe]:
    """Return a recipe for each wanted parameter, given with its shape; a tied head may be missing.

    MoecError for a tensor that is missing or of another shape, and for one that no parameter is made of.
    """
    architecture = str(opened.metadata["general.architecture"])
    found = {
        w: r for w, s in wanted.items() if (r := _parameter_recipe(w, s, opened, config, architecture)) is not None
    }
    left = _unused_tensors(opened, list(wanted), found)
    lacking = next((w for w in wanted if w not in found and gguf_name(w) != "output.weight"), None)
    if lacking is not None:
        raise _missing_tensor(gguf_name(lacking), file, left)
    if left:
        raise MoecError(
            f"the tensor {left[0]} has no place in the model"
            + (f", nor have {len(left) - 1} more" if left[1:] else ""),
            where=str(file),
            todo="this variant of the architecture is not understood: give the safetensors checkpoint",
        )
    return found


def _missing_tensor(name: str, file: Path, left: Sequence[str] = ()) -> MoecError:
    unread = f", and {left[0]} has no place in the model" if left else ""
    return MoecError(
        f"the file has no tensor {name}{unread}", where=str(file), todo="is a part missing? Download it again"
    )


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a parameter of transformers."""
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _parameter_recipe(name: str, shape: tuple[int, ...], opened: Gguf, config: Any, architecture: str) -> Recipe | None:
    """Return how a parameter is made; None where the file has no tensor for it."""
    theirs = gguf_name(name)
    if "ffn_gate_up_exps" in theirs:
        if theirs in opened.checkpoint.tensors:  # gate first
            return _tensor_recipe(theirs, shape, opened)
        half = (shape[0], shape[1] // 2, *shape[2:])
        gate, up = (_stacked_experts(theirs.replace("gate_up", part), half, opened) for part in ("gate", "up"))
        return step("concat", gate, up, axis=1) if gate is not None and up is not None else None
    if "_exps." in theirs:
        return _stacked_experts(theirs, shape, opened)
    if "ffn_gate_inp_shexp" in theirs and theirs in opened.checkpoint.tensors:
        stored = opened.checkpoint.tensors[theirs].type
        found = _tensor_recipe(theirs, shape if len(stored.shape) == 2 else shape[1:], opened)
        return found and step("reshape", found, shape=shape)
    found = _part_of_qkv(theirs, shape, opened, config) or _tensor_recipe(theirs, shape, opened)
    if found is not None and architecture in REORDERED and (part := re.search(r"attn_([qk])\.", theirs)):
        heads = config.num_attention_heads if part[1] == "q" else config.num_key_value_heads
        return _half_rotated(found, heads)
    return found


def _stacked_experts(name: str, shape: tuple[int, ...], opened: Gguf) -> Recipe | None:
    """Return a matrix of all experts, which old files hold in a tensor for each."""
    first = name.replace("_exps.", ".0.")
    if name in opened.checkpoint.tensors or first not in opened.checkpoint.tensors:
        return _tensor_recipe(name, shape, opened)
    each = []
    for own in (name.replace("_exps.", f".{i}.") for i in range(shape[0])):
        one = _tensor_recipe(own, shape[1:], opened)
        if one is None:
            raise _missing_tensor(own, opened.checkpoint.folder)
        each.append(one)
    return step("stack", *each)


def _part_of_qkv(name: str, shape: tuple[int, ...], opened: Gguf, config: Any) -> Recipe | None:
    """Return queries, keys or values of a tensor that holds them behind each other; None where there is none."""
    part = re.search(r"attn_([qkv])\.", name)
    if part is None or name in opened.checkpoint.tensors:
        return None
    groups = config.num_attention_heads // config.num_key_value_heads
    keys = shape[0] if part[1] != "q" else shape[0] // groups
    start = {"q": 0, "k": groups * keys, "v": (groups + 1) * keys}[part[1]]
    fused = _tensor_recipe(name.replace(part[0], "attn_qkv."), ((groups + 2) * keys, *shape[1:]), opened)
    return fused and step("slice", fused, axis=0, start=start, stop=start + shape[0])


def _half_rotated(found: Recipe, heads: int) -> Recipe:
    """Return the rows of each head with the first elements of all pairs first, as transformers has them."""
    rows, *rest = found.type.sizes
    pairs = step("reshape", found, shape=(heads, rows // heads // 2, 2, *rest))
    turned = step("transpose", pairs, perm=(0, 2, 1, *range(3, 3 + len(rest))))
    return step("reshape", turned, shape=(rows, *rest))


def _tensor_recipe(name: str, shape: tuple[int, ...], opened: Gguf) -> Recipe | None:
    """Return a tensor of the file as numbers; MoecError where it has another shape."""
    info = opened.checkpoint.tensors.get(name)
    if info is None:
        return None
    found: Recipe = Tensor(name, info.type)
    if name in opened.kinds:
        found = dequantize_blocks(Tensor(name, info.type), opened.kinds[name])
    if found.type.sizes != shape:
        raise MoecError(
            f"the tensor {name} has the shape {list(found.type.sizes)}; the model wants {list(shape)}",
            where=str(info.file),
            todo="the metadata, or config.json beside the file, does not belong to the weights",
        )
    return found


def dequantize_blocks(tensor: Tensor, kind: str) -> Recipe:
    """Return the numbers of a tensor of blocks."""
    block = BLOCKS[kind]
    parts = ("codes", "scales", *(["minimums"] if block.minimums else []))
    codes, *others = (step("blocks", tensor, of=kind, part=part) for part in parts)
    shape = (*(1 for _ in tensor.type.shape[1:]), block.group)
    if block.element != "int":
        return step("dequantize", step("decode", codes, of=block.element), *others, block=shape)
    return step("dequantize", codes, *others, block=shape, bits=block.bits)


def _unused_tensors(opened: Gguf, wanted: list[str], found: Mapping[str, Recipe]) -> list[str]:
    """Return the tensors of the wanted layers, and those outside of layers, that no parameter is made of."""
    numbers = {first_number(name) for name in wanted} | {None}
    used = {t.name for recipe in found.values() for t in tensors_of(recipe)}
    return [n for n in opened.checkpoint.tensors if first_number(n) in numbers and n not in used and n != FREQUENCIES]
