"""Modules to text, in the one canonical form.

Attributes are sorted, a statement takes one line, neighbours that count up are written as a range: `%h.{0..3}` for
`%h.0, %h.1, %h.2, %h.3`, `{layer=0..15}` for 16 calls, `32 * f32[B]` for 32 equal result types.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import sympy

from ..ir.activation import Activation
from ..ir.dims import size_text
from ..ir.module import Const, Function, Module, Op, Value
from ..ir.recipes import Literal, Recipe, Tensor
from ..ir.types import Attr, TensorType, attr_key

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RESERVED = frozenset(["true", "false", "inf", "nan"])

Dims = Collection[str]  # the declared dims: an attribute value of that name is quoted


def print_module(module: Module) -> str:
    """Return the text of a module; it ends with a newline."""
    dims = frozenset(d.name for d in module.dims)
    lines = [f"moec 1 stage {module.stage}"]
    if module.source:
        lines.append(f"source {_quote_text(module.source)}")
    lines += [f"dim {d.name} in {d.low}..{d.high}" for d in module.dims]
    parts = ["\n".join(lines) + "\n", *(print_function(f, dims) for f in module.functions)]
    return "\n".join(parts)


def print_function(function: Function, dims: Dims = ()) -> str:
    """Return the text of a function; it ends with a newline."""
    params = function.params
    runs = _name_runs([v.name for v in params], lambda i: params[i].type == params[i - 1].type)
    typed = ", ".join(f"%{name}: {print_type(params[i].type)}" for i, name in runs)
    weights = f" weights {_quote_text(function.weights)}" if function.weights else ""
    lines = [f"func @{function.name}({typed})", f"    -> ({_print_types(function.types)}){weights} {{"]
    lines += [f"  {_print_const(c, dims)}" for c in function.consts]
    start = 0
    while start < len(function.ops):
        run = _call_run(function.ops, start)
        op = function.ops[start]
        lines.append(f"  {_print_calls(op, run, dims) if run else print_op(op, dims)}")
        start += run.length if run else 1
    results = _print_values(function.results)
    lines.append(f"  return {results}" if results else "  return")
    return "\n".join([*lines, "}", ""])


def print_op(op: Op, dims: Dims = ()) -> str:
    """Return the statement of one op, without indentation and newline."""
    attrs = [f"{name}={_print_attribute(value, dims)}" for name, value in op.attrs]
    return _print_statement(op, _print_values(op.results), _print_values(op.operands), attrs)


def print_type(type: TensorType) -> str:
    """Return the text of a type: `state f32[B, 16, P + S, 128]`."""
    return str(type)


def print_recipe(recipe: Recipe, dims: Dims = ()) -> str:
    """Return the text of a recipe: `cast(tensor("a", bf16[2]), to=f32)`."""
    match recipe:
        case Tensor(name, type):
            return f"tensor({_quote_text(name)}, {type})"
        case Literal(type, values):
            return f"literal({type}, {_print_attribute(values, dims)})"
    arguments = [print_recipe(item, dims) for item in recipe.items]
    arguments += [f"{name}={_print_attribute(value, dims)}" for name, value in recipe.attrs]
    return f"{recipe.name}({', '.join(arguments)})"


def _print_const(const: Const, dims: Dims) -> str:
    return f"const {const.value} : {const.value.type} = {print_recipe(const.recipe, dims)}"


def _print_statement(op: Op, results: str, operands: str, attrs: Sequence[str]) -> str:
    name = f"call @{op.callee}" if op.callee else op.name
    braces = f" {{{', '.join(attrs)}}}" if attrs else ""
    types = ", ".join(print_type(v.type) for v in op.results)
    loc = f" loc({', '.join(map(_quote_text, op.loc))})" if op.loc else ""
    return f"{results} = {name}({operands}){braces} : {types}{loc}"


def _print_attribute(value: Attr, dims: Dims) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return int.__repr__(value)
        case float():
            plain = not math.isnan(value) or attr_key(value) == attr_key(math.nan)
            return float.__repr__(value) if plain else f"nan0x{attr_key(value).hex()}"
        case str():
            bare = (
                _NAME.fullmatch(value)
                and value not in _RESERVED
                and not value.startswith("nan0x")
                and value not in dims
            )
            return value if bare else _quote_text(value)
        case tuple():
            return f"[{', '.join(_print_attribute(v, dims) for v in value)}]"
        case sympy.Expr():
            return size_text(value)
        case Activation():
            return str(value)
    raise TypeError(f"an attribute cannot be a {type(value).__name__}: {value!r}")


def _quote_text(text: str) -> str:
    # what a screen cannot show is escaped, letters of any script are not
    return json.dumps(text, ensure_ascii=not text.isprintable())


# --- runs: neighbours that count up ----------------------------------------------------------------------------


def _counting_component(a: str, b: str) -> int | None:
    """Return the one dot-separated component in which b is a plus one, None if there is no such."""
    left, right = a.split("."), b.split(".")
    if len(left) != len(right):
        return None
    differing = [i for i, (x, y) in enumerate(zip(left, right, strict=True)) if x != y]
    if len(differing) != 1:
        return None
    x, y = left[differing[0]], right[differing[0]]
    if not (x.isascii() and x.isdecimal() and str(int(x)) == x and y == str(int(x) + 1)):
        return None  # `01` is text: its zero would be lost
    return differing[0]


def _range_text(name: str, component: int, length: int) -> str:
    """Return the text of `length` names counting up in a component from `name` on."""
    parts = name.split(".")
    parts[component] = f"{{{parts[component]}..{int(parts[component]) + length - 1}}}"
    return ".".join(parts)


def _name_runs(names: Sequence[str], joins: Callable[[int], bool] = lambda i: True) -> list[tuple[int, str]]:
    """Return (index of the first, text) of each longest run; `joins(i)` allows name i to join name i - 1."""
    runs: list[tuple[int, str]] = []
    start = 0
    while start < len(names):
        end, component = start + 1, None
        while end < len(names) and joins(end):
            found = _counting_component(names[end - 1], names[end])
            if found is None or component not in (None, found):
                break
            end, component = end + 1, found
        runs.append((start, names[start] if component is None else _range_text(names[start], component, end - start)))
        start = end
    return runs


def _print_values(values: Sequence[Value | None]) -> str:
    texts = [f"%{v.name}" if v else "_" for v in values]
    return ", ".join(text for _, text in _name_runs(texts))


def _print_types(types: Sequence[TensorType]) -> str:
    texts: list[str] = []
    start = 0
    while start < len(types):
        end = start + 1
        while end < len(types) and types[end] == types[start]:
            end += 1
        count = f"{end - start} * " if end - start > 1 else ""
        texts.append(count + print_type(types[start]))
        start = end
    return ", ".join(texts)


@dataclass(frozen=True)
class _Run:
    """Calls of one function that count up: the attribute, and the component in each column (None where it stays)."""

    attr: str
    operands: tuple[int | None, ...]
    results: tuple[int, ...]
    length: int = 2


def _call_run(ops: Sequence[Op], start: int) -> _Run | None:
    """Return the longest run of calls from `start` on, None if there are not two."""
    end = start + 1
    first: _Run | None = None
    while end < len(ops):
        pair = _run_of_calls(ops[end - 1], ops[end])
        if pair is None or first not in (None, pair):
            break
        first, end = pair, end + 1
    return first and _Run(first.attr, first.operands, first.results, end - start)


def _run_of_calls(a: Op, b: Op) -> _Run | None:
    """Return how call b follows call a, None if they cannot share a statement."""
    if not a.callee or a.callee != b.callee or a.loc != b.loc or len(a.attrs) != len(b.attrs):
        return None
    if [v.type for v in a.results] != [v.type for v in b.results] or len(a.operands) != len(b.operands):
        return None
    differing = [(x, y) for x, y in zip(a.attrs, b.attrs, strict=True) if attr_key(x) != attr_key(y)]
    if len(differing) != 1:
        return None
    (name, low), (other, high) = differing[0]
    if name != other or type(low) is not int or type(high) is not int or low < 0 or high != low + 1:
        return None
    operands: list[int | None] = []
    for x, y in zip(a.operands, b.operands, strict=True):
        if x == y:
            operands.append(None)
            continue
        found = _counting_component(x.name, y.name) if x and y else None
        if found is None:
            return None
        operands.append(found)
    results = [_counting_component(x.name, y.name) for x, y in zip(a.results, b.results, strict=True)]
    counted = tuple(r for r in results if r is not None)
    return _Run(name, tuple(operands), counted) if len(counted) == len(results) else None


def _print_calls(op: Op, run: _Run, dims: Dims) -> str:
    """Return the one statement of a run of calls that begins with `op`."""

    def text(value: Value | None, component: int | None) -> str:
        if value is None or component is None:
            return str(value or "_")
        return "%" + _range_text(value.name, component, run.length)

    results = ", ".join(map(text, op.results, run.results))
    operands = ", ".join(map(text, op.operands, run.operands))
    attrs = []
    for name, value in op.attrs:
        last = f"..{op.attributes.integer(name) + run.length - 1}" if name == run.attr else ""
        attrs.append(f"{name}={_print_attribute(value, dims)}{last}")
    return _print_statement(op, results, operands, attrs)
