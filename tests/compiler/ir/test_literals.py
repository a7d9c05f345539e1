"""Numbers in programs are told apart bit by bit: zeros of two signs, NaNs of all kinds, 1 and 1.0 and true."""

import struct

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from moec.compiler.ir.module import Const, Function, Module, Op, Value
from moec.compiler.ir.recipes import Literal
from moec.compiler.ir.types import TensorType, make_attrs
from moec.compiler.text.parser import parse_module
from moec.compiler.text.printer import print_module
from moec.compiler.weights.evaluate import evaluate_recipe
from moec.compiler.weights.sink import DataFile
from moec.compiler.weights.sources.source import RandomSource
from moec.compiler.weights.steps.table import step
from moec.passes import PASSES

ZEROS = (b"\0" * 8, b"\0" * 7 + b"\x80")
NANS = tuple(struct.pack("<Q", n) for n in (0x7FF8 << 48, 0xFFF8 << 48, (0x7FF8 << 48) + (5 << 45), (0x7FFC << 48) + 1))
bits = st.one_of(st.sampled_from([*ZEROS, *NANS]), st.binary(min_size=8, max_size=8))
numbers = st.one_of(bits.map(lambda b: struct.unpack("<d", b)[0]), st.sampled_from([0, 1, True, False, 1.0, 0.0]))


def same(a, b):
    """Return whether two numbers are one, told by their bits."""
    return type(a) is type(b) and (struct.pack("<d", a) == struct.pack("<d", b) if isinstance(a, float) else a == b)


def returning(*recipes, ops=()):
    consts = tuple(Const(Value(f"c{i}", r.type), r) for i, r in enumerate(recipes))
    values = (*(c.value for c in consts), *(v for op in ops for v in op.results))
    # results keep their names: what is returned is computed from the weights
    made = tuple(Op("core.neg", (v,), (Value(f"{v.name}.neg", v.type),)) for v in values)
    return Module("graph", (), (Function("main", (), consts, (*ops, *made), tuple(o.results[0] for o in made)),))


@settings(deadline=None, max_examples=300)
@given(numbers, numbers)
def test_equal_numbers_are_those_with_equal_bits(a, b):
    one, two = (Literal(TensorType.of("f64", 2), (0.5, n)) for n in (a, b))
    assert (one == two) == same(a, b)
    assert (len({one, two}) == 1) == same(a, b)
    turned = [step("transpose", step("reshape", x, shape=(2, 1)), perm=(1, 0)) for x in (one, two)]
    assert (turned[0] == turned[1]) == same(a, b)
    shared = PASSES["share-expressions"](returning(one, two))
    assert len(shared.main.consts) == (1 if same(a, b) else 2)
    ops = [
        Op("core.full", (), (Value(f"y{i}", TensorType.of("f64", 2)),), make_attrs({"value": n, "shape": (2,), "dtype": "f64"}))
        for i, n in enumerate((a, b))
    ]  # fmt: skip
    assert (ops[0].key[3] == ops[1].key[3]) == same(a, b)
    shared = PASSES["share-expressions"](returning(ops=ops))
    assert sum(op.name == "core.full" for op in shared.main.ops) == (1 if same(a, b) else 2)


@settings(deadline=None, max_examples=100)
@given(st.lists(numbers, min_size=3, max_size=3))
def test_the_text_keeps_every_bit(values):
    module = returning(Literal(TensorType.of("f64", 3), tuple(values)))
    (const,) = parse_module(print_module(module)).main.consts
    assert all(map(same, const.recipe.values, values))


@pytest.mark.parametrize(("dtype", "word", "fraction"), [("f32", "<u4", 23), ("f16", "<u2", 10), ("bf16", "<u2", 7)])
def test_evaluated_numbers_keep_sign_and_payload(dtype, word, fraction):
    """The bits are put together by hand: sign, exponent of ones, first bits of the fraction."""
    values = tuple(struct.unpack("<d", b)[0] for b in (*ZEROS, *NANS))
    found = (
        evaluate_recipe(Literal(TensorType.of(dtype, len(values)), values), RandomSource())
        .view(torch.uint8)
        .numpy()
        .view(word)
    )
    size = 8 * np.dtype(word).itemsize
    ones, quiet = (1 << (size - 1)) - (1 << fraction), 1 << (fraction - 1)
    sign = 1 << (size - 1)
    wanted = [
        0,
        sign,
        ones | quiet,
        sign | ones | quiet,
        ones | quiet | (5 << (fraction - 7)),
        ones | quiet | quiet >> 1,
    ]
    assert found.tolist() == wanted


def test_the_data_file_holds_both_zeros(tmp_path):
    zeros = [Literal(TensorType.of("f32", 4), (n,) * 4) for n in (0.0, -0.0, 0.0)]
    with DataFile(tmp_path / "data") as file:
        places = [file.append(literal, source) for source in [RandomSource()] for literal in zeros]
    assert places[0] == places[2] != places[1]
    raw = (tmp_path / "data").read_bytes()
    assert raw[places[1][0] :][:16] == struct.pack("<4f", *[-0.0] * 4)


def test_a_mixed_literal_is_not_one_number():
    text = """moec 1 stage graph
func @main(%x: f32[2]) -> (f32[2]) {
  %z = core.full() {dtype=f32, shape=[1], value=0.0} : f32[1]
  %m = core.full() {dtype=f32, shape=[1], value=-0.0} : f32[1]
  %b = core.concat(%z, %m) {axis=0} : f32[2]
  %y = core.div(%x, %b) : f32[2]
  return %y
}
"""
    folded = PASSES["fold-constants"](parse_module(text))
    assert [op.name for op in folded.main.ops] == ["core.full", "core.full", "core.concat", "core.div"]
