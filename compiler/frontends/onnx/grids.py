"""The operators of moec's own on weights in a grid (see targets/cpu/kernels/grids.py), each declared once.

A table of what the two codes of each byte stand for says which numbers the grid has. Codes of 3 bits, whose highest bits lie
apart, are not read.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import MoecError
from ...formats.table import ELEMENTS
from ...ir.module import Value
from ...ir.recipes import Recipe, Step, Tensor
from ...weights.steps.table import step
from ..aten.lower import reshape
from .contrib import activation_of, const_of_recipe, recipe_of, unpacked
from .graph import OWN, OnnxGraph, operator
from .node import Item, Node

_BYTES = 256


@operator(f"{OWN}.MatMulGrid")
def _matmul_grid(g: OnnxGraph, node: Node) -> Any:
    x, codes, scales, numbers = node.inputs
    return g.call("aten.linear", g.value(x), _weight_of(g, node, codes, scales, numbers))


@operator(f"{OWN}.GridExperts")
def _grid_experts(g: OnnxGraph, node: Node) -> Any:
    x, ids, gates, up_codes, up_scales, down_codes, down_scales, numbers = node.inputs
    up = _weight_of(g, node, up_codes, up_scales, numbers)
    down = _weight_of(g, node, down_codes, down_scales, numbers)
    rows, act = g.value(x), activation_of(node)
    tokens = reshape(g, rows, (rows.type.elements / rows.type.shape[-1], rows.type.shape[-1]))
    y = g.builder.add("moe.experts", tokens, g.value(ids), g.value(gates), up, down, None, None, act=act)
    return reshape(g, y, rows.type.shape)


@operator(f"{OWN}.MatMulGrid3", f"{OWN}.GridExperts3")
def _three_bits(g: OnnxGraph, node: Node) -> Any:
    raise MoecError(f"{node.type} on codes of 3 bits")


def _weight_of(g: OnnxGraph, node: Node, codes: Item | None, scales: Item | None, numbers: Item | None) -> Value:
    """Return the weight of codes [.., rows, bytes] and a scale for each group of a row."""
    found, factors = (recipe_of(g, item, f"a weight of {node.type}") for item in (codes, scales))
    *lead, rows, packed = found.type.sizes
    block = node.integer("block_size")
    if found.type.dtype != "u8" or factors.type.sizes != (*lead, rows, -(-packed * 2 // max(block, 1))):
        raise MoecError(f"{node.type} of codes {found.type} and scales {factors.type} in groups of {block}")
    grid = step("decode", unpacked(found, 4, 2 * packed), of=_element_of(g, node, numbers))
    return const_of_recipe(g, step("dequantize", grid, _as_stored(factors), block=(*(1 for _ in lead), 1, block)))


def _as_stored(scales: Recipe) -> Recipe:
    """Return scales as the model has them, which formats hold: initializers of half floats are read as f32."""
    return scales.items[0] if isinstance(scales, Step) and scales.name == "cast" else scales


def _element_of(g: OnnxGraph, node: Node, numbers: Item | None) -> str:
    """Return the name of the numbers that a table gives to the codes of each byte; MoecError for an unknown table."""
    recipe = recipe_of(g, numbers, f"the numbers of {node.type}")
    if isinstance(recipe, Tensor) and recipe.type.sizes == (_BYTES, 2):
        given = g.source.read(recipe.name, expected=recipe.type).tolist()
        for name, values in ELEMENTS.items():
            if len(values) == 16 and _same_numbers(given, values):
                return name
    raise MoecError(f"{node.type} in a grid that is not known")


def _same_numbers(given: list[list[float]], values: tuple[float, ...]) -> bool:
    as_stored = np.array(values, np.float32).tolist()
    return given == [[as_stored[byte & 15], as_stored[byte >> 4]] for byte in range(_BYTES)]
