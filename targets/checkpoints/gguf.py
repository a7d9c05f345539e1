"""Writes a GGUF file: llama.cpp's names, experts stacked, codes as blocks, all other weights as numbers.

The header says where each tensor lies before any number is read; the file is filled a weight at a time, and the same
program and weights give the same bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...compiler.errors import MoecError
from ...compiler.frontends.skeleton import read_config
from ...compiler.ir.dtypes import DTYPES
from ...compiler.ir.module import Module
from ...compiler.ir.recipes import Recipe, Tensor
from ...compiler.weights.evaluate import evaluate_recipe, row_major
from ...compiler.weights.sink import TiledFile, tile_threads
from ...compiler.weights.sources.gguf import TYPE_NUMBERS
from ...compiler.weights.sources.source import WeightSource
from ...compiler.weights.steps.table import step
from ...compiler.weights.tiles import tile_boxes
from ..target import Emitted
from .exported import Exported, Weight, find_exported
from .gguf_blocks import block_type, pack_blocks, row_bytes
from .gguf_names import Place, find_architecture, find_place, model_metadata, turned_heads
from .gguf_tokenizer import tokenizer_metadata
from .rows import NUMBERS, Matrix, RowParts, matrix_parts

FILE = "model.gguf"
_ALIGNMENT = 32
_FLOATS = ("f32", "f16", "bf16")


@dataclass(frozen=True)
class _Stored:
    """A tensor of the file: its type, its sizes, its bytes for one expert (or all), and the experts that it has."""

    kind: str
    sizes: tuple[int, ...]
    part: int
    experts: frozenset[int] = frozenset()

    @property
    def bytes(self) -> int:
        """Bytes of the data."""
        return self.part * max(1, len(self.experts))


@dataclass(frozen=True)
class _Item:
    """What is written at a place: a matrix of a weight that is stored anew, or a tensor of the checkpoint as numbers."""

    place: Place
    kind: str
    sizes: tuple[int, ...]


def write_gguf(
    module: Module, source: WeightSource, folder: Path, tile_bytes: int, progress: Callable[[int], None] | None = None
) -> Emitted:
    """Write model.gguf into a folder that has the model's config.json; return its sha256 and what there is to say.

    MoecError for a model that llama.cpp has no architecture for, weights that cannot be read, and a full disk.
    """
    exported = find_exported(module)
    config = read_config(folder)
    architecture = find_architecture(config)
    items = [*_anew(exported), *_as_they_are(exported, source)]
    tensors = _stack_experts(items)
    rows = tensors["token_embd.weight"].sizes[0]
    about, notes = tokenizer_metadata(folder, rows)
    head, places = gguf_header({**model_metadata(config, architecture), **about}, tensors)
    turned = partial(turned_heads, architecture=architecture, config=config)
    with TiledFile(folder / FILE, progress, tile_threads(source)) as file:
        file.write(0, memoryview(head))
        file.size = len(head) + sum(t.bytes + -t.bytes % _ALIGNMENT for t in tensors.values())
        writer = _Writer(file, tensors, places, source, tile_bytes, exported, turned)
        file.run([*map(writer.job, exported.weights), *(partial(writer.copy, t) for t in _kept(exported, source))])
        return Emitted({FILE: file.sha256}, notes)


# --- which tensors ---------------------------------------------------------------------------------------------------


def _anew(exported: Exported) -> Iterator[_Item]:
    for weight in exported.weights:
        kind = weight.format and block_type(weight.format)
        for matrix in weight.matrices:
            yield _Item(_place(matrix, exported), kind or "f32", matrix.recipe.type.sizes)


def _place(matrix: Matrix, exported: Exported) -> Place:
    """Return the place of a matrix; a head that is the embedding has one of its own."""
    name = "lm_head.weight" if exported.is_shared(matrix) else matrix.name
    return find_place(name.replace("weight_packed", "weight").replace("qweight", "weight"))


def _kept(exported: Exported, source: WeightSource) -> list[Tensor]:
    """Return the tensors of the checkpoint that are not stored anew."""
    replaced = exported.replaced
    found = []
    for name, info in source.tensors.items():
        owner, _, leaf = name.rpartition(".")
        if name not in replaced and (owner not in replaced or leaf == "bias"):
            found.append(Tensor(name, info.type))
    return found


def _as_they_are(exported: Exported, source: WeightSource) -> Iterator[_Item]:
    for tensor in _kept(exported, source):
        if tensor.type.dtype not in _FLOATS:
            raise MoecError(f"{tensor.name} is {tensor.type}, which GGUF has no numbers for", todo="use --target cpu")
        place = find_place(tensor.name)
        sizes = tensor.type.sizes
        # the gate of shared experts is a row there
        sizes = sizes[1:] if "ffn_gate_inp_shexp" in place.name and len(sizes) == 2 else sizes
        yield _Item(place, "f32" if place.plain or len(sizes) == 1 else tensor.type.dtype, sizes)


def _stack_experts(items: list[_Item]) -> dict[str, _Stored]:
    """Return the tensors of the file by name; MoecError for experts of a layer that are stored in several types."""
    found: dict[str, _Stored] = {}
    for item in items:
        name, expert = item.place.name, item.place.expert
        *rows, width = item.sizes
        one = row_bytes(item.kind, width) if item.kind not in DTYPES else width * DTYPES[item.kind].bits // 8
        own = _Stored(item.kind, item.sizes, math.prod(rows) * one, frozenset(() if expert is None else (expert,)))
        before = found.setdefault(name, own)
        if before is own:
            continue
        if expert is None or (before.kind, before.sizes) != (own.kind, own.sizes):
            what = f"{name} would be stored as {before.kind} and as {own.kind}"
            raise MoecError(what, todo="give all experts of a layer one format")
        found[name] = _Stored(own.kind, own.sizes, own.part, before.experts | own.experts)
    for name, tensor in found.items():
        if tensor.experts and tensor.experts != frozenset(range(len(tensor.experts))):
            raise MoecError(f"{name} lacks an expert", todo="is a shard missing?")
    return found


# --- the file --------------------------------------------------------------------------------------------------------


def gguf_header(metadata: Mapping[str, Any], tensors: Mapping[str, _Stored]) -> tuple[bytes, dict[str, int]]:
    """Return the header of a file (version 3), padded, and where each tensor begins in the file."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(_text(key) + _value(value) for key, value in metadata.items())
    begins: dict[str, int] = {}
    end = 0
    for name, tensor in tensors.items():
        sizes = (*([len(tensor.experts)] if tensor.experts else []), *tensor.sizes)
        head += _text(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *reversed(sizes))
        head += struct.pack("<IQ", TYPE_NUMBERS[tensor.kind], end)
        begins[name] = end
        end += tensor.bytes + -tensor.bytes % _ALIGNMENT
    head += bytes(-len(head) % _ALIGNMENT)
    return head, {name: len(head) + begin for name, begin in begins.items()}


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """Return a value of the metadata after the number of its type: bool 7, u32 4, f32 6, string 8, array 9 (of i32: 5)."""
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + _text(value)
    inner = [struct.pack("<Ii", 5, item) if isinstance(item, int) else _value(item) for item in value]
    kind = inner[0][:4] if inner else struct.pack("<I", 8)
    return struct.pack("<I", 9) + kind + struct.pack("<Q", len(inner)) + b"".join(item[4:] for item in inner)


@dataclass(frozen=True)
class _Writer:
    """Fills the file."""

    file: TiledFile
    tensors: Mapping[str, _Stored]
    places: Mapping[str, int]
    source: WeightSource
    tile_bytes: int
    exported: Exported
    turned: Callable[[Place], int | None]

    def job(self, weight: Weight) -> Callable[[], None]:
        """Return what writes a weight that is stored anew."""
        return partial(self.fill, weight)

    def fill(self, weight: Weight) -> None:
        """Write all matrices of a weight."""
        for matrix, parts in matrix_parts(weight.recipe, list(weight.matrices), self.source, self.tile_bytes):
            place = _place(matrix, self.exported)
            rows = _turned_rows(len(matrix.places), self.turned(place))
            own: RowParts = parts if rows is None else {name: part[rows] for name, part in parts.items()}
            width = matrix.recipe.type.sizes[-1]
            raw = own[NUMBERS] if weight.format is None else pack_blocks(own, weight.format, width)
            self.write(place, raw)

    def copy(self, tensor: Tensor) -> None:
        """Write a tensor of the checkpoint as numbers of the type that it has in the file."""
        place = find_place(tensor.name)
        kind = self.tensors[place.name].kind
        recipe: Recipe = tensor if tensor.type.dtype == kind else step("cast", tensor, to=kind)
        if (heads := self.turned(place)) is not None:
            self.write(place, evaluate_recipe(recipe, self.source)[_turned_rows(tensor.type.sizes[0], heads)])
            return
        done = 0
        for box in tile_boxes(recipe.type, self.tile_bytes):
            done += self.write(place, evaluate_recipe(recipe, self.source, box), done)

    def write(self, place: Place, numbers: torch.Tensor, done: int = 0) -> int:
        """Write numbers at a place, behind `done` bytes of it; return how many bytes that were."""
        raw = row_major(numbers.contiguous()).reshape(-1).view(torch.uint8).numpy().data
        first = self.places[place.name] + (place.expert or 0) * self.tensors[place.name].part
        self.file.write(first + done, raw)
        return len(raw)


def _turned_rows(rows: int, heads: int | None) -> torch.Tensor | None:
    """Return which row lies where, pair by pair of each head (convert_hf_to_gguf.py, permute); None where none moves."""
    if heads is None:
        return None
    return torch.from_numpy(np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1))
