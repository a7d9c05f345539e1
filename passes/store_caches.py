"""Stores the caches of keys and values in fewer bits than what is computed with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from ..compiler.errors import MoecError
from ..compiler.ir.module import Function, Module, Op, Value
from ..compiler.ir.names import Names
from ..compiler.ir.notes import Note, Rewritten
from ..compiler.ir.types import TensorType, make_attrs
from ..compiler.rewrite.declare import pass_

if TYPE_CHECKING:
    from ..targets import Target

PLAIN, STORED = "ort.group_query_attention", "ort.stored_attention"  # the op on a cache of f32, and that on another one
_CACHES = ("past_key", "past_value")
_SCALES = ("key_scale", "value_scale")
_DTYPES = {"f32": "f32", "f16": "f16", "bf16": "bf16", "int8": "i8"}
_ROUNDED = ("ort.grid_linear", "ort.grid_experts")  # ops that multiply activations rounded to int8
_INT8 = 4  # the accuracy at which others do

# what takes the place of a value: nothing of a scale that goes, two where a scale comes beside a cache
Replaced = dict[str, tuple[Value, ...]]


def check_type(type: str) -> None:
    """Raise MoecError for a type that no cache has."""
    if type not in ("auto", *_DTYPES):
        raise MoecError(f"caches are not stored as {type}", todo=f"there are auto, {', '.join(_DTYPES)}")


@pass_(reads="kernel", states=True, judge=check_type)
def store_caches(module: Module, target: Target | None, *, type: str = "auto") -> Rewritten:
    """Store the keys and values that attention keeps as f16, bf16 or int8 with a scale for each head and token.

    `auto` is f16 where activations are rounded to int8 in front of weights, which costs far more than ten times as much
    quality, if the target has kernels that read it, and else leaves caches as they are. Caches that other ops read stay f32.
    """
    asked = type
    if asked == "auto":
        fast = target is not None and target.narrow_caches is not None and target.narrow_caches()
        if not fast or not any(_rounds_activations(op) for f in module.functions for op in f.ops):
            return Rewritten(module)
        asked = "f16"
    found, kept = _store_all(module, _DTYPES[asked])
    if kept and type not in ("auto", "f32"):
        names = ", ".join(kept[:4]) + (" ..." if len(kept) > 4 else "")
        what = f"{len(kept)} states are not stored as {type}: {names}"
        if found is module:
            raise MoecError(what, todo="leave --kv out: only keys and values that one attention op reads can be")
        return Rewritten(found, (Note(what),))
    return Rewritten(found)


def _rounds_activations(op: Op) -> bool:
    return op.name in _ROUNDED or op.attributes.get("accuracy") == _INT8


def _store_all(module: Module, dtype: str) -> tuple[Module, list[str]]:
    """Return the module with its caches in a dtype, and the states of the program that are in another one."""
    blocked: set[str] = set()
    while True:
        made: dict[str, _Changed] = {}
        problem = None
        for function in module.functions:
            made[function.name] = changed = _change_function(function, dtype, made, blocked)
            problem = problem or changed.blocks
        if problem is None:
            break
        blocked.add(problem)
    module = module.with_functions({name: changed.function for name, changed in made.items()})
    states = [v for v in module.main.params if v.type.state]
    scales = {b for a, b in pairwise(states) if a.type.dtype == "i8" and b.type.shape == a.type.shape[:3]}
    return module, [v.name for v in states if v.type.dtype != dtype and v not in scales]


@dataclass(frozen=True)
class _Changed:
    """A function before and after, what took the place of its parameters and results, and the callee that must stay as it is.

    A callee blocks where its caller does more with a cache than to hand it on.
    """

    before: Function
    function: Function
    replaced: Replaced
    blocks: str | None = None


def _change_function(function: Function, dtype: str, made: Mapping[str, _Changed], blocked: set[str]) -> _Changed:
    names, replaced = Names(function.names), dict[str, tuple[Value, ...]]()
    for op in function.ops:
        callee = made.get(op.callee)
        if callee is not None and callee.function is not callee.before:
            if function.name in blocked or not _hands_on(function, op, callee):
                return _Changed(function, function, {}, blocks=op.callee)
            _replace_call(op, callee, names, replaced)
        elif op.name in (PLAIN, STORED) and function.name not in blocked and _keeps_to_itself(function, op, dtype):
            _replace_states(op, dtype, names, replaced)
    if not replaced:
        return _Changed(function, function, {})
    return _Changed(
        function,
        replace(
            function,
            params=_flatten(function.params, replaced),
            ops=tuple(_change_op(op, dtype, replaced) for op in function.ops),
            results=_flatten(function.results, replaced),
        ),
        replaced,
    )


def _flatten(values: Sequence[Value], replaced: Replaced) -> tuple[Value, ...]:
    return tuple(v for value in values for v in replaced.get(value.name, (value,)))


def _states_of(op: Op) -> Iterator[tuple[Value, Value | None, Value, Value | None]]:
    """Yield the cache, its scale, the cache with more in it and the scale of that, for the keys and the values of an op."""
    for i, (cache, scale) in enumerate(zip(_CACHES, _SCALES, strict=True)):
        given = op.get(scale) if op.name == STORED else None
        yield op[cache], given, op.results[1 + i], op.results[3 + i] if given else None


def _keeps_to_itself(function: Function, op: Op, dtype: str) -> bool:
    """Return whether a function takes an op's caches, which are of another dtype, for this op only and returns what becomes of them."""
    params, results = {v.name for v in function.params}, {v.name for v in function.results}
    if op[_CACHES[0]].type.dtype == dtype:
        return False
    for past, _, present, _ in _states_of(op):
        if past.name not in params or function.uses[past.name] != [op] or present.name not in results:
            return False
        if function.uses[present.name] != [None]:
            return False
    return True


def _hands_on(function: Function, call: Op, callee: _Changed) -> bool:
    """Return whether a function takes the caches of a call for it only, and returns what becomes of them."""
    params = {v.name for v in function.params}
    for given, param in zip(call.operands, callee.before.params, strict=True):
        if param.name in callee.replaced and (
            given is None or given.name not in params or function.uses[given.name] != [call]
        ):
            return False
    pairs = zip(call.results, callee.before.results, strict=True)
    return all(function.uses.get(v.name) == [None] for v, result in pairs if result.name in callee.replaced)


def _replace_states(op: Op, dtype: str, names: Names, replaced: Replaced) -> None:
    for past, scale, present, present_scale in _states_of(op):
        for value, old in ((past, scale), (present, present_scale)):
            stored = Value(value.name, replace(value.type, dtype=dtype))
            scales = TensorType("f32", value.type.shape[:3], state=True)
            added = (Value(names.fresh(f"{value.name}_scale"), scales),) if dtype == "i8" else ()
            replaced[value.name] = (stored, *added)
            if old is not None:
                replaced[old.name] = ()


def _replace_call(call: Op, callee: _Changed, names: Names, replaced: Replaced) -> None:
    """Replace what a call takes and gives as the callee's parameters and results were."""
    pairs = [
        *zip(call.operands, callee.before.params, strict=True), *zip(call.results, callee.before.results, strict=True)
    ]  # fmt: skip
    for value, inner in pairs:
        if value is None or inner.name not in callee.replaced or value.name in replaced:
            continue
        found = callee.replaced[inner.name]
        stored = [Value(value.name, v.type) for v in found[:1]]
        added = [Value(names.fresh(f"{value.name}_scale"), v.type) for v in found[1:]]
        replaced[value.name] = (*stored, *added)


def _change_op(op: Op, dtype: str, replaced: Replaced) -> Op:
    """Return an op with what took the place of its operands and results."""
    if op.name in (PLAIN, STORED) and op[_CACHES[0]].name in replaced:
        return _change_attention(op, dtype, replaced)
    if not op.callee:
        return op
    operands = [v for value in op.operands for v in ((None,) if value is None else replaced.get(value.name, (value,)))]
    return replace(op, operands=tuple(operands), results=_flatten(op.results, replaced))


def _change_attention(op: Op, dtype: str, replaced: Replaced) -> Op:
    pasts = [replaced[op[name].name] for name in _CACHES]
    presents = [replaced[op.results[1 + i].name] for i in range(2)]
    scales = [found[1] if found[1:] else None for found in pasts]
    others = [op.get(name) for name in ("cos", "sin", "bias", "sinks")]
    stored = dtype != "f32"
    operands = (op["q"], op.get("k"), op.get("v"), *(found[0] for found in pasts), *(scales if stored else ()), *others)
    results = (op.results[0], *(found[0] for found in presents), *(v for found in presents for v in found[1:]))
    return Op(STORED if stored else PLAIN, operands, results, make_attrs(op.attributes), loc=op.loc)
