"""Texts to modules; the smaller texts (rules, op signatures, sizes) are read in `fragments.py`.

A written type is never trusted: ops' inference, callees' signatures and weight recipes recompute it, and a difference
is an error at the written type. `parse_module(print_module(m)) == m` for every well-formed module, and
`print_module(parse_module(t)) == t` for every canonical text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lark import Token

from ..errors import MoecError
from ..ir.dims import size
from ..ir.dtypes import DTYPES, is_dtype
from ..ir.fragments import (
    Operand,
    PatternOp,
    Signature,
    Var,
    names_of_dims,
    parse_signature,
    parse_size,
    parse_statements,
)
from ..ir.literals import LONGEST_INT, Names, read_attribute, read_attributes, read_integer, read_size
from ..ir.module import Const, Dim, Function, Module, Op, Value
from ..ir.recipes import Literal, Recipe, Tensor
from ..ir.stages import STAGES
from ..ir.syntax import (
    AttrNode,
    ConstNode,
    FunctionNode,
    ModuleNode,
    RecipeNode,
    Source,
    StatementNode,
    TypeNode,
    parse_text,
    refuse_deep_nesting,
    suggest_names,
    token_place,
)
from ..ir.types import LONGEST_RANGE, TensorType, expand_range, make_attrs
from ..weights.steps.table import STEPS, step

__all__ = [
    "Operand",
    "PatternOp",
    "Signature",
    "Var",
    "parse_module",
    "parse_signature",
    "parse_size",
    "parse_statements",
]

VERSION = 1
RESERVED = ("true", "false", "inf", "nan")  # words that an attribute value reads as something else than a dim

# --- modules ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """The state of the parser: what is known while a file is read."""

    source: Source
    dims: dict[str, Dim] = field(default_factory=dict)
    functions: dict[str, Function] = field(default_factory=dict)
    types: dict[Any, TensorType] = field(default_factory=dict)  # sympy is slow; most types stand many times

    @property
    def names(self) -> Names:
        return names_of_dims(self.source, self.dims)


def parse_module(text: str, filename: str = "<text>") -> Module:
    """Return the module that a `.moir` text says; MoecError points at the first thing that does not fit."""
    source = Source(text, filename)
    with refuse_deep_nesting(source):
        node: ModuleNode = parse_text("module", source)
        if node.version != str(VERSION):
            raise source.error(f"version {node.version} of the format; this moec reads {VERSION}", node.version)
        if node.stage not in STAGES:
            raise source.error(f"unknown stage {node.stage}", node.stage, todo=f"stages are {', '.join(STAGES)}")
        file = _File(source)
        for name, low, high in node.dims:
            _declare_dim(file, name, low, high)
        for function in node.functions:
            if function.name[1:] in file.functions:
                raise source.error(f"{function.name} is defined twice", function.name)
            file.functions[str(function.name[1:])] = _read_function(file, function)
        if not node.functions:
            raise source.error("there is no function @main", node.stage)
        if node.functions[-1].name != "@main":
            known = "main" in file.functions
            what = "@main must be the last function" if known else "there is no function @main"
            raise source.error(what, node.functions[-1].name, todo="it is the program's entry, and is written last")
        return Module(str(node.stage), tuple(file.dims.values()), tuple(file.functions.values()), node.source)


def _declare_dim(file: _File, name: Token, low: Token, high: Token) -> None:
    if name in file.dims or name in RESERVED:
        raise file.source.error(f"dim {name} is declared twice" if name in file.dims else f"{name} is no name", name)
    bounds = read_integer(low, file.source), read_integer(high, file.source)
    if bounds[0] > bounds[1]:
        raise file.source.error(f"the range {low}..{high} is empty", token_place(low, high))
    file.dims[str(name)] = Dim(str(name), *bounds)


def _read_type(file: _File, node: TypeNode) -> TensorType:
    known = file.types.get(node.key)
    if known is None:
        state, dtype, sizes = node.key
        if not is_dtype(dtype):
            todo = suggest_names(dtype, DTYPES) or f"known: {', '.join(DTYPES)}"
            raise file.source.error(f"unknown dtype {dtype}", dtype, todo=todo)
        shape = tuple(size(read_size(s, file.source, file.names)) for s in sizes)
        known = file.types[node.key] = TensorType(str(dtype), shape, state)
    return known


@dataclass(frozen=True)
class _Scope:
    """The values of the function that is being read."""

    file: _File
    values: dict[str, Value] = field(default_factory=dict)

    def define(self, token: Token, name: str, type: TensorType) -> Value:
        if name in self.values:
            raise self.file.source.error(f"%{name} is defined twice", token)
        value = self.values[name] = Value(name, type)
        return value

    def use(self, token: Token, name: str) -> Value:
        if name not in self.values:
            raise self.file.source.error(f"unknown value %{name}", token, todo=suggest_names(name, self.values, "%"))
        return self.values[name]

    def spread(self, token: Token) -> list[str]:
        """Return the names that a value with a range stands for."""
        if "{" not in token:
            return [str(token[1:])]
        bounds = token[token.index("{") + 1 : token.index("}")].split("..")
        if max(map(len, bounds)) > LONGEST_INT:
            raise self.file.source.error(f"an integer of {max(map(len, bounds))} digits", token)
        low, high = map(int, bounds)
        _check_range(self.file.source, token, low, high)
        return expand_range(token[1:])


def _check_range(source: Source, token: Token, low: int, high: int) -> None:
    if low > high:
        raise source.error(f"the range {low}..{high} is empty", token)
    if high - low >= LONGEST_RANGE:
        raise source.error(f"the range {low}..{high} is longer than {LONGEST_RANGE}", token)


def _read_function(file: _File, node: FunctionNode) -> Function:
    scope = _Scope(file)
    params = [
        scope.define(token, name, _read_type(file, type)) for token, type in node.params for name in scope.spread(token)
    ]
    consts: list[Const] = []
    ops: list[Op] = []
    for line in node.body:
        if isinstance(line, ConstNode):
            consts.append(_read_const(scope, line))
        else:
            ops += _read_statement(scope, line)
    word, *tokens = node.return_
    results = [(token, scope.use(token, name)) for token in tokens for name in scope.spread(token)]
    written = [type for count, type in node.counts for _ in range(_read_count(file.source, count))]
    if len(written) != len(results):
        what = f"{node.name} returns {len(results)} values, its head has {len(written)} result types"
        raise file.source.error(what, word)
    for type, (_, value) in zip(written, results, strict=True):
        if _read_type(file, type) != value.type:
            raise file.source.error(
                f"{node.name} returns {value}: {value.type}, not {_read_type(file, type)}", type.place
            )
    values = tuple(value for _, value in results)
    return Function(str(node.name[1:]), tuple(params), tuple(consts), tuple(ops), values, node.weights)


def _read_count(source: Source, count: Token | None) -> int:
    if count is None:
        return 1
    _check_range(source, count, 1, read_integer(count, source))
    return int(count)


def _read_statement(scope: _Scope, node: StatementNode) -> list[Op]:
    """Return the op of a statement, or all the calls that a call with a range stands for."""
    source = scope.file.source
    ranges = [a for a in node.attrs if a.value[0] == "range"]
    if not ranges or not node.callee:
        operands = [n for t in node.operands for n in ([t] if t == "_" else scope.spread(t))]
        tokens = [t for t in node.operands for _ in ([t] if t == "_" else scope.spread(t))]
        results = [(t, n) for t in node.results for n in scope.spread(t)]
        return [_read_op(scope, node, list(zip(tokens, operands, strict=True)), results, node.attrs)]
    if len(ranges) > 1:
        raise source.error("only one attribute of a call may be a range", ranges[1].name)
    _, first, last = ranges[0].value
    low, high = read_integer(first, source), read_integer(last, source)
    _check_range(source, first, low, high)
    length = high - low + 1
    operands_of = [(t, [str(t)] * length if t == "_" else _names_in_range(scope, t, length)) for t in node.operands]
    results_of = [(t, _names_in_range(scope, t, length)) for t in node.results]
    ops = []
    for i in range(length):
        attrs = [a._replace(value=("value", low + i)) if a is ranges[0] else a for a in node.attrs]
        picked = [(t, names[i]) for t, names in operands_of]
        ops.append(_read_op(scope, node, picked, [(t, names[i]) for t, names in results_of], attrs))
    return ops


def _names_in_range(scope: _Scope, token: Token, length: int) -> list[str]:
    """Return the name that stands for a token in each of the calls of a range."""
    names = scope.spread(token)
    if len(names) == length:
        return names
    if "{" in token:
        raise scope.file.source.error(f"a range of {len(names)} values in a range of {length} calls", token)
    return names * length


Named = list[tuple[Token, str]]  # names with the token that they come from


def _read_op(scope: _Scope, node: StatementNode, operands: Named, results: Named, attrs: Sequence[AttrNode]) -> Op:
    source = scope.file.source
    values = tuple(None if name == "_" else scope.use(token, name) for token, name in operands)
    callee = str(node.callee[1:]) if node.callee else ""
    made = make_attrs(read_attributes(attrs, source, scope.file.names))
    op = Op(str(node.op), values, (), made, callee, node.loc)
    inferred = _infer_results(scope.file, node, op)
    label = f"@{callee}" if callee else op.name
    model = ", ".join(node.loc)
    if len(inferred) != len(results):
        what = f"{label} gives {_count_text(inferred, 'result')}, not {len(results)}"
        raise source.error(what, token_place(node.results[0], node.results[-1]), model=model)
    if len(inferred) != len(node.types):
        what = f"{label} gives {_count_text(inferred, 'result')}; written: {_count_text(node.types, 'type')}"
        raise source.error(what, node.types[-1].place, model=model)
    for i, (type, written) in enumerate(zip(inferred, node.types, strict=True)):
        if type != _read_type(scope.file, written):
            what = f"{label} gives {type} for {_result_name(op, i, results)}, not {_read_type(scope.file, written)}"
            raise source.error(what, written.place, model=model)
    defined = tuple(scope.define(token, name, type) for (token, name), type in zip(results, inferred, strict=True))
    return replace(op, results=defined)


def _count_text(things: Sequence, noun: str) -> str:
    return f"{len(things)} {noun}{'s' * (len(things) != 1)}"


def _result_name(op: Op, index: int, results: Named) -> str:
    """Return what the op's signature calls a result, or the value's name for a call."""
    from ..ops import OPS

    return f"%{results[index][1]}" if op.callee else OPS[op.name].signature.results[index].name


def _infer_results(file: _File, node: StatementNode, op: Op) -> tuple[TensorType, ...]:
    """Return the result types of an op or call, with every error at its name."""
    from ..ops import OPS  # torch comes with it
    from ..ops.verify import infer_op

    model = ", ".join(node.loc)
    if node.callee and op.callee not in file.functions:
        todo = suggest_names(op.callee, file.functions, "@") or "a function is written before its callers"
        raise file.source.error(f"unknown function @{op.callee}", node.callee, todo=todo, model=model)
    if not node.callee and op.name not in OPS:
        raise file.source.error(f"unknown op {op.name}", node.op, todo=suggest_names(op.name, OPS), model=model)
    try:
        return infer_op(op, file.functions)
    except MoecError as error:
        at = node.callee or node.op
        raise file.source.error(error.what, at, todo=error.todo, model=error.model or model) from None
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        # an edited attribute of the wrong kind, which the op's rule did not look at before it computed with it
        reason = f": {error}" if type(error) is ValueError else ""
        what = f"{op.name} cannot take these operands and attributes{reason}"
        raise file.source.error(what, node.callee or node.op, model=model) from error


# --- weights ---------------------------------------------------------------------------------------------------


def _read_const(scope: _Scope, node: ConstNode) -> Const:
    recipe = _read_recipe(scope.file, node.recipe)
    written = _read_type(scope.file, node.type)
    if recipe.type != written:
        what = f"the recipe of {node.value} makes {recipe.type}, not {written}"
        raise scope.file.source.error(what, node.type.place)
    if "{" in node.value:
        raise scope.file.source.error("a weight has one name, without a range", node.value)
    return Const(scope.define(node.value, str(node.value[1:]), written), recipe)


def _read_recipe(file: _File, node: RecipeNode) -> Recipe:
    options = [a for a in node.arguments if isinstance(a, AttrNode)]
    parts = [a for a in node.arguments if not isinstance(a, AttrNode)]
    match str(node.name), parts:
        case "tensor", [("value", str(name)), TypeNode() as type] if not options:
            return Tensor(name, _read_type(file, type))
        case "literal", [TypeNode() as type, ("list", numbers)] if not options:
            values = tuple(read_attribute(number, file.source, file.names) for number in numbers)
            return _read_literal(file, node, _read_type(file, type), values)
        case "tensor" | "literal", _:
            forms = 'tensor("name", f32[2]) and literal(f32[2], [0.5, 1.0])'
            raise file.source.error(f"wrong arguments of {node.name}", node.name, todo=f"the forms are {forms}")
    if node.name not in STEPS:
        known = ["tensor", "literal", *STEPS]
        todo = suggest_names(node.name, known) or f"there are {', '.join(known)}"
        raise file.source.error(f"unknown weight step {node.name}", node.name, todo=todo)
    items = [_read_recipe(file, part) for part in parts if isinstance(part, RecipeNode)]
    if len(items) != len(parts):
        raise file.source.error(f"{node.name} takes recipes and named options", node.name)
    attrs = read_attributes(options, file.source, file.names)
    try:
        return step(str(node.name), *items, **attrs)
    except MoecError as error:
        raise file.source.error(error.what, node.name, todo=error.todo) from None
    except KeyError as error:
        raise file.source.error(f"{node.name} needs the option {error.args[0]}", node.name) from None
    except (ValueError, TypeError, IndexError, ArithmeticError) as error:
        raise file.source.error(f"{node.name}: {error}", node.name) from None


def _read_literal(file: _File, node: RecipeNode, type: TensorType, values: tuple[Any, ...]) -> Literal:
    if not all(isinstance(v, (int, float)) for v in values):
        raise file.source.error("a literal holds numbers", node.name)
    if type.elements != len(values):
        what = f"{type} holds {type.elements} numbers, {len(values)} are written"
        raise file.source.error(what, node.name)
    return Literal(type, values)
