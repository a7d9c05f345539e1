"""Writes a checkpoint folder of safetensors: codes in a layout that engines read, all other tensors as they were.

Files begin with what is known before any number is read, and are filled a weight at a time; the same program and weights
give the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...compiler.errors import MoecError, write_error
from ...compiler.errors.json_files import read_json
from ...compiler.formats.format import Format
from ...compiler.ir.module import Module
from ...compiler.ir.notes import Note
from ...compiler.ir.recipes import Tensor
from ...compiler.weights.evaluate import evaluate_recipe, row_major
from ...compiler.weights.sink import TiledFile, tile_threads
from ...compiler.weights.sources.checkpoint import INDEX, SINGLE
from ...compiler.weights.sources.safetensors_header import header_bytes, tensor_bytes
from ...compiler.weights.sources.source import Box, WeightSource
from ...compiler.weights.tiles import tile_boxes
from ..target import Emitted
from .exported import Exported, Weight, find_exported, owner_of
from .layouts import Layout, Modules, Tensors, is_expert, with_form
from .rows import NUMBERS, Matrix, RowParts, matrix_parts

_SHARD = 5 << 30  # bytes of a file before the next begins
_CONFIG, _HEAD, _EMBEDDING = "config.json", "lm_head", "embed_tokens"


@dataclass(frozen=True)
class _Piece:
    """What is written at once: a weight that is stored anew, or a tensor of the checkpoint; and the tensors it becomes."""

    weight: Weight | Tensor
    tensors: Tensors


def check_modules(module: Module) -> Exported:
    """Return how the weights of a program are stored; MoecError for one that no layout has a place for."""
    exported = find_exported(module)
    for weight in exported.weights:
        for matrix in weight.matrices:
            if weight.format is not None and (
                owner_of(matrix.name) == matrix.name or len(matrix.recipe.type.shape) != 2
            ):
                what = f"{matrix.name} is {matrix.recipe.type}, and only weights of linear modules are stored as codes"
                todo = "leave its role as it is (experts=f32 for stacked experts), or use --target gguf"
                raise MoecError(what, todo=todo)
    return exported


def write_checkpoint(
    module: Module, source: WeightSource, folder: Path, tile_bytes: int,
    progress: Callable[[int], None] | None = None, *, layout: Layout,
) -> Emitted:  # fmt: skip
    """Write the files of weights, their index where there are several, and config.json with its quantization_config.

    Returns the sha256 of the files of weights and what there is to say of engines. `progress` is told the bytes of weights
    written so far. Raises MoecError for weights that cannot be read and for a full disk.
    """
    exported = check_modules(module)
    config = _read_config(folder)
    forms = layout.forms(_linear_modules(exported, source))
    names = _Names(exported, forms, layout)
    pieces = [*names.anew(), *_as_they_are(exported, source)]
    shards = list(_shards(pieces))
    numbered = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    paths = numbered if len(shards) > 1 else [SINGLE]
    files: dict[str, str] = {}
    before = 0
    for name, shard in zip(paths, shards, strict=True):
        told = None if progress is None else partial(_report_bytes, progress, before)
        with TiledFile(folder / name, told, tile_threads(source)) as file:
            head, places = header_bytes({k: t for p in shard for k, t in p.tensors.items()}, {"format": "pt"})
            file.write(0, memoryview(head))
            file.size = len(head) + sum(tensor_bytes(*t) for p in shard for t in p.tensors.values())
            file.run(job for piece in shard for job in _jobs(piece, names, file, places, source, tile_bytes))
            files[name] = file.sha256
            before += file.size
    if len(shards) > 1:
        total = sum(tensor_bytes(*t) for p in pieces for t in p.tensors.values())
        where = {k: name for name, shard in zip(paths, shards, strict=True) for p in shard for k in p.tensors}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
    _write_json(folder / _CONFIG, _with_quantization(config, exported, forms, layout))
    return Emitted(files, tuple(_remarks(forms, layout)))


def _report_bytes(progress: Callable[[int], None], before: int, done: int) -> None:
    progress(before + done)


# --- which tensors ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Names:
    """The names of what is stored anew, and the formats that modules are stored in."""

    exported: Exported
    forms: Modules
    layout: Layout

    def anew(self) -> Iterator[_Piece]:
        """Yield the weights that are stored anew."""
        for weight in self.exported.weights:
            yield _Piece(weight, {k: t for m in weight.matrices for k, t in self.tensors(m, weight.format).items()})

    def tensors(self, matrix: Matrix, format: Format | None) -> Tensors:
        """Return the tensors of a matrix."""
        name, sizes = _stored_name(matrix, self.exported), matrix.recipe.type.sizes
        owner = owner_of(name)
        form = self.forms.get(owner)
        if format is None or form is None:
            return {name: ("f32", sizes)}
        return {f"{owner}.{leaf}": t for leaf, t in self.layout.tensors(form, sizes[0], sizes[1]).items()}

    def filled(self, matrix: Matrix, format: Format | None, parts: RowParts) -> Mapping[str, torch.Tensor]:
        """Return the tensors of a matrix with what is in them."""
        name, sizes = _stored_name(matrix, self.exported), matrix.recipe.type.sizes
        owner = owner_of(name)
        form = self.forms.get(owner)
        if format is None or form is None:
            return {name: parts[NUMBERS]}
        stored = self.layout.fill(with_form(parts, format, form, sizes[1]), form, sizes[0], sizes[1])
        return {f"{owner}.{leaf}": tensor for leaf, tensor in stored.items()}


def _stored_name(matrix: Matrix, exported: Exported) -> str:
    """Return the name of a matrix as plain numbers; a head that is the embedding gets one of its own."""
    if exported.is_shared(matrix):
        return f"{_HEAD}.weight"
    owner = owner_of(matrix.name)
    return matrix.name if owner == matrix.name else f"{owner}.weight"


def _as_they_are(exported: Exported, source: WeightSource) -> Iterator[_Piece]:
    """Yield the tensors of the checkpoint that are not stored anew, those included that the program does not read."""
    replaced = exported.replaced
    for name, info in source.tensors.items():
        owner, _, leaf = name.rpartition(".")
        if name not in replaced and (owner not in replaced or leaf == "bias"):
            yield _Piece(Tensor(name, info.type), {name: (info.type.dtype, info.type.sizes)})


def _shards(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    shard: list[_Piece] = []
    size = 0
    for piece in pieces:
        own = sum(tensor_bytes(*t) for t in piece.tensors.values())
        if shard and size + own > _SHARD:
            yield shard
            shard, size = [], 0
        shard.append(piece)
        size += own
    yield shard


# --- their data ------------------------------------------------------------------------------------------------------

Job = Callable[[], None]


def _jobs(
    piece: _Piece, names: _Names, file: TiledFile, places: Mapping[str, int], source: WeightSource, tile_bytes: int
) -> Iterator[Job]:
    """Yield what writes the tensors of a piece."""
    if isinstance(piece.weight, Weight):
        yield partial(_fill_weight, piece.weight, names, file, places, source, tile_bytes)
        return
    tensor = piece.weight
    offset = places[tensor.name]
    for box in tile_boxes(tensor.type, tile_bytes):
        yield partial(_copy_box, file, tensor, source, box, offset)
        offset += math.prod(b - a for a, b in box) * int(tensor.type.bits) // 8


def _copy_box(file: TiledFile, tensor: Tensor, source: WeightSource, box: Box, offset: int) -> None:
    file.write(offset, _raw_bytes(evaluate_recipe(tensor, source, box)))


def _fill_weight(
    weight: Weight, names: _Names, file: TiledFile, places: Mapping[str, int], source: WeightSource, tile_bytes: int
) -> None:
    """Write the tensors of all matrices of a weight."""
    for matrix, parts in matrix_parts(weight.recipe, list(weight.matrices), source, tile_bytes):
        for name, tensor in names.filled(matrix, weight.format, parts).items():
            file.write(places[name], _raw_bytes(tensor))


def _raw_bytes(tensor: torch.Tensor) -> memoryview:
    return row_major(tensor).reshape(-1).view(torch.uint8).numpy().data


# --- the config ------------------------------------------------------------------------------------------------------


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    if not path.is_file():
        todo = "put the model's config.json into the folder of its weights"
        raise MoecError("a checkpoint needs a config.json, and the source has none", todo=todo)
    return read_json(path)


def _linear_modules(exported: Exported, source: WeightSource) -> dict[str, Format | None]:
    """Return the linear modules of the checkpoint with the formats of their weights, the embedding left out."""
    found: dict[str, Format | None] = {
        owner_of(_stored_name(m, exported)): w.format for w in exported.weights for m in w.matrices if w.format
    }
    for name, info in source.tensors.items():
        owner = owner_of(name)
        if owner not in found and owner != name and len(info.type.shape) == 2 and not owner.endswith(_EMBEDDING):
            found[owner] = None
    return found


def _with_quantization(
    config: Mapping[str, Any], exported: Exported, modules: Modules, layout: Layout
) -> dict[str, Any]:
    """Return a config that says how the weights are stored; a head of its own is not tied to the embedding any more."""
    found = {key: value for key, value in config.items() if key != "quantization_config"}
    if any(exported.is_shared(m) for w in exported.weights for m in w.matrices):
        found["tie_word_embeddings"] = False
    if any(format is not None for format in modules.values()):
        found["quantization_config"] = layout.config(modules)
    return found


def _remarks(modules: Modules, layout: Layout) -> Iterator[Note]:
    """Yield what a user has to know of engines."""
    if modules.get(_HEAD):
        yield Note(
            f"{_HEAD} is stored as codes, which vLLM reads of {layout.name} not in every version: head=f32 leaves it as it is"
        )
    for kind, what in ((True, "experts"), (False, "linears outside of experts")):
        kinds = {f.name for name, f in modules.items() if f and is_expert(name) is kind}
        if len(kinds) > 1:
            yield Note(
                f"{what} are stored in {', '.join(sorted(kinds))}; transformers reads one format for all of them"
            )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    try:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise write_error(error, path) from error
