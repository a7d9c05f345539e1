"""The declaration of an op: one signature, one docstring, one torch function, one cost.

From it come verification, result types, printing, documentation, the interpreter, random test inputs and costs.
In a signature a single capital letter in the dtype's place is a dtype variable, a lower-case name there is an
attribute or a fixed dtype, `*X` is any number of sizes, names in sizes are bound by the operands. The variable `Q` is
that of weights: the dtype of `A`, or a quantized format (which stands for its numbers in f32).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, TypeAlias

import sympy

from ..errors import MoecError
from ..errors.plugins import OPS as BROUGHT
from ..errors.plugins import register_brought
from ..formats.table import find_format
from ..ir.declared import DECLARED, Ops
from ..ir.dims import Size, size, size_text
from ..ir.dtypes import DTYPES
from ..ir.fragments import Operand, Signature, parse_signature
from ..ir.types import TensorType, make_attrs

Types: TypeAlias = Sequence[Any]  # TensorType, None for an absent operand
Attributes = Mapping[str, Any]
Infer = Callable[[Types, Attributes], tuple[TensorType, ...]]
Flops = Callable[[Types, tuple[TensorType, ...], Attributes], Size | int]
Domain = Callable[[Types, Attributes], Size]

ANY = "any"  # in a signature: the operand may have any dtype
REQUIRED = object()  # the default of an attribute that has none


OPS: Ops[OpDef] = DECLARED


def inference_error(what: str) -> MoecError:
    """Return the error of an inference rule; the caller adds the place."""
    return MoecError(what)


def any_size_text(expression: Size) -> str:
    """Return a size as text, also one that the grammar could not say."""
    try:
        return size_text(sympy.expand(expression))
    except ValueError:
        return str(expression)


@dataclass(frozen=True)
class OpDef:
    """The declaration of an op. `reference` takes the operands (absent ones as None) and the attributes."""

    name: str
    doc: str
    text: str
    reference: Callable[..., Any]
    custom_infer: Infer | None
    custom_flops: Flops | int | None
    domains: Mapping[str, Domain]  # exclusive upper bound of an integer operand, for random inputs
    distinct: tuple[str, ...]  # integer operands whose last axis holds distinct numbers
    in_place: tuple[str, ...]  # states that the op only appends to: a runtime may keep them in one buffer
    rows: Mapping[str, Domain]  # operand -> slices of its first axis that one run reads at most; others are read whole
    reads: Mapping[str, Domain]  # operand -> numbers of it that one run reads at most; others are read whole
    reach: Mapping[str, Domain]  # operand -> numbers of it that this or a later step can read; others are kept whole
    appends: tuple[str, ...]  # states that grow where they lie: only what is new is written
    view: bool = False  # the same numbers in another shape: nothing has to be moved
    stored: tuple[
        str, ...
    ] = ()  # states, operands or results, that lie as the attribute `cache` says: in 8 bits, or as others

    @cached_property
    def signature(self) -> Signature:
        """The parsed signature."""
        return parse_signature(self.text)

    @cached_property
    def attrs(self) -> dict[str, tuple[Any, Any]]:
        """Attribute name -> (annotated type, default or REQUIRED)."""
        parameters = inspect.signature(self.reference, eval_str=False).parameters.values()
        return {
            p.name: (p.annotation, REQUIRED if p.default is p.empty else p.default)
            for p in parameters
            if p.kind is p.KEYWORD_ONLY and not p.name.startswith("_")
        }

    @cached_property
    def places(self) -> dict[str, int]:
        """The place of each operand by its name; of one that may be repeated, the first."""
        return {operand.name: place for place, operand in enumerate(self.signature.operands)}

    def operand_name(self, place: int) -> str:
        """Return the name of the operand at a place; the last one may be repeated."""
        operands = self.signature.operands
        return operands[min(place, len(operands) - 1)].name

    def complete(self, attributes: Attributes) -> dict[str, Any]:
        """Return the attributes with defaults filled in; MoecError for an unknown or a missing one."""
        unknown = set(attributes) - set(self.attrs)
        if unknown:
            known = ", ".join(sorted(self.attrs)) or "none"
            raise inference_error(f"{self.name} has no attribute {', '.join(sorted(unknown))}; it has: {known}")
        full = {name: attributes.get(name, default) for name, (_, default) in self.attrs.items()}
        missing = [name for name, value in full.items() if value is REQUIRED]
        if missing:
            raise inference_error(f"{self.name} needs the attribute {', '.join(missing)}")
        return full

    def infer(self, operands: Types, attributes: Attributes) -> tuple[TensorType, ...]:
        """Return the result types; MoecError says which operand or attribute does not fit."""
        return _infer_types(self.name, tuple(operands), make_attrs(attributes))

    def flops(self, operands: Types, results: tuple[TensorType, ...], attributes: Attributes) -> Size:
        """Return the floating-point operations as a formula; by default one for every element of the first result."""
        match self.custom_flops:
            case None:
                return results[0].elements
            case int():
                return size(self.custom_flops)
        return size(self.custom_flops(operands, results, self.complete(attributes)))


def op(
    name: str,
    signature: str,
    *,
    doc: str = "",
    infer: Infer | None = None,
    flops: Flops | int | None = None,
    domains: Mapping[str, Domain] | None = None,
    distinct: tuple[str, ...] = (),
    in_place: tuple[str, ...] = (),
    rows: Mapping[str, Domain] | None = None,
    reads: Mapping[str, Domain] | None = None,
    reach: Mapping[str, Domain] | None = None,
    appends: tuple[str, ...] = (),
    view: bool = False,
    stored: tuple[str, ...] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare an op; the decorated torch function is its meaning and its keyword-only parameters its attributes."""

    def declare(reference: Callable[..., Any]) -> Callable[..., Any]:
        if dict.__contains__(OPS, name):
            raise ValueError(f"op {name} is declared twice")
        text = doc or inspect.cleandoc(reference.__doc__ or "")
        OPS[name] = OpDef(
            name, text, signature, reference, infer, flops, domains or {}, distinct, in_place, rows or {}, reads or {},
            reach or {}, (*in_place, *appends), view, stored,
        )  # fmt: skip
        if reference.__module__.partition(".")[0] != __name__.partition(".")[0]:
            register_brought(BROUGHT, name.partition(".")[0], reference)
        return reference

    return declare


# --- inference from the signature ------------------------------------------------------------------------------

Bound = dict[str, Any]  # dtype variables as "A:", star names as "*X" -> tuple of sizes, sizes by name


@lru_cache(maxsize=65536)
def _infer_types(name: str, operands: tuple[TensorType | None, ...], attrs: tuple) -> tuple[TensorType, ...]:
    definition = OPS[name]
    attributes = definition.complete(dict(attrs))
    bound: Bound = {key: size(value) for key, value in attributes.items() if _is_size(value)}
    for operand, given in _pair_operands(definition, operands):
        if given is None:
            if not operand.optional:
                raise inference_error(f"{name} needs the operand {operand.name}")
            continue
        _bind_variables(name, operand, given, bound)
    if definition.custom_infer:
        return definition.custom_infer(operands, attributes)
    return tuple(_result_type(definition, operand, bound, attributes) for operand in definition.signature.results)


def _is_size(value: Any) -> bool:
    return isinstance(value, (int, sympy.Expr)) and not isinstance(value, bool)


def _pair_operands(definition: OpDef, operands: Types) -> list[tuple[Operand, TensorType | None]]:
    params = definition.signature.operands
    if params and params[-1].variadic:
        fixed = params[:-1]
        if len(operands) <= len(fixed):
            raise inference_error(f"{definition.name} takes at least {len(fixed) + 1} operands, {len(operands)} given")
        repeated = [params[-1]] * (len(operands) - len(fixed))
        return list(zip([*fixed, *repeated], operands, strict=True))
    if len(operands) != len(params):
        names = ", ".join(p.name for p in params) or "none"
        raise inference_error(f"{definition.name} takes {len(params)} operands ({names}), {len(operands)} given")
    return list(zip(params, operands, strict=True))


def _bind_variables(name: str, operand: Operand, given: TensorType, bound: Bound) -> None:
    """Bind the variables of one operand's type pattern to a given type."""
    if operand.dtype == "Q":
        if given.dtype != bound["A:"] and not (find_format(given.dtype) and bound["A:"] == "f32"):
            raise inference_error(
                f"operand {operand.name} of {name} is {given.dtype}; {bound['A:']} or (for f32) a quantized format fits"
            )
    elif len(operand.dtype) == 1 and operand.dtype.isupper():
        known = bound.setdefault(operand.dtype + ":", given.dtype)
        if known != given.dtype:
            raise inference_error(f"operand {operand.name} of {name} has dtype {given.dtype}, the others have {known}")
    elif operand.dtype not in (given.dtype, ANY):
        raise inference_error(f"operand {operand.name} of {name} must be {operand.dtype}, not {given.dtype}")
    if operand.state and not given.state:
        raise inference_error(f"operand {operand.name} of {name} must be a state, {given} is not")
    for pattern, sizes in _align_dims(name, operand, given):
        if isinstance(pattern, str):  # *X
            if operand.variadic:  # every repeated operand may have its own sizes
                continue
            known = bound.setdefault(pattern, sizes)
        elif isinstance(pattern, sympy.Symbol):
            sizes = sizes[0]
            known = bound.setdefault(pattern.name, sizes)
        else:
            sizes, known = sizes[0], _evaluate_pattern(pattern, bound)
        if known != sizes:
            wanted = size_text(known) if isinstance(known, sympy.Expr) else [size_text(k) for k in known]
            found = size_text(sizes) if isinstance(sizes, sympy.Expr) else [size_text(k) for k in sizes]
            raise inference_error(
                f"operand {operand.name} of {name} is {given}: {pattern} is {wanted} elsewhere, here {found}"
            )


def _align_dims(name: str, operand: Operand, given: TensorType) -> list[tuple[Any, tuple[Size, ...]]]:
    """Return (pattern, sizes) pairs; `*X` (a str) takes what the other patterns leave."""
    patterns = operand.dims
    stars = [i for i, p in enumerate(patterns) if isinstance(p, str)]
    single = len(patterns) - len(stars)
    rest = len(given.shape) - single
    if rest < 0 or (not stars and rest):
        raise inference_error(
            f"operand {operand.name} of {name} has {len(given.shape)} axes in {given}; the op wants {operand}"
        )
    pairs: list[tuple[Any, tuple[Size, ...]]] = []
    position = 0
    for pattern in patterns:
        width = rest if isinstance(pattern, str) else 1
        pairs.append((pattern, given.shape[position : position + width]))
        position += width
    return pairs


def _evaluate_pattern(pattern: sympy.Expr, bound: Bound) -> Size:
    return sympy.expand(pattern.subs({s: bound[s.name] for s in pattern.free_symbols}, simultaneous=True))


def _result_type(definition: OpDef, result: Operand, bound: Bound, attributes: Attributes) -> TensorType:
    dtype = result.dtype
    if len(dtype) == 1 and dtype.isupper():
        dtype = bound[dtype + ":"]
    elif dtype in definition.attrs:
        dtype = attributes[dtype]
        if dtype not in DTYPES:
            raise inference_error(f"{definition.name}: unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    shape: list[Size] = []
    for pattern in result.dims:
        match pattern:
            case str():
                shape += bound[pattern]
            case ("broadcast", *names):
                shape += broadcast_shapes(*(bound[n] for n in names))
            case sympy.Symbol():
                shape.append(bound[pattern.name])
            case _:
                shape.append(_evaluate_pattern(pattern, bound))
    return TensorType(dtype, tuple(shape), result.state)


def broadcast_shapes(*shapes: tuple[Size, ...]) -> tuple[Size, ...]:
    """Return the shape that several shapes broadcast to; sizes are equal, or one of them is 1."""
    rank = max(len(s) for s in shapes)
    result: list[Size] = []
    for axis in range(-rank, 0):
        sizes = {s[axis] for s in shapes if len(s) >= -axis} - {sympy.Integer(1)}
        if len(sizes) > 1:
            texts = " and ".join("[" + ", ".join(map(size_text, s)) + "]" for s in shapes)
            raise inference_error(f"{texts} do not broadcast: {' and '.join(sorted(map(size_text, sizes)))} meet")
        result.append(sizes.pop() if sizes else sympy.Integer(1))
    return tuple(result)
