"""Which tensors of a checkpoint are a model's layers, how each layer is stored, and what is left that should not be."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

from ...errors import MoecError
from ...weights.sources.checkpoint import Checkpoint, around_number, first_number
from .layers import find_layers
from .names import Rules
from .other_names import canonical_name, piece_of

# config keys that announce layers behind num_hidden_layers: they draft tokens
_DRAFTING = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules")
# modules that layers which draft tokens have and others do not: DeepSeek's names, which others took over
_DRAFTS = re.compile(r"\.(eh_proj|enorm|hnorm|e_proj|h_proj|shared_head|final_layernorm)\.")
# tensors of adapters (LoRA and its kin) that were not merged into the weights
_ADAPTER = re.compile(
    r"\.(lora_(A|B|down|up|embedding_A|embedding_B|magnitude_vector)|base_layer|modules_to_save|original_module|ia3_l|hada_w[12]_[ab]|lokr_w[12](_[ab])?|oft_[rR]|vera_lambda_[bd])(\.|$)"
)


def layer_prefixes(model: Any, names: Iterable[str]) -> set[str]:
    """Return what stands before the layer's number in the names of the tensors of the decoder's layers."""
    place = f"{find_layers(model)[0]}."
    rules = Rules(model)
    known = {canonical_name(key) for key in rules.state if key.startswith(place)}
    examples: dict[str, dict[str, str]] = {}
    for name in names:
        if first_number(name) is not None:
            prefix, _ = around_number(name)
            examples.setdefault(prefix, {}).setdefault(re.sub(r"\d+", "#", name), name)
    found = set()
    for prefix, own in examples.items():
        for name in own.values():
            target = rules.find(name)
            if (target is not None and target[0].startswith(place)) or canonical_name(name) in known:
                found.add(prefix)
                break
    return found


def layer_storage(stored: Mapping[str, Hashable], prefixes: set[str]) -> Callable[[int], Hashable]:
    """Return a function that says how the weights of a layer are named and stored: layers stored alike get the same.

    `stored` tells of each weight how it is stored, equal for weights stored alike.
    """
    found: dict[int, list[tuple[str, Hashable]]] = {}
    for name, kind in stored.items():
        number = first_number(name)
        before, behind = around_number(name)
        if number is not None and before in prefixes:
            found.setdefault(number, []).append((f"{before}{{layer}}{behind}", kind))
    kinds = {number: tuple(sorted(own, key=lambda item: item[0])) for number, own in found.items()}
    return kinds.get


def check_count(
    config: Any, layers: int, names: Iterable[str], prefixes: set[str], folder: str, model: Any = None
) -> None:
    """Raise MoecError if a checkpoint has layers beyond those that its config announces, drafting ones included.

    Where the config announces layers that draft tokens, a layer after the last counts as such if it has their modules.
    `model` is the transformers model, whose class may name layers that are none of its own.
    """
    config = config.get_text_config(decoder=True)
    drafting = {key: n for key in _DRAFTING if isinstance(n := getattr(config, key, None), int) and n > 0}
    behind: dict[int, list[str]] = {}
    for name in names:
        number = first_number(name)
        if number is not None and number >= layers and around_number(name)[0] in prefixes:
            behind.setdefault(number, []).append(name)
    known = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    announced = layers + max(drafting.values(), default=0)
    beyond = {
        number: own
        for number, own in behind.items()
        if not (number < announced and any(_DRAFTS.search(name) for name in own))
        and not all(any(pattern.search(name) for pattern in known) for name in own)
    }
    if beyond:
        more = "".join(f" and {key} {n}" for key, n in list(drafting.items())[:1])
        total, count = sum(map(len, beyond.values())), len(beyond)
        raise MoecError(
            f"config.json announces num_hidden_layers {layers}{more}, but the checkpoint has {min(beyond[min(beyond)])} "
            f"and {total - 1} more tensors of {count} layer{'s' if count > 1 else ''} beyond",
            where=folder,
            todo="config.json does not belong to the weights: num_hidden_layers must count the layers that are there",
        )


def check_adapter(unread: Iterable[str], folder: str) -> None:
    """Raise MoecError if tensors that the program does not read are those of an adapter."""
    adapter = next((name for name in unread if _ADAPTER.search(name)), None)
    if adapter is not None:
        what = f"{adapter} belongs to an adapter (LoRA or the like) that is not merged into the weights"
        raise MoecError(what, where=folder, todo="merge it first: merge_and_unload() of peft, then save_pretrained")


def missing_parameter(model: Any, checkpoint: Checkpoint, name: str) -> MoecError:
    """Return the error for a parameter that no tensor of the checkpoint makes."""
    check_adapter(checkpoint.tensors, str(checkpoint.folder))
    rules = Rules(model)
    piece = piece_of(canonical_name(name))
    for other in checkpoint.unreadable:
        found, own = rules.find(other), piece_of(canonical_name(other))
        if (found is not None and found[0] == name) or canonical_name(other) == canonical_name(name):
            return checkpoint.lacks(other)
        if piece is not None and own is not None and own.block == piece.block:
            return checkpoint.lacks(other)
    todo = checkpoint.like(name)
    if f"{name}_scales" in checkpoint.tensors:  # experts of gpt-oss: codes and scales in place of a parameter
        todo = f"{name}_scales is there, but {name}_blocks is missing: was it renamed?"
    spelled = _as_siblings(name, checkpoint.tensors) or name
    return MoecError(f"the checkpoint has no tensor for {spelled}", where=str(checkpoint.folder), todo=todo)


def _as_siblings(name: str, names: Iterable[str]) -> str | None:
    """Return the name that a layer's parameter would have in a checkpoint, as the same one of another layer is spelled."""
    number = first_number(name)
    for other in names if number is not None else ():
        spelled = re.sub(r"(?<=\.)\d+(?=\.)", str(number), other, count=1)
        if canonical_name(spelled) == canonical_name(name):
            return spelled
    return None
