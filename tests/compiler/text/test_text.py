"""The text form: canonical texts come back unchanged, and everything wrong is pointed at."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
import sympy
from moec.compiler.errors import MoecError
from moec.compiler.ir.dims import dim
from moec.compiler.ir.module import Op, Value
from moec.compiler.ir.pipelines import PassCall, parse_pipeline
from moec.compiler.ir.recipes import Literal, Tensor
from moec.compiler.ir.types import TensorType
from moec.compiler.text.parser import (
    Operand,
    PatternOp,
    Var,
    parse_module,
    parse_signature,
    parse_size,
    parse_statements,
)
from moec.compiler.text.printer import print_function, print_module, print_op, print_recipe, print_type
from moec.compiler.weights.steps.table import step

TEXT = """\
moec 1 stage graph
source "examples/tiny-moe"
dim B in 1..1024
dim S in 1..131072
dim P in 0..131072

func @layer.0(%h: f32[B, S, 64], %mask: i64[B, P + S], %past: state f32[B, 16, P, 128])
    -> (f32[B, S, 64], state f32[B, 16, P + S, 128]) weights "model.layers.{layer}." {
  const %norm : f32[64] = cast(tensor("input_layernorm.weight", bf16[64]), to=f32)
  const %freq : f32[3] = literal(f32[3], [1.0, -0.5, inf])
  const %up : f32[64, 20, 16] = cast(concat(stack(tensor("mlp.experts.{0..63}.gate_proj.weight", bf16[10, 16])), \
stack(tensor("mlp.experts.{0..63}.up_proj.weight", bf16[10, 16])), axis=1), to=f32)
  const %router : f32[60, 64] = tensor("/router", f32[60, 64])
  %flat = core.reshape(%h) {shape=[B*S, 64]} : f32[B*S, 64]
  %logits = core.linear(%flat, %router, _) : f32[B*S, 60] loc("mlp.gate", "mlp \\"b\\"")
  %v, %i = core.topk(%logits) {axis=1, k=8} : f32[B*S, 8], i64[B*S, 8]
  %new = core.full() {dtype=f32, shape=[B, 16, S, 128], value=0.0} : f32[B, 16, S, 128]
  %k2 = nn.cache_append(%past, %new) {axis=2} : state f32[B, 16, P + S, 128]
  %n = nn.rms_norm(%h, %norm) {eps=1e-06} : f32[B, S, 64]
  return %n, %k2
}

func @main(%h.0: f32[B, S, 64], %mask: i64[B, P + S], %past.{0..3}.key: state f32[B, 16, P, 128])
    -> (f32[B, S, 64], 4 * state f32[B, 16, P + S, 128]) {
  %h.{1..4}, %present.{0..3}.key = call @layer.0(%h.{0..3}, %mask, %past.{0..3}.key) {layer=0..3} : \
f32[B, S, 64], state f32[B, 16, P + S, 128]
  %both = core.concat(%h.{1..4}, %h.01, %h.02) {axis=2} : f32[B, S, 384]
  return %h.4, %present.{0..3}.key
}
"""
TEXT = TEXT.replace(
    "  %both", "  %h.01 = core.neg(%h.1) : f32[B, S, 64]\n  %h.02 = core.neg(%h.1) : f32[B, S, 64]\n  %both"
)


def error_of(text: str) -> MoecError:
    """Return the error of a text."""
    with pytest.raises(MoecError) as caught:
        parse_module(text, "x.moir")
    return caught.value


def test_canonical_text_comes_back():
    module = parse_module(TEXT)
    assert print_module(module) == TEXT
    assert parse_module(print_module(module)) == module
    assert [op.attrs for op in module.main.ops[:4]] == [(("layer", i),) for i in range(4)]
    assert [str(v) for v in module.main.ops[2].operands] == ["%h.2", "%mask", "%past.2.key"]
    assert module.functions[0].ops[1].loc == ("mlp.gate", 'mlp "b"')
    assert module.functions[0].ops[1].operands[2] is None
    assert print_function(module.main, ["B", "S", "P"]) == TEXT[TEXT.index("func @main") :]


def test_other_spellings_become_canonical():
    loose = TEXT
    for canonical, other in [
        ("{axis=1, k=8}", "{ k = 4*2,\n axis=1 } # eight\n"),
        ("%h.{1..4}, %h.01", "%h.1,%h.{2..4}, %h.01"),
        ("P + S", "S + P"),
        ("B*S, 60", "S*B, 61 - 1"),
        ("4 * state", "2*state f32[B, 16, P + S, 128], 2 * state"),
        ("moec 1", "# a comment\r\n\nmoec\t1"),
    ]:
        assert canonical in loose
        loose = loose.replace(canonical, other)
    assert print_module(parse_module(loose)) == TEXT


def test_numbers_that_equal_nothing_or_everything_survive():
    item = Literal(TensorType.of("f32", 4), (math.nan, -0.0, 1, True))
    text = TEXT.replace("literal(f32[3], [1.0, -0.5, inf])", print_recipe(item)).replace(
        "%freq : f32[3]", "%freq : f32[4]"
    )
    parsed = parse_module(text).functions[0].consts[1].recipe
    assert parsed == item  # holds because every nan that is read is math.nan
    assert repr(parsed) == repr(item)


def test_calls_that_differ_in_more_than_the_count_stay_apart():
    module = parse_module(TEXT)
    for change in (
        {"loc": ("a",)},
        {"attrs": (("layer", 7),)},
        {"attrs": (("layer", 2.0),)},
        {"attrs": (("layer", 2), ("x", 1))},
    ):
        ops = list(module.main.ops)
        ops[2] = replace(ops[2], **change)
        changed = module.with_functions({"main": replace(module.main, ops=tuple(ops))})
        text = print_module(changed)
        assert text.count("call @layer.0") == 3  # two share a statement
        assert parse_module(text) == changed
        assert print_module(parse_module(text)) == text


def test_small_things_print_alone():
    x = Value("x.0", TensorType.of("f32", dim("B"), 2))
    op = Op(
        "core.sum",
        (x, None),
        (x,),
        (("a", "B"), ("b", ("two words", True, 1, 1.0, dim("B") * 2)), ("c", float("-inf"))),
    )
    assert (
        print_op(op, ["B"])
        == '%x.0 = core.sum(%x.0, _) {a="B", b=["two words", true, 1, 1.0, 2*B], c=-inf} : f32[B, 2]'
    )
    assert print_op(op).startswith("%x.0 = core.sum(%x.0, _) {a=B,")
    assert print_type(TensorType.of("i64", dim("P") + 1, state=True)) == "state i64[P + 1]"
    item = step("cast", Tensor('a"b', TensorType.of("bf16", 2)), to="f32")
    assert print_recipe(item) == 'cast(tensor("a\\"b", bf16[2]), to=f32)'
    assert (
        print_recipe(step("concat", item, item, axis=0))
        == f"concat({print_recipe(item)}, {print_recipe(item)}, axis=0)"
    )
    assert print_recipe(Literal(TensorType.of("f32", 2), (1.0, 0.1))) == "literal(f32[2], [1.0, 0.1])"


# what to change in TEXT, what the error says, the text that the caret stands under
ERRORS = [
    ("f32[B*S, 60] loc", "f32[B*S, 61] loc", "core.linear gives f32[B*S, 60] for y, not f32[B*S, 61]", "f32[B*S, 61]"),
    ("[B*S, 8], i64", "[B*S, 9], i64", "core.topk gives f32[B*S, 8] for values, not f32[B*S, 9]", "f32[B*S, 9]"),
    ("3} : f32[B, S, 64]", "3} : f32[B, 64]", "@layer.0 gives f32[B, S, 64] for %h.1, not f32[B, 64]", "f32[B, 64]"),
    ("-> (f32[B, S, 64]", "-> (f32[B, 65]", "@layer.0 returns %n: f32[B, S, 64], not f32[B, 65]", "f32[B, 65]"),
    ("%up : f32[64", "%up : f32[63", "the recipe of %up makes f32[64, 20, 16], not f32[63, 20, 16]", "f32[63, 20, 16]"),
    ("core.topk", "core.topkk", "unknown op core.topkk", "core.topkk"),
    ("(%flat,", "(%flatt,", "unknown value %flatt", "%flatt"),
    ("%v, %i", "%v, %h", "%h is defined twice", "%h"),
    ("%v, %i", "%v", "core.topk gives 2 results, not 1", "%v"),
    (", i64[B*S, 8]", "", "core.topk gives 2 results; written: 1 type", "f32[B*S, 8]"),
    ("%router, _)", "%router)", "core.linear takes 3 operands (x, w, b), 2 given", "core.linear"),
    ("%h.{0..3}, %mask", "%h.{0..3}", "@layer.0 takes 3 operands, 2 given", "@layer.0"),
    ("bf16[64]", "bf17[64]", "unknown dtype bf17", "bf17"),
    ("i64[B, P + S]", "i64[B, Pp + S]", "unknown dim Pp", "Pp"),
    ("P + S", "pow(P, S)", "unknown function pow", "pow"),
    ("call @layer.0", "call @layer.1", "unknown function @layer.1", "@layer.1"),
    ("func @main", "func @maine", "there is no function @main", "@maine"),
    ("func @layer.0", "func @main", "@main is defined twice", "@main"),
    ("stage graph", "stage graf", "unknown stage graf", "graf"),
    ("moec 1", "moec 2", "version 2 of the format; this moec reads 1", "2"),
    ("concat(", "conkat(", "unknown weight step conkat", "conkat"),
    ("axis=1), to", "axes=1), to", "concat needs the option axis", "concat"),
    ("[1.0, -0.5, inf]", "[1.0]", "f32[3] holds 3 numbers, 1 are written", "literal"),
    ("[1.0, -0.5, inf]", "list=[1.0]", "wrong arguments of literal", "literal"),
    ("axis=1, k=8", "axis=1, axis=1", "attribute axis is given twice", "axis"),
    ("axis=1, k=8", "axis=1, k=0..8", "a range of numbers is only for an attribute of a call", "0"),
    ("layer=0..3", "layer=0..4", "a range of 4 values in a range of 5 calls", "%h.{0..3}"),
    ("layer=0..3", "a=0..3, layer=0..3", "only one attribute of a call may be a range", "layer"),
    ("%v, %i = core.topk", "%v, %i, %j.{0..2} = core.topk", "core.topk gives 2 results, not 5", "%v, %i, %j.{0..2}"),
    ("4 * state", "3 * state", "@main returns 5 values, its head has 4 result types", "return"),
    ("%past.{0..3}", "%past.{3..0}", "the range 3..0 is empty", "%past.{3..0}.key"),
    ("%past.{0..3}", "%past.{0..999999}", "the range 0..999999 is longer than 65536", "%past.{0..999999}.key"),
    ("dim S in 1..131072", "dim S in 5..1", "the range 5..1 is empty", "5..1"),
    ("dim S in", "dim B in", "dim B is declared twice", "B"),
    ("1..1024", f"1..{'9' * 99}", "an integer of 99 digits", "9" * 99),
    ("1e-06", '"a\\q"', 'the text "a\\q" is not well written: Invalid \\escape: line 1 column 3 (char 2)', '"a\\q"'),
    ("1e-06", "gated(swish)", "there is no activation swish", "gated"),
    ("1e-06", "gated(silu, top=1.0)", "an activation has no top", "gated"),
    ("1e-06", "gated(silu, B)", "gated takes one name and then options, such as limit=7.0", "gated"),
    ("1e-06", "gated(silu, limit=B*2)", "an activation has no sizes", "B"),
    ("1e-06", "gated(silu, layout=both)", "layout=both is neither concat nor interleaved", "gated"),
    ("1e-06", "gated(silu, limit=-1.0)", "the limit of an activation is not less than 0, as -1.0 is", "gated"),
    ("1e-06", "gated(silu, clamp_after=true)", "clamp_after needs a limit", "gated"),
    ("1e-06", "plain(relu, beta=1.0)", "an activation without a gate has no beta", "plain"),
    ("P + S", "max(P, S, k=1)", "max takes no options", "k"),
    (" : f32[B*S, 60] loc", " loc", "syntax error: 'loc' does not fit here", "loc"),
    ("eps=1e-06", "eps=$", "syntax error: '$' does not fit here", "$"),
    ("%n = nn", "n = nn", "syntax error: 'n' does not fit here", "n"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "what", "under"), ERRORS, ids=[what for _, _, what, _ in ERRORS])
def test_errors_point_at_the_place(old, new, what, under):
    assert old in TEXT
    text = TEXT.replace(old, new, 1)
    error = error_of(text)
    assert error.what == what
    file, line, column = error.where.split(":")
    assert file == "x.moir"
    written = text.split("\n")[int(line) - 1]
    assert written[int(column) - 1 :].startswith(under)
    shown, marks = error.excerpt.split("\n")
    assert shown == f"|   {written}"
    assert marks == "|   " + " " * (int(column) - 1) + "^" * len(under)


@pytest.mark.parametrize("shape", ['["1 + 1", 64]', "[1.5, 64]", "word", "[[B, S], 64]", "7"])
def test_an_attribute_of_the_wrong_kind_is_an_error_and_never_runs(shape):
    error = error_of(TEXT.replace("shape=[B*S, 64]", f"shape={shape}"))
    assert "core.reshape" in error.what
    assert "^" in error.excerpt


def test_errors_say_what_would_help():
    assert error_of(TEXT.replace("core.topk", "core.topkk")).todo.startswith("did you mean core.topk")
    assert error_of(TEXT.replace("(%flat,", "(%flatt,")).todo == "did you mean %flat?"
    assert error_of(TEXT.replace(" : f32[B*S, 60] loc", " loc")).todo == "expected ':'"
    assert "a number" in error_of(TEXT.replace("eps=1e-06", "eps=$")).todo
    assert error_of(TEXT.replace("[B*S, 60] loc", "[B*S, 61] loc")).model == 'mlp.gate, mlp "b"'
    end = error_of(TEXT[: TEXT.index("\n}\n\nfunc @main")])
    assert (end.what, end.todo) == ("syntax error: the end does not fit here", "expected ',' or '}'")
    assert error_of("").where == "x.moir:1:1"
    assert error_of("moec 1 stage graph\n").what == "there is no function @main"
    assert "nested too deeply" in error_of(TEXT.replace("1e-06", "[" * 5000 + "]" * 5000)).what


def test_sizes():
    b, t = dim("B"), dim("T")
    assert parse_size("4*B + floordiv(T, 8) - 2", ["B", "T"]) == 4 * b + sympy.floor(t / 8) - 2
    assert parse_size("-(B - max(T, 3))*2", {"B", "T"}) == -2 * b + 2 * sympy.Max(t, 3)
    for text, what in [
        ("B + X", "unknown dim X"),
        ("floordiv(B, 0)", "division by zero"),
        ("mod(B)", "mod takes 2 arguments, 1 given"),
    ]:
        with pytest.raises(MoecError) as caught:
            parse_size(text, ["B"])
        assert caught.value.what == what


def test_statements_of_rules():
    statements = parse_statements(
        """
        %v, %i = core.topk(%x) {k=K, axis=1, act=silu, dims=[N, 2]}
        %y.1 = core.linear(%x, %w, _) : f32[B*S, 64] loc("pasted")  # a line of a dump is a pattern
        """
    )
    assert statements == (
        PatternOp("core.topk", ("x",), ("v", "i"), {"k": Var("K"), "axis": 1, "act": "silu", "dims": (Var("N"), 2)}),
        PatternOp("core.linear", ("x", "w", None), ("y.1",), {}),
    )
    for text, what in [
        ("%y = call @f(%x)", "a rule has no calls"),
        ("%y = core.neg(%x.{0..1})", "a rule has no ranges of values"),
        ("%y = core.neg(x)", "syntax error: 'x' does not fit here"),
    ]:
        with pytest.raises(MoecError) as caught:
            parse_statements(text)
        assert caught.value.what == what
        assert caught.value.where.startswith("<rule>:1:")


def test_signatures():
    text = "x: A[*X, K], b: A[4*N + 1]?, xs: state i64[*X]... -> y: to[broadcast(X, Y)], k: state A[]"
    signature = parse_signature(text)
    assert str(signature) == text
    assert signature.operands[0] == Operand("x", "A", ("*X", dim("K")))
    assert signature.operands[1].optional and signature.operands[1].dims == (4 * dim("N") + 1,)
    assert signature.operands[2].variadic and signature.operands[2].state
    assert signature.results[0].dims == (("broadcast", "*X", "*Y"),)
    assert str(parse_signature("-> y: i64[size]")) == "-> y: i64[size]"
    with pytest.raises(MoecError, match="only the last operand"):
        parse_signature("xs: A[*X]..., y: A[*X] -> z: A[*X]")


def test_pipelines():
    text = 'fuse-dispatch, quantize{experts=int4,group=32, keep=[router, "lm head"],scale=-1.5,fast=true},b'
    options = {"experts": "int4", "group": 32, "keep": ("router", "lm head"), "scale": -1.5, "fast": True}
    assert parse_pipeline(text) == (PassCall("fuse-dispatch"), PassCall("quantize", options), PassCall("b"))
    assert parse_pipeline("") == ()
    with pytest.raises(MoecError, match="syntax error"):
        parse_pipeline("a,,b")


def test_a_hundred_layers_print_and_parse_quickly():
    module = parse_module(
        TEXT.replace("0..3", "0..99").replace("1..4", "1..100").replace("4 * ", "100 * ").replace("384", "6528")
    )
    assert len(print_module(module).splitlines()) == len(TEXT.splitlines())
    ops = tuple(replace(op, loc=(f"layers.{i}",)) for i, op in enumerate(module.main.ops))  # nothing to merge
    module = module.with_functions({"main": replace(module.main, ops=ops)})
    start = time.perf_counter()
    text = print_module(module)
    printed = time.perf_counter()
    assert parse_module(text) == module
    parsed = time.perf_counter()
    assert printed - start < 0.3
    assert parsed - printed < 1.0
