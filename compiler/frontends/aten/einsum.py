"""The handler of torch's einsum: a product of two operands as one product of matrices, of one as a sum."""

from __future__ import annotations

from typing import Any

import sympy

from ...errors import MoecError
from ...ir.dims import Size
from ...ir.module import Value
from .lower import Graph, aten, reshape


@aten("aten.einsum")
def _einsum(g: Graph, equation: str, operands: list[Value], path: Any = None) -> Value:
    """Multiply operands by their letters: those of both and the result are batches, those of no result are summed."""
    inputs, result = _split_equation(equation, operands)
    if len(operands) == 2 and operands[0].name in g.builder.consts and operands[1].name not in g.builder.consts:
        inputs, operands = inputs[::-1], operands[::-1]  # a weight multiplies from the right, as in a linear
    if len(operands) > 2:
        return _join_pairwise(g, inputs, operands, result)
    sizes = {
        letter: n
        for letters, x in zip(inputs, operands, strict=True)
        for letter, n in zip(letters, x.type.shape, strict=True)
    }
    elsewhere = [set(result).union(*inputs[:i], *inputs[i + 1 :]) for i in range(len(inputs))]
    reduced = [_sum_letters(g, x, own, kept) for x, own, kept in zip(operands, inputs, elsewhere, strict=True)]
    (x, own), *rest = reduced
    if rest:
        x, own = _multiply(g, (x, own), rest[0], result, sizes)
    return _reorder(g, x, own, result)


def _split_equation(equation: str, operands: list[Value]) -> tuple[list[str], str]:
    left, arrow, result = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    if not arrow:
        result = "".join(sorted(c for c in set(left) if left.count(c) == 1 and c.isalpha()))
    if "." in equation:
        inputs, result = _spell_ellipsis(inputs, result, operands)
    if any(len(set(letters)) < len(letters) for letters in inputs):
        raise MoecError(f"einsum {equation} takes a diagonal, which is not understood")
    return inputs, result


def _spell_ellipsis(inputs: list[str], result: str, operands: list[Value]) -> tuple[list[str], str]:
    """Return letters in place of `...`: the last ones of a row of free letters, as the axes are counted from the back."""
    free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in "".join(inputs)]
    counts = [len(x.type.shape) - len(s.replace("...", "")) for s, x in zip(inputs, operands, strict=True)]
    most = max(n for n, s in zip(counts, inputs, strict=True) if "..." in s)
    names = "".join(free[:most])
    return [s.replace("...", names[most - n :]) for n, s in zip(counts, inputs, strict=True)], result.replace(
        "...", names
    )


def _join_pairwise(g: Graph, inputs: list[str], operands: list[Value], result: str) -> Value:
    """Multiply more than two operands one after the other, from the left."""
    first, second, rest = inputs[0], inputs[1], inputs[2:]
    kept = set(result).union(*rest)
    between = "".join(dict.fromkeys(c for c in first + second if c in kept))
    x = _einsum(g, f"{first},{second}->{between}", operands[:2])
    return _einsum(g, f"{','.join([between, *rest])}->{result}", [x, *operands[2:]])


def _sum_letters(g: Graph, x: Value, own: str, kept: set[str]) -> tuple[Value, str]:
    """Return an operand without the letters that neither the result nor another operand has."""
    axes = tuple(i for i, c in enumerate(own) if c not in kept)
    if not axes:
        return x, own
    return g.builder.add("core.sum", x, axes=axes, keepdim=False), "".join(c for c in own if c in kept)


def _multiply(
    g: Graph, first: tuple[Value, str], second: tuple[Value, str], result: str, sizes: dict[str, Size]
) -> tuple[Value, str]:
    """Return the product of two operands and its letters.

    Of the letters that only one operand has, the last is a row or a column of the matrices; the others are batches that
    the other operand is repeated along, so that a letter of experts stays an axis of its own.
    """
    (x, a), (y, b) = first, second
    batch = [c for c in a if c in b and c in result]
    summed = [c for c in a if c in b and c not in result]
    mine, other = ([c for c in own if c not in set(batch + summed)] for own in (a, b))
    rows, columns = mine[-1:], other[-1:]
    outer = [*batch, *mine[:-1], *other[:-1]]
    x = _matrices(g, x, a, outer, rows, summed, sizes)
    y = _matrices(g, y, b, outer, summed, columns, sizes)
    product = g.builder.add("core.matmul", x, y)
    letters = [*outer, *rows, *columns]
    return reshape(g, product, tuple(sizes[c] for c in letters)), "".join(letters)


def _matrices(
    g: Graph, x: Value, own: str, outer: list[str], rows: list[str], columns: list[str], sizes: dict[str, Size]
) -> Value:
    """Return an operand as matrices: batches (1 long where it lacks the letter), rows, columns."""
    x = _reorder(g, x, own, "".join(c for c in (*outer, *rows, *columns) if c in own))
    lead = [sizes[c] if c in own else sympy.Integer(1) for c in outer]
    while lead and lead[0] == 1:  # a product broadcasts there by itself
        lead = lead[1:]
    ends = [sympy.Mul(*(sizes[c] for c in part)) for part in (rows, columns)]
    return reshape(g, x, (*lead, *ends))


def _reorder(g: Graph, x: Value, own: str, wanted: str) -> Value:
    if set(wanted) != set(own):
        raise MoecError(f"einsum gives {own or 'a number'}, {wanted or 'a number'} is wanted, which is not understood")
    perm = tuple(own.index(c) for c in wanted)
    return x if perm == tuple(range(len(own))) else g.builder.add("core.transpose", x, perm=perm)
