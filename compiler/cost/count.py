"""What a module holds, reads and computes: parameters, bytes, FLOPs and states, from the IR alone.

Every op declares its FLOPs and, for tables and routed experts, how many slices of a weight one run reads
(`OpDef.flops`, `OpDef.rows`); nothing here knows an op by name. Formulas are in the module's dims. Per token means
one decoded token: B = 1, S = 1.

A tensor of the checkpoint counts once, however many weights and layers read it; the first call that reads it owns it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import lru_cache

import sympy

from ..errors import MoecError
from ..ir.dims import Size, evaluate
from ..ir.module import Const, Function, Module, Op, Value, walk_calls
from ..ir.recipes import Literal, Recipe, Tensor, bind_recipe
from ..ir.types import TensorType, expand_range
from ..ops import OPS, OpDef
from .states import States, growth_per_token, passed_on

TABLE, EXPERTS, DENSE = 0, 1, 2  # how a weight is read; the strongest use of a tensor decides

# Items of a step that hold no parameters of their own (scales).
AUXILIARY: Mapping[str, tuple[int, ...]] = {"dequantize": (1, 2), "packed": (1, 2), "gather": (1,), "scale": (1,)}
# Steps whose item holds several parameters in an element.
DENSE_ITEMS = ("unpack", "blocks")


@dataclass(frozen=True)
class Cost:
    """The cost of one call of a function, or of several: what it holds, reads and computes. Bytes are bytes, not bits."""

    parameters: int = 0  # elements of the checkpoint's tensors; scales are no parameters
    expert_parameters: int = 0  # those of routed experts
    table_parameters: int = 0  # those that are only looked up (embeddings)
    active_parameters: int = 0  # that one token uses: k of E experts, the rest whole, tables whole too
    stored_bytes: int = 0  # in the checkpoint, with scales
    stored_bytes_read: int = 0  # of these, what one decoded token reads
    compiled_bytes: int = 0  # of the weights as the IR types them
    compiled_bytes_read: int = 0  # of these, what one decoded token reads
    flops: Size = sympy.S.Zero  # of one run of the program, a formula
    state_bytes: Size = sympy.S.Zero  # of the states that one run starts from, a formula
    state_bytes_kept: Size = sympy.S.Zero  # of these, what a step can still read: a layer with a window needs no more
    state_bytes_read: Size = sympy.S.Zero  # of these, what decoding one token reads

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)))

    @property
    def active_without_tables(self) -> int:
        """The parameters that one token computes with: active ones less the tables."""
        return self.active_parameters - self.table_parameters


_STATES = ("state_bytes", "state_bytes_kept", "state_bytes_read")
_FORMULAS = ("flops", *_STATES)


@dataclass(frozen=True)
class CallCost:
    """One call of a function: what the call binds, e.g. {"layer": "3"}, and its cost without the calls in it."""

    function: str
    bindings: Mapping[str, str]
    cost: Cost


@dataclass(frozen=True)
class FunctionCost:
    """A function with all its calls; `cost` is that of all of them together."""

    function: Function
    layers: tuple[CallCost, ...]
    cost: Cost


@dataclass(frozen=True)
class Costs:
    """The costs of a module: by function, by call in program order, and in all."""

    module: Module
    kinds: tuple[FunctionCost, ...]
    layers: tuple[CallCost, ...]
    total: Cost
    weights: tuple[tuple[int, Fraction], ...]  # bytes of each weight as compiled, and which share of it one token reads

    def step_bytes(self, batch: int, past: int) -> tuple[int, int]:
        """Return the bytes of weights and of states that a step of one token of each of `batch` sequences reads.

        With balanced routing a token leaves a share of the experts aside, and so does each of the others by itself.
        """
        weights = sum(size * (1.0 - float(1 - share) ** batch) for size, share in self.weights)
        return round(weights), batch * self.at(self.total.state_bytes_read, past)

    def dims(self, new: int = 1, past: int = 0) -> dict[str, int]:
        """Return values for every dim: B of 1, S and P as given, any other as small as it may be (but not 0)."""
        return _dim_values(self.module, 1, new, past)

    def at(self, formula: Size, past: int) -> int:
        """Return a formula for one token behind `past` others of one sequence."""
        return evaluate(formula, self.dims(past=past))

    def state_growth(self, formula: Size, context: int) -> tuple[int, int]:
        """Return (what one more token adds behind `context` others, what is there whatever the length) of a formula."""
        each = growth_per_token(formula, self.at, context)
        return round(each), round(self.at(formula, context) - each * context)


def module_costs(module: Module) -> Costs:
    """Return the costs of a module. MoecError for an op that is not declared (a target not imported)."""
    at = _dim_values(module, 1, 1, 0)
    uses = {f.name: [(c, *_strongest_use(f, c.value, at)) for c in f.consts] for f in module.functions}
    kept, needed = States(module, "reach"), States(module, "reads")
    formulas = {
        f.name: Cost(
            flops=_function_flops(f), state_bytes=_own_states(f),
            state_bytes_kept=kept.bytes(f, True, _bytes_each), state_bytes_read=needed.bytes(f, True, _bytes_each),
        )
        for f in module.functions
    }  # fmt: skip
    calls = list(walk_calls(module))
    weights = [Cost()] * len(calls)
    stored, compiled = _held_weights(calls, uses)
    for owner, cost in _weight_costs(stored, compiled):
        weights[owner] += cost
    layers = []
    for (function, bound), cost in zip(calls, weights, strict=True):
        layers.append(CallCost(function.name, bound, cost + formulas[function.name]))
    kinds = [_sum_calls(f, tuple(layer for layer in layers if layer.function == f.name)) for f in module.functions]
    # the states are those of the program, since two layers may share one
    states = Cost(
        state_bytes=sympy.Add(*(p.type.bytes for p in module.main.params if p.type.state)),
        state_bytes_kept=kept.bytes(module.main, False, _bytes_each),
        state_bytes_read=needed.bytes(module.main, False, _bytes_each),
    )
    total = _sum_costs([replace(kind.cost, **dict.fromkeys(_STATES, sympy.S.Zero)) for kind in kinds] + [states])
    read = tuple((held.size, held.share) for held in compiled)
    return Costs(module, tuple(k for k in kinds if k.layers), tuple(layers), total, read)


def _bytes_each(type: TensorType) -> Size:
    return sympy.Rational(type.bits) / 8


def _dim_values(module: Module, batch: int, new: int, past: int) -> dict[str, int]:
    return {**{d.name: max(1, d.low) for d in module.dims}, "B": batch, "S": new, "P": past}


def _sum_calls(function: Function, layers: tuple[CallCost, ...]) -> FunctionCost:
    """Add up the calls of one function; its formulas are equal in all of them."""
    numbers = _sum_costs([replace(layer.cost, **dict.fromkeys(_FORMULAS, sympy.S.Zero)) for layer in layers])
    formulas = {name: getattr(layers[0].cost, name) * len(layers) if layers else sympy.S.Zero for name in _FORMULAS}
    return FunctionCost(function, layers, replace(numbers, **formulas))


def _sum_costs(costs: list[Cost]) -> Cost:
    """Add up costs, formulas in one step: that is quicker than 94 sums of expressions."""
    numbers = {f.name: sum(getattr(c, f.name) for c in costs) for f in fields(Cost) if f.name not in _FORMULAS}
    formulas = {name: sympy.expand(sympy.Add(*(getattr(c, name) for c in costs))) for name in _FORMULAS}
    return Cost(**numbers, **formulas)


# --- weights -------------------------------------------------------------------------------------------------------

Use = tuple[Const, int, Fraction]  # a weight, how it is read, and which share of it one token reads


@dataclass
class _Held:
    """A tensor, or a finished weight, while its uses are collected."""

    owner: int
    parameters: int
    size: int
    role: int
    share: Fraction


def _held_weights(
    calls: list[tuple[Function, dict[str, str]]], uses: Mapping[str, list[Use]]
) -> tuple[Collection[_Held], Collection[_Held]]:
    """Return every tensor of the checkpoint, and every finished weight, with its strongest use."""
    stored: dict[str, _Held] = {}
    compiled: dict[Recipe, _Held] = {}
    for number, (function, bound) in enumerate(calls):
        for const, role, share in uses[function.name]:
            size = _ceil_size(const.value.type.bytes)
            recipe = bind_recipe(const.recipe, function.weights, bound)
            _add_use(compiled, recipe, _Held(number, 0, size, role, share))
            for tensor, held_each in tensors_with_shares(recipe):
                count = len(expand_range(tensor.name))
                # a table of i64 says where to look (experts by token, say), it is nothing that was learned
                learned = 0 if tensor.type.dtype == "i64" else held_each
                parameters = _ceil_size(count * tensor.type.elements * learned)
                held = _Held(number, parameters, count * _ceil_size(tensor.type.bytes), role, share)
                _add_use(stored, tensor.name, held)
    return stored.values(), compiled.values()


def _weight_costs(stored: Iterable[_Held], compiled: Iterable[_Held]) -> Iterator[tuple[int, Cost]]:
    """Yield the cost of every tensor and of every finished weight, with the number of the call that owns it."""
    for held in stored:
        n = held.parameters
        yield (
            held.owner,
            Cost(
                parameters=n,
                expert_parameters=n if held.role == EXPERTS else 0,
                table_parameters=n if held.role == TABLE else 0,
                active_parameters=n if held.role == TABLE else round(n * held.share),
                stored_bytes=held.size,
                stored_bytes_read=round(held.size * held.share),
            ),
        )
    for held in compiled:
        yield held.owner, Cost(compiled_bytes=held.size, compiled_bytes_read=round(held.size * held.share))


def _add_use(table: dict, key: object, new: _Held) -> None:
    """Enter a use; of two uses of the same thing the stronger one counts."""
    held = table.setdefault(key, new)
    held.role, held.share = max(held.role, new.role), max(held.share, new.share)


def tensors_with_shares(recipe: Recipe) -> Iterator[tuple[Tensor, Size]]:
    """Yield the checkpoint tensors of a recipe, ranges not spread out, and the parameters that an element holds."""
    match recipe:
        case Tensor():
            yield recipe, sympy.S.One
        case Literal():
            return
        case _:
            auxiliary = AUXILIARY.get(recipe.name, ())
            dense = recipe.name in DENSE_ITEMS
            for i, item in enumerate(recipe.items):
                times = 0 if i in auxiliary else recipe.type.elements / item.type.elements if dense else 1
                yield from ((tensor, share * times) for tensor, share in tensors_with_shares(item))


@lru_cache(maxsize=65536)
def _ceil_size(size: Size) -> int:
    return int(sympy.ceiling(size))


def _strongest_use(function: Function, value: Value, at: Mapping[str, int]) -> tuple[int, Fraction]:
    """Return how a value is read, and the share of it that one token reads: the strongest of its uses."""
    role, share = DENSE, Fraction(0)
    found: list[tuple[int, Fraction]] = []
    for op in function.uses.get(value.name, []):
        if op is None or op.callee:
            found.append((DENSE, Fraction(1)))
        else:
            found += [_operand_use(function, op, i, v, at) for i, v in enumerate(op.operands) if v == value]
    if found:
        role, share = max(role for role, _ in found), max(share for _, share in found)
    return role, share


def _operand_use(function: Function, op: Op, index: int, value: Value, at: Mapping[str, int]) -> tuple[int, Fraction]:
    definition = _op_definition(op)
    rows = definition.rows.get(definition.operand_name(index))
    first = value.type.shape[0] if value.type.shape else None
    if rows is not None:
        types = [None if v is None else v.type for v in op.operands]
        read = evaluate(rows(types, op.settings), at)
        # an op without arithmetic looks rows up; one with arithmetic computes with the chosen experts
        role = TABLE if definition.custom_flops == 0 else EXPERTS
        return role, min(Fraction(1), Fraction(read, evaluate(value.type.shape[0], at)))
    if len(op.inputs) == 1 and len(op.results) == 1 and op.results[0].type.shape[:1] == (first,):
        return _strongest_use(
            function, op.results[0], at
        )  # another form of the same slices (a cast, say): what is it read for?
    return DENSE, Fraction(1)


def _op_definition(op: Op) -> OpDef:
    if op.name not in OPS:
        raise MoecError(f"unknown op {op.name}", model=", ".join(op.loc), todo="moec list ops shows the known ones")
    return OPS[op.name]


# --- formulas ------------------------------------------------------------------------------------------------------


def op_flops(op: Op) -> Size:
    """Return the FLOPs of one op as a formula; those of a call stand with its callee."""
    if op.callee:
        return sympy.S.Zero
    operands = [None if v is None else v.type for v in op.operands]
    return _op_definition(op).flops(operands, tuple(v.type for v in op.results), op.attributes)


def _function_flops(function: Function) -> Size:
    return sympy.expand(sympy.Add(*(op_flops(op) for op in function.ops)))


def _own_states(function: Function) -> Size:
    """Return the bytes of the states that a function uses itself rather than passing them on to a call."""
    own = [p.type.bytes for p in function.params if p.type.state and not passed_on(function, p)]
    return sympy.expand(sympy.Add(*own))
