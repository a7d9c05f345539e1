"""Bindings: what each argument of a kernel is, so that a launcher need not guess.

An argument is an operand or a result of the op that the kernel computes, a part of a packed weight, a state that is
appended to where it lies, or a scratch buffer between the kernels of one op. The scalars B, S and P of a kernel are the
program's dims; every other one follows from how many elements one of its arguments has.

An argument may have the axes of its operand merged or split, but never in another order: that is checked here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import sympy

from ....compiler.errors import MoecError
from ....compiler.formats.format import PART_NAMES
from ....compiler.ir.dims import Size, dim
from ....compiler.ir.module import Op
from ....compiler.ir.types import TensorType
from ....compiler.ops import OPS
from ..kernels.low_precision import FACTORS
from ..select.search import KernelTemplate
from ..tile.expr import Expr, evaluate_expr
from ..tile.packing import Packing
from ..tile.tiles import Argument, Program

DIMS = ("B", "S", "P")  # scalars that are the program's dims of these names


@dataclass(frozen=True)
class Bound:
    """The binding of an argument: exactly one of `operand`, `result` and `scratch` is named.

    `part` is that of a packed weight ("" for one that lies as plain values). `past` is the operand that a result is
    appended to: both lie in one buffer, which the argument is.
    """

    operand: str = ""
    result: str = ""
    scratch: str = ""
    part: str = ""
    past: str = ""

    def to_json(self) -> dict[str, str]:
        """Return the names that are set."""
        return {key: value for key, value in vars(self).items() if value}

    @staticmethod
    def from_json(data: Mapping[str, str]) -> Bound:
        """Return what `to_json` made."""
        return Bound(**data)


@dataclass(frozen=True)
class Binding:
    """The arguments of a kernel in their order, and how its scalars that are no dims are found.

    `scalars`: name -> (argument, expression): the scalar is the argument's elements divided by the expression.
    """

    arguments: Mapping[str, Bound] = field(default_factory=dict)
    scalars: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the binding as JSON values."""
        return {
            "arguments": {name: bound.to_json() for name, bound in self.arguments.items()},
            "scalars": {name: {"elements": argument, "over": over} for name, (argument, over) in self.scalars.items()},
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Binding:
        """Return what `to_json` made."""
        return Binding(
            {name: Bound.from_json(bound) for name, bound in data["arguments"].items()},
            {name: (found["elements"], found["over"]) for name, found in data["scalars"].items()},
        )


def bind_kernel(
    op: str, kernel: KernelTemplate, program: Program, weights: Mapping[str, Packing], before: set[str]
) -> Binding:
    """Return the binding of a kernel of an op; scratch buffers that it writes are added to `before`.

    MoecError for an argument that is no operand, no result and not in `before`.
    """
    definition = OPS[op].signature
    operands, results = ({v.name for v in values} for values in (definition.operands, definition.results))
    found: dict[str, Bound] = {}
    for a in program.arguments:
        name = _renamed_argument(kernel, a)
        base, part = _split_part(name)
        state, of_state = (a.name, "") if a.name in kernel.appended else _split_part(a.name)
        if state in kernel.appended:
            past, result = kernel.appended[state]
            found[a.name] = Bound(result=result, past=past, part=of_state)
        elif a.role == "output" and name in results:
            found[a.name] = Bound(result=name)
        elif a.role == "output" and base in results:
            found[a.name] = Bound(result=base, part=part)
        elif a.role == "output":
            before.add(name)
            found[a.name] = Bound(scratch=name)
        elif name in before:
            found[a.name] = Bound(scratch=name)
        else:
            found[a.name] = _input_binding(kernel, a, operands, weights)
    return Binding(found, _scalar_sources(kernel.name, program, found))


def _input_binding(kernel: KernelTemplate, a: Argument, operands: set[str], weights: Mapping[str, Packing]) -> Bound:
    """Return the operand that an argument is, or the part of a packed weight."""
    for weight, packing in weights.items():
        for base in (weight, *(mine for mine, name in kernel.renamed.items() if name == weight)):
            if a.role == "weight" and a.name == base and "" in packing.parts:
                return Bound(operand=weight)
            part = a.name.removeprefix(f"{base}_")
            if a.role == "weight" and part != a.name and part in packing.parts:
                return Bound(operand=weight, part=part)
    name = _renamed_argument(kernel, a)
    base, part = _split_part(name)
    if name not in operands and base in operands:
        return Bound(operand=base, part=part)
    if name not in operands:
        raise MoecError(f"the argument {a.name} of {kernel.name} is no operand of its op", exit_code=1)
    return Bound(operand=name)


def _renamed_argument(kernel: KernelTemplate, a: Argument) -> str:
    """Return the name that an argument, or the value that it is a part of, has for the op."""
    base, part = _split_part(a.name)
    if part and base in kernel.renamed and a.name not in kernel.renamed:
        return f"{kernel.renamed[base]}_{part}"
    return kernel.renamed.get(a.name, a.name)


def _split_part(name: str) -> tuple[str, str]:
    """Return the name of a value in a quantized format and of its part that an argument is; the part is "" for others."""
    base, _, part = name.rpartition("_")
    return (base, part) if part in (*PART_NAMES, FACTORS) else (name, "")


def _scalar_sources(kernel: str, program: Program, bound: Mapping[str, Bound]) -> dict[str, tuple[str, str]]:
    """Return how the scalars that are no dims are found: each from an argument whose other sizes are known by then."""
    known = {name for name in program.scalars if name in DIMS}
    found: dict[str, tuple[str, str]] = {}
    # an operand's size is given from outside, a result's is only as good as what it was made from
    order = sorted(program.arguments, key=lambda a: (bool(bound[a.name].result), bool(bound[a.name].scratch)))
    while lacking := [name for name in program.scalars if name not in known]:
        pair = next(((n, a, over) for n in lacking for a in order if (over := _scalar_divisor(a, n, known))), None)
        if pair is None:
            raise MoecError(f"{kernel}: no argument says how large {', '.join(lacking)} is", exit_code=1)
        name, argument, over = pair
        found[name] = (argument.name, over)
        known.add(name)
    return found


def _scalar_divisor(a: Argument, scalar: str, known: set[str]) -> str | None:
    """Return what an argument's elements are divided by to have a scalar; None if it does not say it."""
    total = element_count(a.shape)
    if total is None:
        return None
    over = sympy.cancel(total / dim(scalar))
    symbols = {s.name for s in over.free_symbols}
    if not total.has(dim(scalar)) or scalar in symbols or not symbols <= known or not over.is_polynomial():
        return None
    return str(over)


def element_count(shape: Sequence[int | Expr]) -> Size | None:
    """Return the product of an argument's sizes as a formula; None where one is not of sums and products."""
    sizes = symbolic_sizes(tuple(shape))
    return None if sizes is None else sympy.Mul(*sizes)


@lru_cache(maxsize=4096)
def symbolic_sizes(shape: tuple[int | Expr, ...]) -> tuple[Size, ...] | None:
    """Return sizes in the language of tiles as formulas; None where one takes a minimum or the like."""
    try:
        return tuple(
            sympy.sympify(evaluate_expr(n, {} if isinstance(n, int) else {name: dim(name) for name in n.names}))
            for n in shape
        )
    except TypeError:  # numpy's functions do not take formulas
        return None


# --- shapes --------------------------------------------------------------------------------------------------------


def check_op(op: Op, program: Program, binding: Binding, what: str) -> None:
    """Check that every argument has the axes of its operand or result in their order, merged or split at most.

    MoecError otherwise: the kernel would read values that mean something else.
    """
    definition = OPS[op.name].signature
    types = {("operand", name): v for name, v in op.named}
    types |= {("result", d.name): v for d, v in zip(definition.results, op.results, strict=True)}
    for a in program.arguments:
        bound = binding.arguments[a.name]
        value = types.get(("operand", bound.operand)) or types.get(("result", bound.result))
        packed = bound.part or (a.role == "weight" and len(a.shape) > 1)  # lies as the packing says
        if value is not None and not packed and not agrees_with_shape(value.type, tuple(a.shape)):
            sizes = ", ".join(map(str, a.shape))
            raise MoecError(f"{what}: {program.name} has {a.name} as [{sizes}], it is {value.type}", exit_code=1)


@lru_cache(maxsize=4096)
def agrees_with_shape(type: TensorType, shape: tuple[int | Expr, ...]) -> bool:
    """Return whether row by row a tensor of a type is one of a kernel's shape, without exchanging axes.

    Scalars that are no dims stand for any size; where a size is no formula of sums and products, only what is between
    the other axes can be compared, so that it counts as right.
    """
    sizes = symbolic_sizes(shape)
    if sizes is None:
        return True
    given = [n for n in type.shape if n != 1]
    names = sorted({s.name for n in sizes for s in n.free_symbols if s.name not in DIMS})
    free = [dim(f"kernel's {name}") for name in names]  # a program may have a dim of the same name
    renamed = dict(zip(map(dim, names), free, strict=True))
    wanted = [n.subs(renamed) for n in sizes if n != 1]
    if free:
        found = _solve_scalars(given, wanted, free)
        if found is None:
            return False
        wanted = [n.subs(found) for n in wanted]
    return _is_regrouped(given, [n for n in wanted if n != 1])


def _solve_scalars(
    given: Sequence[Size], wanted: Sequence[Size], free: Sequence[sympy.Symbol]
) -> dict[Any, Size] | None:
    """Return the sizes that scalars represent. Several of them are axes of their own, compared one by one."""
    if len(free) == 1 and not any(n == free[0] for n in wanted):
        left = sympy.cancel(sympy.Mul(*given) / (sympy.Mul(*wanted) / free[0]))
        return None if left.has(free[0]) else {free[0]: left}
    if len(free) == 1:
        return {free[0]: sympy.cancel(sympy.Mul(*given) / sympy.Mul(*(n for n in wanted if n != free[0])))}
    if len(given) == len(wanted):
        return {n: size for n, size in zip(wanted, given, strict=True) if n in free}
    return None


def _is_regrouped(one: Sequence[Size], two: Sequence[Size]) -> bool:
    """Return whether two lists of sizes are the same axes, merged or split."""
    first, second = list(_running_products(one)), list(_running_products(two))
    if not first or not second:
        return first == second
    common = [(i, j) for i, n in enumerate(first, 1) for j, m in enumerate(second, 1) if sympy.expand(n - m) == 0]
    if not common or common[-1] != (len(first), len(second)):
        return False
    return all(min(i - k, j - m) == 1 for (k, m), (i, j) in zip([(0, 0), *common], common, strict=False))


def _running_products(sizes: Iterable[Size]) -> Iterable[Size]:
    total: Size = sympy.Integer(1)
    for n in sizes:
        total = total * n
        yield total
