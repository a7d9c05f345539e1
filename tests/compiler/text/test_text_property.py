"""Random modules survive printing and parsing; damaged texts give one clear error."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from unittest.mock import patch

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from moec.compiler.errors import MoecError
from moec.compiler.ir.activation import KINDS, LAYOUTS, Activation
from moec.compiler.ir.dims import ceildiv, dim, floordiv, size, size_text
from moec.compiler.ir.module import Const, Dim, Function, Module, Op, Value
from moec.compiler.ir.pipelines import parse_pipeline
from moec.compiler.ir.recipes import Literal, Tensor
from moec.compiler.ir.types import TensorType, make_attrs
from moec.compiler.ops import OPS
from moec.compiler.text.parser import parse_module, parse_signature, parse_size, parse_statements
from moec.compiler.text.printer import print_module
from moec.compiler.weights.steps.table import step

RELAXED = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
TYPES: dict[int, tuple[TensorType, ...]] = {}  # what the op test.any gives, by its attribute `n`


@pytest.fixture(scope="module", autouse=True)
def any_op():
    """Declare an op that takes anything and gives the types registered for its `n`."""
    fake = SimpleNamespace(infer=lambda types, attrs: TYPES.get(attrs.get("n"), ()))
    fake.signature = SimpleNamespace(results=[SimpleNamespace(name=f"y{i}") for i in range(9)])
    with patch.dict(OPS, {"test.any": fake}):
        yield


DIMS = ["B", "S", "P", "state", "call", "loc"]  # words of the grammar are good names too
letters = st.sampled_from(["a", "h", "k1", "x_y", "state", "_q"])
parts = st.sampled_from(["0", "1", "2", "9", "10", "01", "key", "a1", "9a", "_"])
dtypes = st.sampled_from(["f32", "bf16", "i64", "bool", "f8e4m3"])
texts = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["true", "inf", "nan", "nan0x7ff8000000000001", "B", "S", "a b", '"', "\\", "é", "\u2028"]),
)


@st.composite
def names(draw) -> str:
    return ".".join([draw(letters), *draw(st.lists(parts, max_size=3))])


def _combine(children):
    pairs = st.tuples(children, children)
    numbers = st.tuples(children, st.integers(1, 9))
    return st.one_of(
        pairs.map(lambda p: p[0] + p[1]),
        pairs.map(lambda p: p[0] * p[1]),
        pairs.map(lambda p: p[0] - p[1]),
        numbers.map(lambda p: floordiv(*p)),
        numbers.map(lambda p: ceildiv(*p)),
        pairs.map(lambda p: max_min(*p)),
    )


def max_min(a, b):
    import sympy

    return sympy.Max(sympy.Min(a, b, 7), a)


sizes = st.recursive(
    st.one_of(st.integers(0, 99).map(size), st.sampled_from(DIMS).map(dim)), _combine, max_leaves=4
).map(size)
types = st.builds(TensorType, dtypes, st.lists(sizes, max_size=3).map(tuple), st.booleans())
# any bits, so that there are zeros of both signs and NaNs of all kinds
floats = st.one_of(st.floats(), st.binary(min_size=8, max_size=8).map(lambda b: struct.unpack("<d", b)[0]))
numbers = st.floats(allow_nan=False, allow_infinity=False)
limits = st.floats(min_value=0, allow_infinity=False)
activations = st.one_of(
    st.builds(
        Activation, st.just("silu"), st.just(True), st.sampled_from(LAYOUTS), numbers, numbers, limits, st.booleans()
    ),
    st.builds(Activation, st.sampled_from(list(KINDS)), st.booleans()),
)
values = st.recursive(
    st.one_of(st.integers(-(10**9), 10**9), floats, st.booleans(), texts, sizes, activations),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=5,
)
attributes = st.dictionaries(st.sampled_from(["axis", "k", "loc", "state", "value", "inf"]), values, max_size=3)
locs = st.lists(texts, max_size=2).map(tuple)


@st.composite
def recipes(draw):
    """Return a recipe of shape [2, 6] or so, with ranges, options and odd names."""
    kind = draw(st.sampled_from(["tensor", "literal", "concat", "stack", "cast", "transpose"]))
    tensor = Tensor(draw(texts) + draw(st.sampled_from(["", "{layer}.w", "{0..2}"])), TensorType.of("bf16", 2, 6))
    match kind:
        case "literal":
            numbers = st.lists(st.one_of(floats, st.integers(-9, 9), st.booleans()), min_size=2, max_size=2)
            return Literal(TensorType.of("f64", 2), tuple(draw(numbers)))
        case "concat":
            return step("concat", tensor, step("cast", tensor, to="bf16"), axis=1)
        case "stack":
            return step("cast", step("stack", tensor, tensor), to="f32")
        case "cast":
            return step("cast", tensor, to="f64")
        case "transpose":
            return step("slice", step("transpose", tensor, perm=[1, 0]), axis=0, start=1, stop=4)
    return tensor


@st.composite
def functions(draw, name: str, callee: Function | None = None) -> Function:
    """Return a function of random ops, which may end in a row of calls of another function."""
    taken: dict[str, Value] = {}

    def fresh(type: TensorType, wish: str | None = None) -> Value:
        unique = draw(names().filter(lambda n: n not in taken)) if wish is None or wish in taken else wish
        taken[unique] = Value(unique, type)
        return taken[unique]

    def fresh_row(type: TensorType) -> list[Value]:
        base, start = draw(letters), draw(st.integers(0, 11))
        return [fresh(type, f"{base}.{i}.v") for i in range(start, start + draw(st.integers(1, 4)))]

    params = [v for _ in range(draw(st.integers(0, 3))) for v in fresh_row(draw(types))]
    consts = [Const(fresh(r.type), r) for r in draw(st.lists(recipes(), max_size=2))]
    ops: list[Op] = []
    for _ in range(draw(st.integers(0, 3))):
        known = st.one_of(st.none(), st.sampled_from(list(taken.values()))) if taken else st.none()
        operands = tuple(draw(st.lists(known, max_size=3)))
        if draw(st.booleans()):
            operands += tuple(params)
        results = fresh_row(draw(types))
        n = len(TYPES)
        TYPES[n] = tuple(v.type for v in results)
        attrs = make_attrs({**draw(attributes), "n": n})
        ops.append(Op("test.any", operands, tuple(results), attrs, loc=draw(locs)))
    if callee:
        ops += draw(calls(callee, fresh))
        taken.update({v.name: v for op in ops for v in op.results})
    results_ = draw(st.lists(st.sampled_from(list(taken.values())), max_size=4)) if taken else []
    return Function(name, tuple(params), tuple(consts), tuple(ops), tuple(results_), draw(texts))


@st.composite
def calls(draw, callee: Function, fresh) -> list[Op]:
    """Return calls whose names and numbers mostly count up, with slips in places."""
    sources = [fresh(p.type, f"s{i}.0") for i, p in enumerate(callee.params)]
    n = len(TYPES)
    TYPES[n] = tuple(v.type for v in sources)
    ops = [Op("test.any", (), tuple(sources), (("n", n),))] if sources else []
    chained = bool(callee.types) and bool(sources) and callee.types[0] == sources[0].type
    layer = draw(st.integers(-1, 3))
    for i in range(1, draw(st.integers(1, 6)) if callee.types else 1):
        slip = draw(st.sampled_from(["", "", "", "", "layer", "loc", "name", "kind"]))
        layer += 2 if slip == "layer" else 1
        results = [fresh(t, None if slip == "name" else f"s{j}.{i}") for j, t in enumerate(callee.types)]
        attrs = {"layer": layer} if slip != "kind" else {"layer": float(layer), "mode": "x"}
        loc = ("slip",) if slip == "loc" else ("l",)
        ops.append(Op("call", tuple(sources), tuple(results), make_attrs(attrs), callee.name, loc))
        if chained:
            sources[0] = results[0]
    return ops


@st.composite
def modules(draw) -> Module:
    TYPES.clear()
    dims = tuple(Dim(d, low, low + 9) for d, low in zip(DIMS, draw(st.tuples(*[st.integers(0, 9)] * 6)), strict=True))
    layer = draw(functions(draw(st.sampled_from(["layer", "layer.0"]))))
    return Module(
        draw(st.sampled_from(["graph", "moe", "kernel"])), dims, (layer, draw(functions("main", layer))), draw(texts)
    )


@RELAXED
@given(modules())
def test_a_random_module_survives_its_text(module):
    text = print_module(module)
    parsed = parse_module(text)
    assert parsed == module
    assert repr(parsed) == repr(module)  # locations too, and 1 is not 1.0
    assert print_module(parsed) == text


@RELAXED
@given(sizes)
def test_a_size_survives_its_text(expression):
    assert parse_size(size_text(expression), DIMS) == expression


@settings(RELAXED, max_examples=100)
@given(modules(), st.data())
def test_a_damaged_text_is_one_error_or_a_module(module, data):
    text = print_module(module)
    at = data.draw(st.integers(0, len(text)))
    cut = data.draw(st.integers(0, 12))
    filler = data.draw(
        st.sampled_from(["", "%", "..", "9", "{", "}", '"', "state ", "7 * ", "0..3", "\\", "=", "é", "[", "/"])
    )
    try:
        parse_module(text[:at] + filler + text[at + cut :], "x.moir")
    except MoecError as error:
        assert error.where.startswith("x.moir:")
        assert "^" in error.excerpt


@settings(RELAXED, max_examples=100)
@given(st.text(alphabet='ab%@.,*?()[]{}:=->_+1 "\n', max_size=30))
def test_any_text_is_read_or_refused(text):
    for read in (parse_pipeline, parse_signature, parse_statements, lambda t: parse_size(t, ["a"]), parse_module):
        try:
            read(text)
        except MoecError as error:
            assert error.where
