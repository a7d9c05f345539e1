"""Merges functions of a new module whose bodies are equal, so that no frontend has to be right about which layers are.

A body holds no layer's number (names of weights have `{layer}` in its place), so two layers that are computed alike
have bodies that are equal in everything but the names of functions and values.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import replace

from ...ir.module import Function, Module, Op

_NUMBERED = re.compile(r"(.+)_\d+")


def merge_functions(module: Module) -> Module:
    """Return the module with one function for all whose bodies are equal; itself if no two are."""
    kept: dict[Hashable, str] = {}
    merged: dict[str, str] = {}  # the name of a function -> the name of the one that stands for it
    for function in module.functions:  # callees come before their callers
        key = function.name if function.name == "main" else _function_body(function, merged)
        merged[function.name] = kept.setdefault(key, function.name)
    survivors = [f for f in module.functions if merged[f.name] == f.name]
    if len(survivors) == len(module.functions):
        return module
    names = _renumbered_names([f.name for f in survivors])
    final = {name: names[kept_name] for name, kept_name in merged.items()}
    functions = (
        replace(f, name=final[f.name], ops=tuple(replace(op, callee=final.get(op.callee, "")) for op in f.ops))
        for f in survivors
    )
    return replace(module, functions=tuple(functions))


def _renumbered_names(names: list[str]) -> dict[str, str]:
    """Number what is left of `layer_0`, `layer_1`, ... anew; a single one needs no number."""
    found: dict[str, str] = {}
    stems = {name: m[1] for name in names if (m := _NUMBERED.fullmatch(name))}
    for stem in dict.fromkeys(stems.values()):
        group = [name for name in names if stems.get(name) == stem]
        fresh = [stem] if len(group) == 1 else [f"{stem}_{i}" for i in range(len(group))]
        found.update(zip(group, fresh, strict=True))
    others = {name: name for name in names if name not in found}
    return {**others, **found} if not set(others.values()) & set(found.values()) else {n: n for n in names}


def _function_body(function: Function, merged: Mapping[str, str]) -> Hashable:
    """Return a function without its name and with its values numbered; `repr` tells 0.0 from -0.0."""
    order = [*function.params, *(c.value for c in function.consts), *(v for op in function.ops for v in op.results)]
    numbers = {value.name: i for i, value in enumerate(order)}

    def statement(op: Op) -> Hashable:
        operands = tuple(None if v is None else numbers[v.name] for v in op.operands)
        types = tuple(v.type for v in op.results)
        return (op.name, merged.get(op.callee, op.callee), operands, repr(op.attrs), types)

    return (
        function.weights,
        tuple((p.name, p.type) for p in function.params),
        tuple((c.value.type, repr(c.recipe)) for c in function.consts),
        tuple(statement(op) for op in function.ops),
        tuple(numbers[v.name] for v in function.results),
    )
