"""The tensors of a checkpoint that a program does not read, and which of them are an error.

What another part of the model is made of (a tower for images, blocks that draft tokens) may be left out, and so may what says
nothing about weights. A scale that nothing reads is an error, since codes without it would be plain numbers; so is a tensor
inside a layer that the program runs, since the layer as config.json describes it computes something else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from ...errors import MoecError
from ...ir.module import Module, walk_calls
from ...ir.recipes import FITTED, bind_recipe, tensors_of
from ...ir.types import TensorType
from ...weights.sources.checkpoint import Checkpoint
from ..transformers.names import Rules
from .layouts import FLOATS
from .stored import UNUSED, beside_codes

# leaves of tensors inside of layers that are computed from the config, or say something about training alone
_COMPUTED = {"inv_freq", "original_inv_freq", "masked_bias", "position_ids", "num_batches_tracked", "tokens_per_expert"}
_FP8 = ("f8e4m3", "f8e5m2", "f8e8m0")


def read_tensors(module: Module) -> dict[str, TensorType]:
    """Return every tensor of the checkpoint that any call of any function reads."""
    return {
        tensor.name: tensor.type
        for function, bound in walk_calls(module)
        for const in function.consts
        for tensor in tensors_of(bind_recipe(const.recipe, function.weights, bound))
        if not tensor.name.endswith(FITTED)
    }


def unread_tensors(read: Iterable[str], checkpoint: Checkpoint) -> dict[str, TensorType]:
    """Return the checkpoint's tensors that are not read."""
    known = set(read)
    return {name: info.type for name, info in checkpoint.tensors.items() if name not in known}


def check_unread(read: Mapping[str, Any], checkpoint: Checkpoint, model: Any = None) -> None:
    """Raise MoecError for the first tensor that is not read and should be.

    `model` is the transformers model, whose class names tensors that checkpoints hold and the model has no use for.
    """
    unread = [name for name in unread_tensors(read, checkpoint) if not _is_declared(name, model)]
    if not unread:
        return
    inside = {name for name in read} | {name.rpartition(".")[0] for name in read}
    around = {".".join(parts[:i]) for parts in (name.split(".") for name in read) for i in range(len(parts))}
    spoken_for = beside_codes(checkpoint)
    is_known = _known_to(model, read)
    for name in unread:
        reason = _unread_reason(name, checkpoint, inside, around, name in spoken_for)
        if reason and not is_known(name):
            raise MoecError(
                f"nothing reads the tensor {name}, {reason}",
                where=str(checkpoint.tensors[name].file),
                todo="config.json does not describe this checkpoint, or a tensor was renamed",
            )


def _known_to(model: Any, read: Iterable[str]) -> Callable[[str], bool]:
    """Return a function that says whether a model has a place for a tensor, though the program reads nothing of it.

    That is what a model computes for itself and saves all the same (decays of each place in a block), and what it has for
    images in layers of the text (routers and experts, dealt out to text and images by one conversion).
    """
    rules = cache(lambda: Rules(model))
    made = cache(lambda: {found[0] for name in read if (found := rules().find(name)) is not None})

    def is_known(name: str) -> bool:
        found = rules().find(name) if model is not None else None
        return found is not None and (rules().deals_out(found[1].pattern) or found[0] not in made())

    return is_known


def _is_declared(name: str, model: Any) -> bool:
    leaf = name.rpartition(".")[2]
    if leaf in UNUSED or leaf in _COMPUTED or any(leaf.endswith(f"_{role}") for role in UNUSED):
        return True
    return any(re.search(pattern, name) for pattern in _ignored_patterns(model))


def _ignored_patterns(model: Any) -> Iterable[str]:
    """Return what the classes of a model call unexpected and harmless."""
    for module in (model, getattr(model, "base_model", None)):
        yield from getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()


def _unread_reason(name: str, checkpoint: Checkpoint, inside: set[str], around: set[str], is_part: bool) -> str | None:
    """Return why a tensor has to be read; None for one that lies apart from what is read, or changes nothing."""
    parts = name.split(".")
    root = next((i for i in range(1, len(parts) + 1) if ".".join(parts[:i]) not in around), len(parts))
    in_layer = any(part.isdigit() for part in parts[: root - 1])
    apart = root < len(parts) and not in_layer
    type_ = checkpoint.tensors[name].type
    if "scale" in parts[-1] and not (is_part and apart):
        quantization = re.search(
            r"scale_inv$|scale_2$|^weight_scale|_weight_scale|global_scale$|^qscale|scales$", parts[-1]
        )
        if not apart or quantization:
            owner, tensors = name.rpartition(".")[0], checkpoint.tensors
            beside = [f"{n} ({tensors[n].type})" for n in tensors if n != name and n.rpartition(".")[0] == owner]
            return f"which is a scale: what it belongs to is not what it seems; beside it: {', '.join(beside) or 'nothing'}"
    if apart or type_.dtype not in (*FLOATS, *_FP8) or not type_.elements:
        return None
    if parts[-1] == "bias" and not bool(checkpoint.read(name).float().any()):
        return None  # tools write biases of zeros for modules that have none
    if in_layer:
        return "which lies in a layer that the program runs"
    return "whose module the program reads" if name.rpartition(".")[0] in inside else None
