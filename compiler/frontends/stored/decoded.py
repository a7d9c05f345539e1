"""Stored weights as the formats' own libraries decode them, as a source that recipes can read.

Where a library decodes a weight, moec's own recipe for it is evaluated too, and both have to agree: what a reference
is for. Where none does, moec's recipe makes the numbers, and that is counted, to be said beside the result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from ...errors import MoecError
from ...ir.recipes import Recipe, Step, Tensor, rename_tensors
from ...ir.types import TensorType, expand_range, range_at, range_size
from ...weights.evaluate import evaluate_recipe
from ...weights.sources.checkpoint import Checkpoint
from ...weights.sources.gguf import Gguf
from ...weights.sources.safetensors_header import TensorInfo
from ...weights.sources.source import Box, slice_box
from .format_libraries import Library, gguf_library, library_of

_NEAR, _SMALL = 1e-5, 1e-6  # relative to a number, and to the largest of a weight: f32 arithmetic in another order
_KEPT = 3  # decoded weights that stay in memory: gate and up, or q, k and v
_SUFFIXES = ("_blocks", "_scales")  # of gpt-oss' experts, whose tensors are no leaves of a module

LibraryOf = Callable[[str], Library | str]  # the library for the weight that a tensor of codes belongs to


@dataclass(frozen=True)
class Decoding:
    """Who made the numbers of the codes: how many weights each library decoded and how many moec, and why."""

    libraries: Mapping[str, int]
    own: int
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"libraries": dict(self.libraries), "moec": self.own, **({"reason": self.reason} if self.own else {})}

    def line(self) -> str:
        """Return it as a sentence."""
        named = " and ".join(f"{name} ({count})" for name, count in self.libraries.items())
        if not self.own:
            return f"the weights of the source are decoded by {named}"
        if not named:
            return f"the weights of the source are decoded by moec itself, which this does not check: {self.reason}"
        return (
            f"the weights of the source are decoded by {named}, and {self.own} by moec itself, which this does not "
            f"check: {self.reason}"
        )


@dataclass
class DecodedSource:
    """A checkpoint in which weights are numbers already, under the names of their codes."""

    checkpoint: Checkpoint
    library_of: LibraryOf
    _own: dict[str, Recipe] = field(default_factory=dict)
    _counts: Counter[str] = field(default_factory=Counter)
    _seen: set[str] = field(default_factory=set)
    _reason: str = ""
    _kept: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors of the checkpoint, the decoded ones with the type of their numbers."""
        decoded = {name: TensorInfo(recipe.type) for name, recipe in self._own.items()}
        return MappingProxyType({**self.checkpoint.tensors, **decoded})

    @property
    def decoding(self) -> Decoding:
        """Who has decoded what was read so far."""
        libraries = {name: count for name, count in self._counts.items() if name}
        return Decoding(libraries, self._counts[""], self._reason)

    def with_decoded_weights(self, recipe: Recipe) -> Recipe:
        """Return a recipe that reads numbers where the given one decodes codes."""
        if not isinstance(recipe, Step):
            return recipe
        if recipe.name == "dequantize":
            return self.decoded_tensor(recipe)
        items = tuple(self.with_decoded_weights(item) for item in recipe.items)
        return recipe if items == recipe.items else replace(recipe, items=items)

    def decoded_tensor(self, recipe: Recipe) -> Recipe:
        """Return a tensor in place of a recipe that decodes one weight, named as its codes; others stay."""
        anchor = _first_codes_name(recipe)
        if anchor is None:
            return recipe
        for i, name in enumerate(expand_range(anchor)):
            self._own[name] = rename_tensors(recipe, partial(_name_at_index, i))
        return Tensor(anchor, recipe.type)

    def read(self, name: str, box: Box | None = None, expected: TensorType | None = None) -> torch.Tensor:
        """Return a part of a tensor; of a decoded weight, its numbers."""
        if name not in self._own:
            return self.checkpoint.read(name, box, expected)
        if name not in self._kept:
            # tiles of one parameter take turns among the tensors that it is made of
            while len(self._kept) >= _KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[name] = self._decode(name)
        return slice_box(self._kept[name], box)

    def _decode(self, name: str) -> torch.Tensor:
        own = evaluate_recipe(self._own[name], self.checkpoint)
        library = self.library_of(name)
        found: torch.Tensor | None = None
        if isinstance(library, str):
            reason = library
        else:
            try:
                found = library.decode()
            except Exception as error:  # whatever a library raises for what it does not decode
                lines = str(error).strip().splitlines() or [type(error).__name__]
                reason = f"{library.name} does not decode {name}: {lines[0]:.120}"
        first = name not in self._seen
        self._seen.add(name)
        if found is None or isinstance(library, str):
            self._reason = self._reason or reason
            self._counts[""] += first
            return own
        self._counts[library.name] += first
        _compare_decodings(name, own, found, library.name, self.checkpoint)
        return found


def safetensors_source(checkpoint: Checkpoint, quantization: Mapping[str, Any]) -> DecodedSource:
    """Return the source for a checkpoint folder."""

    def library(name: str) -> Library | str:
        module, names = _module_tensors(name, checkpoint)
        return library_of(module, {leaf: checkpoint.read(full) for leaf, full in names.items()}, quantization)

    return DecodedSource(checkpoint, library)


def gguf_source(opened: Gguf) -> DecodedSource:
    """Return the source for a GGUF file."""
    return DecodedSource(opened.checkpoint, lambda name: gguf_library(opened.kinds[name], opened.checkpoint.read(name)))


def _name_at_index(index: int, name: str) -> str:
    return range_at(name, index) if range_size(name) > 1 else name


def _first_codes_name(recipe: Recipe) -> str | None:
    """Return the name of the first tensor that a decoding reads; None for a recipe that decodes nothing."""
    if isinstance(recipe, Tensor):
        return None
    found: list[str] = []
    decodes = False

    def visit(item: Recipe) -> None:
        nonlocal decodes
        if isinstance(item, Tensor):
            found.append(item.name)
        elif isinstance(item, Step):
            decodes = decodes or item.name == "dequantize"
            for inner in item.items:
                visit(inner)

    visit(recipe)
    return found[0] if decodes and found else None


def _module_tensors(name: str, checkpoint: Checkpoint) -> tuple[str, dict[str, str]]:
    """Return the module that a tensor of codes belongs to, and all its tensors by their leaf, used by moec or not."""
    suffix = next((s for s in _SUFFIXES if name.endswith(s)), None)
    if suffix:
        module = name.removesuffix(suffix)
        return module, {s: module + s for s in _SUFFIXES if module + s in checkpoint.tensors}
    module = name.rpartition(".")[0]
    beside = {f"{name}_scale_inv": "weight_scale_inv", f"{name}_scale": "weight_scale"}
    if not name.endswith(("weight", "weight_packed", "qweight")):  # experts in one tensor, with scales beside it
        return name, {"weight": name, **{leaf: n for n, leaf in beside.items() if n in checkpoint.tensors}}
    names = [n for n in checkpoint.tensors if n.startswith(f"{module}.") and "." not in n[len(module) + 1 :]]
    return module, {n[len(module) + 1 :]: n for n in names}


def _compare_decodings(name: str, own: torch.Tensor, found: torch.Tensor, library: str, checkpoint: Checkpoint) -> None:
    """Raise MoecError where moec decodes a weight to other numbers than its format's library."""
    what = ""
    if own.shape != found.shape:
        what = f"the shapes are {list(own.shape)} and {list(found.shape)}"
    elif own.numel():
        largest = float(found.abs().nan_to_num(0.0, 0.0, 0.0).max())
        wrong = ~torch.isclose(own, found, rtol=_NEAR, atol=_SMALL * largest, equal_nan=True)
        if bool(wrong.any()):
            what = f"{int(wrong.sum())} of {own.numel()} numbers differ"
    if what:
        raise MoecError(
            f"moec decodes {name} otherwise than {library}: {what}",
            where=str(checkpoint.tensors[name].file),
            todo="this is a fault in moec or in the library: do not use the artifact",
            exit_code=1,
        )
