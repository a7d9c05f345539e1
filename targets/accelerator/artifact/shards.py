"""Weights as an accelerator reads them: safetensors files in the packed layout, one for each call of a layer.

A file's header is known before its data. Numbers and codes are read, packed and written a tile of rows at a time, so
that memory does not grow with the model; the same module and weights give the same bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ....compiler.errors import MoecError, write_error
from ....compiler.formats.format import Format, Parts
from ....compiler.formats.packing import unpack_bits
from ....compiler.formats.table import find_format
from ....compiler.ir.dtypes import DTYPES, dtype_name
from ....compiler.ir.module import Function, Module, call_bindings
from ....compiler.ir.names import Names
from ....compiler.ir.recipes import Recipe, Step, bind_recipe
from ....compiler.weights.evaluate import evaluate_recipe, row_major
from ....compiler.weights.memory import TILE_BYTES
from ....compiler.weights.rows import encode_rows, tensor_scales
from ....compiler.weights.sink import TiledFile, tile_threads
from ....compiler.weights.sources.safetensors_header import header_bytes, tensor_bytes
from ....compiler.weights.sources.source import Box, WeightSource
from ....compiler.weights.steps.quantized import block_tiles
from ....compiler.weights.tiles import tile_boxes
from ..tile.packing import FRACTAL_ROWS, Packing

FOLDER, MAIN = "weights", "main"
WeightLayouts = Mapping[tuple[str, str], Packing]  # (function, weight) -> how it is stored


@dataclass(frozen=True)
class Stored:
    """A weight of a file: its name, its bound recipe, and how it is packed (None: row by row, as it is typed)."""

    name: str
    recipe: Recipe
    packing: Packing | None

    @property
    def parts(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """The tensors: name -> (dtype, shape)."""
        if self.packing is None:
            return {self.name: (self.recipe.type.dtype, self.recipe.type.sizes)}
        return {f"{self.name}.{part}" if part else self.name: of for part, of in self.packing.parts.items()}


@dataclass(frozen=True)
class Shard:
    """A file of weights; `name` is relative to the artifact."""

    name: str
    weights: tuple[Stored, ...]

    @property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensors in the order of the file: wide elements first, so that each lies at a multiple of its size."""
        found = {name: of for w in self.weights for name, of in w.parts.items()}
        return dict(sorted(found.items(), key=lambda item: (-DTYPES[item[1][0]].bits, item[0])))

    @property
    def bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor_bytes(*of) for of in self.tensors.values())


@dataclass(frozen=True)
class Call:
    """One call of a function: the label that its weights' names begin with, and what it binds."""

    label: str
    function: str
    bindings: Mapping[str, str]


@dataclass
class Shards:
    """The files of a module, the calls in program order, and the names that refer to a weight written elsewhere."""

    shards: list[Shard] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    same: dict[str, str] = field(default_factory=dict)


def find_shards(module: Module, layouts: WeightLayouts) -> Shards:
    """Return the files that a module of stage kernel needs, a file for each call in @main and one for its own weights."""
    found = Shards()
    weights: dict[str, list[Stored]] = {}
    written: dict[tuple[Recipe, Packing | None], str] = {}
    labels = Names([MAIN])

    def visit(function: Function, label: str, bound: Mapping[str, str]) -> None:
        found.calls.append(Call(label, function.name, dict(bound)))
        for const in function.consts:
            value = const.value
            if value.name not in function.uses:
                continue
            recipe = bind_recipe(const.recipe, function.weights, bound)
            packing = _checked_packing(layouts.get((function.name, value.name)), recipe, f"{value} in @{function.name}")
            name, key = f"{label}/{value.name}", (recipe, packing)
            if key in written:
                found.same[name] = written[key]
            else:
                written[key] = name
                weights.setdefault(label.split("/")[0], []).append(Stored(name, recipe, packing))
        for op in function.ops:
            if op.callee:
                own = ".".join(f"{name}.{value}" for name, value in call_bindings(op).items()) or op.callee
                inner = labels.fresh(own if function is module.main else f"{label}/{own}")
                visit(module.by_name[op.callee], inner, {**bound, **call_bindings(op)})

    visit(module.main, MAIN, {})
    found.shards = [Shard(f"{FOLDER}/{label}.safetensors", tuple(own)) for label, own in weights.items()]
    return found


def _checked_packing(packing: Packing | None, recipe: Recipe, what: str) -> Packing | None:
    """Return the packing of a weight, checked against it; None where that is row by row as it is typed."""
    type_ = recipe.type
    if packing is None:
        if find_format(type_.dtype):
            raise MoecError(f"nothing says how {what} is packed", where=what, exit_code=1)
        return None
    sizes = (*([packing.experts] if packing.experts else []), packing.rows, packing.columns)
    if packing.format != type_.dtype or sizes != type_.sizes:
        raise MoecError(f"{what} is {type_}, and its packing {packing}", where=what, exit_code=1)
    return None if packing.quantized is None and not packing.fractal else packing


# --- writing -------------------------------------------------------------------------------------------------------


def write_shards(
    found: Shards, source: WeightSource, folder: Path, tile_bytes: int = TILE_BYTES,
    progress: Callable[[int], None] | None = None, threads: int | None = None,
) -> dict[str, str]:  # fmt: skip
    """Write the files below a folder and return the sha256 of each by name.

    Weights are worked on in tiles of `tile_bytes` of f32; `progress` is told the bytes written so far. Raises MoecError
    for weights that cannot be read and for a full disk.
    """
    hashes: dict[str, str] = {}
    before = 0
    for shard in found.shards:
        path = folder / shard.name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(error, path) from error
        told = None if progress is None else partial(_report_bytes, progress, before)
        with TiledFile(path, told, threads or tile_threads(source)) as file:
            _write_shard(file, shard, source, tile_bytes)
            hashes[shard.name] = file.sha256
            before += file.size
    return hashes


def _report_bytes(progress: Callable[[int], None], before: int, done: int) -> None:
    progress(before + done)


def _write_shard(file: TiledFile, shard: Shard, source: WeightSource, tile_bytes: int) -> None:
    head, places = header_bytes(shard.tensors)
    file.write(0, memoryview(head))
    file.size = len(head) + shard.bytes
    file.run(job for weight in shard.weights for job in _write_jobs(file, weight, places, source, tile_bytes))


Job = Callable[[], None]


def _write_jobs(
    file: TiledFile, weight: Stored, places: Mapping[str, int], source: WeightSource, tile_bytes: int
) -> Iterator[Job]:
    """Yield what writes the tensors of a weight."""
    recipe, packing = weight.recipe, weight.packing
    if packing is None:
        offset = places[weight.name]
        for box in tile_boxes(recipe.type, tile_bytes):
            yield partial(_write_plain, file, recipe, source, box, offset)
            offset += int(np.prod([b - a for a, b in box], dtype=np.int64)) * int(recipe.type.bits) // 8
    elif packing.fractal:
        for box in _matrix_tiles(recipe, tile_bytes, FRACTAL_ROWS):
            yield partial(_write_fractal, file, recipe, packing, source, box, places[weight.name])
    else:
        yield from _quantized_jobs(file, weight, packing, places, source, tile_bytes)


def _write_plain(file: TiledFile, recipe: Recipe, source: WeightSource, box: Box, offset: int) -> None:
    file.write(offset, evaluate_recipe(recipe, source, box).reshape(-1).view(torch.uint8).numpy().data)


# --- fractals ------------------------------------------------------------------------------------------------------


def _matrix_tiles(recipe: Recipe, tile_bytes: int, block: int) -> Iterator[Box]:
    """Yield boxes of whole rows of one matrix, begun at multiples of `block`."""
    *lead, rows, width = recipe.type.sizes
    step = max(1, tile_bytes // (4 * width) // block) * block
    for outer in itertools.product(*map(range, lead)):
        for low in range(0, rows, step):
            yield (*((i, i + 1) for i in outer), (low, min(low + step, rows)), (0, width))


def _write_fractal(
    file: TiledFile, recipe: Recipe, packing: Packing, source: WeightSource, box: Box, offset: int
) -> None:  # fmt: skip
    """Write the fractals of a tile of rows: those of one column of fractals are adjacent, column after column."""
    (_, (_, shape)), *_ = packing.parts.items()
    columns, rows, *one = shape[-4:]
    low, high = box[-2]
    matrix = box[0][0] if packing.experts else 0
    numbers = _numpy_array(evaluate_recipe(recipe, source, box)).reshape(high - low, -1)
    packed = replace(packing, rows=high - low, experts=0).pack(numbers)[""]
    size = int(np.prod(one)) * packed.dtype.itemsize
    for column, part in enumerate(packed):
        place = (matrix * columns + column) * rows + low // FRACTAL_ROWS
        file.write(offset + place * size, _raw_bytes(part))


# --- quantized -----------------------------------------------------------------------------------------------------


def _quantized_jobs(
    file: TiledFile, weight: Stored, packing: Packing, places: Mapping[str, int], source: WeightSource, tile_bytes: int
) -> Iterator[Job]:
    quantized = weight.recipe
    if not isinstance(quantized, Step) or quantized.name not in ("quantize", "packed"):
        raise MoecError(f"{weight.name} is {quantized.type}, but not made by quantize or packed", exit_code=1)
    whole = None
    if "tensor_scale" in packing.parts:
        whole = tensor_scales(quantized, source, tile_bytes)
        yield partial(file.write, places[f"{weight.name}.tensor_scale"], _raw_bytes(whole.reshape(-1).numpy()))
    for box in block_tiles(quantized, tile_bytes):
        yield partial(_write_rows, file, weight, packing, quantized, source, box, whole, places)


def _write_rows(
    file: TiledFile, weight: Stored, packing: Packing, quantized: Step, source: WeightSource, box: Box,
    whole: torch.Tensor | None, places: Mapping[str, int],
) -> None:  # fmt: skip
    """Write codes, scales and zero points of a tile of rows."""
    low, high = box[-1]
    matrix = box[0][0] if packing.experts else 0
    encoded = encode_rows(quantized, source, box, whole)
    given = _parts_to_pack(encoded, _format_of_packing(packing), packing.columns, high - low)
    packed = replace(packing, rows=high - low, experts=0).pack(**given)
    for part, array in packed.items():
        if part == "tensor_scale":
            continue
        shared = _format_of_packing(packing).rows if part == "scales" else 1  # rows of the weight for one of this part
        first = matrix * packing.parts[part][1][-2] + low // shared
        file.write(places[f"{weight.name}.{part}"] + first * array.shape[1] * array.dtype.itemsize, _raw_bytes(array))


def _format_of_packing(packing: Packing) -> Format:
    assert packing.quantized
    return packing.quantized


def _parts_to_pack(parts: Parts, format: Format, width: int, rows: int) -> dict[str, np.ndarray]:
    """Return what Packing.pack takes of the parts that formats/format.py names: one code in an element."""
    codes = unpack_bits(parts["codes"], format.bits, width).reshape(rows, width).numpy()
    if format.element == "int" and not format.zeros:
        codes = (codes.astype(np.int16) - (1 << (format.bits - 1))).astype(np.int8)
    found = {"codes": codes, "scales": _numpy_array(parts["scales"])}
    found["scales"] = found["scales"].reshape(-1, found["scales"].shape[-1])
    if format.zeros:
        found["zeros"] = unpack_bits(parts["zeros"], format.bits, width // format.group).reshape(rows, -1).numpy()
    if format.tensor_scale:
        found["tensor_scale"] = _numpy_array(parts["tensor_scale"]).reshape(-1)
    return found


def _numpy_array(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor's values in numpy, also those of dtypes that numpy has not by itself."""
    if tensor.dtype not in (torch.bfloat16, torch.float8_e4m3fn):
        return tensor.numpy()
    kind = DTYPES[dtype_name(tensor.dtype)].numpy
    return row_major(tensor).view(torch.uint8).numpy().view(kind).reshape(tuple(tensor.shape))


def _raw_bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
