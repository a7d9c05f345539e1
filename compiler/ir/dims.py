"""Sizes: sympy expressions over named dims, printed so that they parse back.

`str(sympy)` prints `floor(T/8)`, which the grammar does not know; `size_text` prints `floordiv(T, 8)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from math import ceil, floor, prod
from operator import index
from typing import TypeAlias

import sympy

Size: TypeAlias = sympy.Expr


@lru_cache(maxsize=4096)
def dim(name: str) -> sympy.Symbol:
    """Return the symbol of a named dim; every dim is a non-negative integer."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


def size(value: int | Size) -> Size:
    """Return an int or an expression as a size in sympy's normal form."""
    if not isinstance(value, sympy.Expr):
        return sympy.Integer(index(value))  # TypeError for a text, which sympy would run as Python
    if value.is_Float:
        raise TypeError(f"a size is whole, {value} is not")
    return sympy.expand(value)


def floordiv(a: int | Size, b: int | Size) -> Size:
    """Return a // b, exact where the division is."""
    return sympy.floor(sympy.sympify(a, strict=True) / sympy.sympify(b, strict=True))


def ceildiv(a: int | Size, b: int | Size) -> Size:
    """Return a / b rounded up."""
    return sympy.ceiling(sympy.sympify(a, strict=True) / sympy.sympify(b, strict=True))


FUNCTIONS = {
    "floordiv": floordiv,
    "ceildiv": ceildiv,
    "mod": lambda a, b: sympy.Mod(a, b),
    "max": lambda *args: sympy.Max(*args),
    "min": lambda *args: sympy.Min(*args),
}


def evaluate(expression: Size | int, values: Mapping[str, int]) -> int:
    """Return the size as an int, with `values` for the dims; raises KeyError for a dim without a value."""
    if isinstance(expression, int):
        return expression
    if expression.is_Integer:
        return int(expression)
    return int(_value_of_size(expression, values))


def _value_of_size(e: sympy.Basic, values: Mapping[str, int]) -> int | Fraction:
    """Return the value of a size, exactly; sympy's own substitution takes a hundred times as long."""
    match e:
        case sympy.Integer():
            return int(e)
        case sympy.Symbol():
            return values[e.name]
        case sympy.Rational():
            return Fraction(int(e.p), int(e.q))
        case sympy.Add():
            return sum(_value_of_size(a, values) for a in e.args)
        case sympy.Mul():
            return prod(_value_of_size(a, values) for a in e.args)
        case sympy.Pow():
            base, power = (_value_of_size(a, values) for a in e.args)
            return Fraction(base) ** int(power) if power < 0 else base ** int(power)
        case sympy.floor():
            return floor(_value_of_size(e.args[0], values))
        case sympy.ceiling():
            return ceil(_value_of_size(e.args[0], values))
        case sympy.Mod():
            a, b = (_value_of_size(a, values) for a in e.args)
            return a % b
        case sympy.Max():
            return max(_value_of_size(a, values) for a in e.args)
        case sympy.Min():
            return min(_value_of_size(a, values) for a in e.args)
    raise ValueError(f"a size cannot be {e}")


@lru_cache(maxsize=65536)
def size_text(expression: Size) -> str:
    """Return the canonical text of a size: `2048`, `B*S`, `P + S`, `floordiv(T, 8)`."""
    return _size_term_text(expression, 0)


def _size_term_text(e: sympy.Basic, strength: int) -> str:
    match e:
        case sympy.Integer() | sympy.Symbol():
            return str(e)
        case sympy.Add():
            parts = [_size_term_text(term, 1) for term in e.as_ordered_terms()]
            joined = parts[0] + "".join(f" - {p[1:]}" if p.startswith("-") else f" + {p}" for p in parts[1:])
            return f"({joined})" if strength > 1 else joined
        case sympy.floor() | sympy.ceiling():
            numerator, denominator = sympy.fraction(sympy.together(e.args[0]))
            name = "floordiv" if isinstance(e, sympy.floor) else "ceildiv"
            return f"{name}({_size_term_text(numerator, 0)}, {_size_term_text(denominator, 0)})"
        case sympy.Mul():
            factors = e.as_ordered_factors()
            sign = "-" if factors[0] == -1 else ""
            return sign + "*".join(_size_term_text(factor, 2) for factor in factors[1 if sign else 0 :])
        case sympy.Pow() if e.exp.is_Integer and int(e.exp) > 0:
            return "*".join([_size_term_text(e.base, 2)] * int(e.exp))
        case sympy.Mod() | sympy.Max() | sympy.Min():
            name = {"Mod": "mod", "Max": "max", "Min": "min"}[type(e).__name__]
            arguments = e.args if name == "mod" else sorted(e.args, key=sympy.default_sort_key)
            return f"{name}({', '.join(_size_term_text(a, 0) for a in arguments)})"
    raise ValueError(
        f"a size cannot be {e}: sizes are made of integers, dims, +, -, *, floordiv, ceildiv, mod, max, min"
    )
