"""Which part of a model a module of its source belongs to: experts, attention, recurrent layers, the head, or the rest.

An op of a program says of which modules of the source it is (`Op.loc`). A few ops tell what their modules are for: those
that read chosen slices of a weight, those that read a cache of past tokens or another state, and the one that makes the logits. What else is in these
modules (a router, a shared expert, projections) belongs to the same part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..ir.module import Function, Module, Op
from ..ops import OPS

EXPERTS, ATTENTION, RECURRENT, HEAD, REST = PARTS = ("experts", "attention", "recurrent", "head", "rest")


@dataclass(frozen=True)
class ModelParts:
    """The modules of a source, as patterns of their names, by the part that they belong to."""

    patterns: tuple[tuple[re.Pattern[str], str], ...]

    def part_of(self, modules: Iterable[str]) -> str:
        """Return the part of what comes from these modules of the source."""
        names = tuple(modules)
        return next((part for pattern, part in self.patterns if any(map(pattern.match, names))), REST)


def model_parts(module: Module) -> ModelParts:
    """Return the parts of a program. MoecError for an op that is not declared."""
    found: dict[str, str] = {}
    for part in (HEAD, EXPERTS, ATTENTION, RECURRENT):  # attention may have states beside its cache
        for function in module.functions:
            for name in _module_names(function, part):
                found.setdefault(name, part)
    return ModelParts(tuple((_name_pattern(name), part) for name, part in found.items()))


def _module_names(function: Function, part: str) -> Iterator[str]:
    """Yield the modules of the source whose ops say that they are for a part."""
    head = _head_of_model(function) if part == HEAD else None
    for op in function.ops:
        if op.callee:
            continue
        states = [v.type for v in op.inputs if v.type.state]
        cached = any(size.name == "P" for type in states for size in type.elements.free_symbols)
        if op is head or (part == ATTENTION and cached) or (part == RECURRENT and states):
            yield from op.loc
        elif part == EXPERTS and _chooses_slices(op):
            yield from map(_parent_module, op.loc)


def _head_of_model(function: Function) -> Op | None:
    """Return the op that multiplies by the matrix nearest to the logits."""
    if function.name != "main":
        return None
    matrices = {c.value.name for c in function.consts if len(c.value.type.shape) > 1}
    pending = [v for v in function.results if not v.type.state]
    while pending:
        op = function.producers.get(pending.pop(0).name)
        if op is None or op.callee:
            continue
        if any(v.name in matrices for v in op.inputs):
            return op
        pending += op.inputs
    return None


def _chooses_slices(op: Op) -> bool:
    """Return whether an op computes with chosen slices of a weight; one without arithmetic looks rows up."""
    definition = OPS[op.name]
    return definition.custom_flops != 0 and any(name in definition.rows for name, _ in op.named)


def _parent_module(name: str) -> str:
    """Return the module around the experts, with the router in it; a module of a layer (`layers.3.mlp`) stays."""
    parent, _, last = name.rpartition(".")
    numbered = parent.rpartition(".")[2]
    return name if not last or not parent or numbered.isdigit() or "{" in numbered else parent


def _name_pattern(name: str) -> re.Pattern[str]:
    """Return a pattern of a module's name and of those inside of it; `{layer}` is any number."""
    return re.compile(re.sub(r"\\\{[^}]*\\\}", r"[^.]+", re.escape(name)) + r"(\.|$)")
