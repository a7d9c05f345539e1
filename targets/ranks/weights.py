"""The weights of ranks: safetensors files with what each device of a plan holds, written a tile at a time and read back.

What all tokens go through lies in one file for each pipeline stage and tensor-parallel part, its matrices divided by rows;
experts lie in a file for each device. Floats keep the checkpoint's dtype where it has the same numbers; quantized weights are the
parts of their format (formats/format.py), so that any reader of safetensors can use them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from ...compiler.errors import MoecError
from ...compiler.formats.format import Format
from ...compiler.formats.table import find_format
from ...compiler.ir.dtypes import DTYPES
from ...compiler.ir.module import Function, Module, Op, call_bindings
from ...compiler.ir.names import Names
from ...compiler.ir.recipes import Recipe, Step, bind_recipe
from ...compiler.ir.types import TensorType
from ...compiler.weights.demote import demoted_recipe
from ...compiler.weights.evaluate import evaluate_recipe, row_major
from ...compiler.weights.rows import encode_rows, tensor_scales
from ...compiler.weights.sink import TiledFile
from ...compiler.weights.sources.safetensors_header import header_bytes
from ...compiler.weights.sources.source import Box, WeightSource, full_box
from ...compiler.weights.tiles import tile_boxes

MAIN = "main"
OF_EXPERTS = ("up", "down", "up_bias", "down_bias")


@dataclass(frozen=True)
class Held:
    """A weight of one call: its name in the files, its bound recipe, and the layers that it belongs to.

    `block` is the number of its layer among those that attend or hold experts (None: of @main), `layer` that among the
    layers with experts (None: no weight of experts).
    """

    name: str
    recipe: Recipe
    block: int | None
    layer: int | None

    @cached_property
    def format(self) -> Format | None:
        """The format that it is stored in, if it is quantized."""
        return find_format(self.recipe.type.dtype)

    @cached_property
    def stored(self) -> Recipe:
        """The recipe of what is stored: without the cast to f32 where the checkpoint's dtype has all the numbers."""
        if self.format is None and self.recipe.type.dtype == "f32":
            for dtype in ("bf16", "f16"):
                shorter, exact = demoted_recipe(self.recipe, dtype)
                if exact:
                    return shorter
        return self.recipe

    def divides(self, parts: int) -> bool:
        """Return whether rows divide into parts: matrices' do where no block of scales is cut."""
        matrix = 3 if self.layer is not None else 2
        sizes, block = self.recipe.type.sizes, self.format.rows if self.format else 1
        return len(sizes) == matrix and sizes[-2] % (parts * block) == 0


@dataclass(frozen=True)
class Share:
    """What one file holds of a weight: some experts (None: it is no weight of experts), and part `part` of `parts` of the rows."""

    held: Held
    experts: tuple[int, ...] | None
    part: int
    parts: int

    @cached_property
    def rows(self) -> tuple[int, int]:
        """The first row and the one behind the last of matrices; all of anything else."""
        sizes = self.held.recipe.type.sizes
        if len(sizes) < 2 or self.parts == 1:
            return 0, sizes[-2] if len(sizes) > 1 else 0
        each = sizes[-2] // self.parts
        return self.part * each, (self.part + 1) * each

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The shape of what is held."""
        sizes = list(self.held.recipe.type.sizes)
        if self.parts > 1:
            sizes[-2] = self.rows[1] - self.rows[0]
        if self.experts is not None:
            sizes[0] = len(self.experts)
        return tuple(sizes)

    @cached_property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensors of the file: name -> (dtype, shape)."""
        format, name = self.held.format, self.held.name
        if format is None:
            return {name: (self.held.stored.type.dtype, self.sizes)}
        *lead, rows, width = self.sizes
        found = {}
        for part in format.part_names:
            dtype, shape = format.part(part, rows, width)
            found[f"{name}.{part}"] = dtype, (*lead, *shape)
        if format.tensor_scale:
            found[f"{name}.tensor_scale"] = "f32", tuple(lead)
        return found

    def boxes(self) -> Iterator[Box]:
        """Yield the boxes of the whole weight whose elements, one box after the other, are what is held."""
        box = list(full_box(self.held.recipe.type.sizes))
        if self.parts > 1:
            box[-2] = self.rows
        for expert in [None] if self.experts is None else self.experts:
            yield tuple(box) if expert is None else ((expert, expert + 1), *box[1:])


def held_weights(module: Module) -> list[Held]:
    """Return the weights of a module of stage kernel in the order in which its calls read them, each recipe once."""
    found: dict[Recipe, Held] = {}
    labels, blocks, layers = Names([MAIN]), itertools.count(), itertools.count()

    def visit(function: Function, label: str, bound: Mapping[str, str], block: int | None) -> None:
        owners = _expert_owners(function, layers)
        for const in function.consts:
            if const.value.name in function.uses:
                recipe = bind_recipe(const.recipe, function.weights, bound)
                name = f"{label}.{const.value.name}"
                found.setdefault(recipe, Held(name, recipe, block, owners.get(const.value.name)))
        for op in function.ops:
            if op.callee:
                callee = module.by_name[op.callee]
                own = ".".join(f"{name}.{value}" for name, value in call_bindings(op).items()) or op.callee
                inner = labels.fresh(own if function is module.main else f"{label}.{own}")
                is_layer = any(p.type.state for p in callee.params) or any(o.name == "moe.experts" for o in callee.ops)
                number = next(blocks) if block is None and is_layer else block
                visit(callee, inner, {**bound, **call_bindings(op)}, number)

    visit(module.main, MAIN, {}, None)
    return list(found.values())


def _expert_owners(function: Function, layers: Iterator[int]) -> dict[str, int]:
    """Return for each weight of routed experts the number of the layer, counted on by `layers`."""
    found: dict[str, int] = {}
    for op in function.ops:
        if op.name == "moe.experts":
            layer = next(layers)
            found |= {v.name: layer for name in OF_EXPERTS if (v := op.get(name)) is not None}
    return found


def expert_ops(module: Module) -> list[Op]:
    """Return the ops of routed experts in the order in which they run, one for each layer that has some."""

    def visit(function: Function) -> Iterator[Op]:
        for op in function.ops:
            if op.callee:
                yield from visit(module.by_name[op.callee])
            elif op.name == "moe.experts":
                yield op

    return list(visit(module.main))


# --- writing -------------------------------------------------------------------------------------------------------


def write_shares(file: TiledFile, shares: list[Share], source: WeightSource, tile_bytes: int) -> None:
    """Write a safetensors file; the same shares and weights give the same bytes."""
    tensors = {name: of for share in shares for name, of in share.tensors.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (-DTYPES[item[1][0]].bits, item[0])))
    head, places = header_bytes(ordered)
    file.write(0, memoryview(head))
    file.size = len(head) + sum(math.prod(shape) * DTYPES[dtype].bits // 8 for dtype, shape in ordered.values())
    file.run(job for share in shares for job in _share_jobs(file, share, source, tile_bytes, places))


def _share_jobs(
    file: TiledFile, share: Share, source: WeightSource, tile_bytes: int, places: Mapping[str, int]
) -> Iterator[partial[None]]:
    recipe, format, name = share.held.stored, share.held.format, share.held.name
    if format is None:
        offset = places[name]
        for whole in share.boxes():
            inner = TensorType.of(recipe.type.dtype, *(b - a for a, b in whole))
            for tile in tile_boxes(inner, tile_bytes):
                box = tuple((low + a, low + b) for (low, _), (a, b) in zip(whole, tile, strict=True))
                yield partial(_write_plain, file, recipe, source, box, offset)
                offset += math.prod(b - a for a, b in box) * int(recipe.type.bits) // 8
        return
    if not isinstance(recipe, Step):
        raise MoecError(f"{name} is {recipe.type}, but nothing makes it so", exit_code=1)
    scales = tensor_scales(recipe, source, tile_bytes) if format.tensor_scale else None
    at = dict(places)
    width = recipe.type.sizes[-1]
    step = max(1, tile_bytes // (4 * width) // format.rows) * format.rows
    for whole in share.boxes():
        for low in range(*whole[-2], step):
            box = (*whole[:-2], (low, min(low + step, whole[-2][1])))
            yield partial(_write_rows, file, recipe, source, box, scales, name, dict(at))
            for part in format.part_names:
                dtype, shape = format.part(part, box[-1][1] - low, width)
                lead = math.prod(b - a for a, b in box[:-1])
                at[f"{name}.{part}"] += lead * math.prod(shape) * DTYPES[dtype].bits // 8
        if scales is not None:
            own = scales[tuple(slice(*span) for span in whole[:-2])].reshape(-1).contiguous()
            yield partial(file.write, at[f"{name}.tensor_scale"], own.view(torch.uint8).numpy().data)
            at[f"{name}.tensor_scale"] += 4 * own.numel()


def _write_plain(file: TiledFile, recipe: Recipe, source: WeightSource, box: Box, offset: int) -> None:
    file.write(offset, evaluate_recipe(recipe, source, box).reshape(-1).view(torch.uint8).numpy().data)


def _write_rows(
    file: TiledFile, recipe: Step, source: WeightSource, box: Box, scales: torch.Tensor | None, name: str,
    places: Mapping[str, int],
) -> None:  # fmt: skip
    """Write the codes, scales and zero points of a tile of rows."""
    for part, tensor in encode_rows(recipe, source, box, scales).items():
        if part != "tensor_scale":
            data = row_major(tensor).reshape(-1).view(torch.uint8).numpy().data
            file.write(places[f"{name}.{part}"], data)


# --- reading -------------------------------------------------------------------------------------------------------


def read_share(tensors: Mapping[str, torch.Tensor], share: Share, index: int | None = None) -> torch.Tensor:
    """Return the numbers f32 of a share, of experts that of one slot, from the tensors of its file."""
    held, format = share.held, share.held.format

    def one(name: str) -> torch.Tensor:
        tensor = tensors[name]
        return tensor if index is None else tensor[index]

    if format is None:
        found = one(held.name)
        return found.float() if found.is_floating_point() else found
    names = [*format.part_names, *(["tensor_scale"] if format.tensor_scale else [])]
    return format.decode({part: one(f"{held.name}.{part}") for part in names}, share.sizes[-1])
