"""Ops with named operands and typed attributes, free names, and what dead-code elimination leaves."""

import pytest
from moec.compiler.errors import MoecError
from moec.compiler.ir.dce import eliminate_dead_code
from moec.compiler.ir.dims import size
from moec.compiler.ir.module import Function, Value
from moec.compiler.ir.names import Names
from moec.compiler.ir.recipes import Tensor
from moec.compiler.ir.types import Attrs, TensorType
from moec.compiler.ops.builder import IRBuilder

ROWS = TensorType.of("f32", 3, 8)


def test_operands_have_the_names_of_the_declaration():
    b = IRBuilder("main")
    x, w = b.param("x", ROWS), b.const("w", Tensor("w", TensorType.of("f32", 4, 8)))
    b.add("core.linear", x, w, None)
    (op,) = b.ops
    assert (op["x"], op["w"], op.get("b"), op[1]) == (x, w, None, w)
    assert op.named == [("x", x), ("w", w)]
    other = Value("other", w.type)
    assert op.reading(w=other).operands == (x, other, None)
    with pytest.raises(MoecError, match=r"core\.linear has no operand b"):
        op["b"]
    with pytest.raises(KeyError):
        op["weight"]


def test_repeated_operands_share_a_name():
    b = IRBuilder("main")
    values = [b.param(name, ROWS) for name in "xyz"]
    b.add("core.concat", *values, axis=0)
    assert [value for _, value in b.ops[0].named] == values
    assert len({name for name, _ in b.ops[0].named}) == 1


def test_another_op_takes_the_results_and_the_place():
    b = IRBuilder("main")
    b.loc = ("model", "norm")
    x = b.param("x", ROWS)
    y = b.add("core.exp", x, hint="y")
    other = b.ops[0].become("core.softmax", x, axis=1)
    assert (other.results, other.loc, other.attributes.integer("axis")) == ((y,), ("model", "norm"), 1)


def test_a_result_of_another_type_than_the_value_it_becomes_is_refused():
    b = IRBuilder("main")
    x = b.param("x", ROWS)
    with pytest.raises(MoecError, match=r"core.cast gives f64\[3, 8\] for %y, which is f32\[3, 8\]"):
        b.add("core.cast", x, hint=Value("y", ROWS), to="f64")


def test_attributes_are_what_they_have_to_be():
    attrs = Attrs(axis=1, perm=(1, 0), eps=1e-6, to="bf16", mixed=(1, "a"))
    assert (attrs.integer("axis"), attrs.integers("perm"), attrs.text("to")) == (1, (1, 0), "bf16")
    assert (attrs.number("eps"), attrs.number("axis"), attrs.integer("step", 1)) == (1e-6, 1, 1)
    with pytest.raises(KeyError, match="step"):
        attrs.integer("step")
    for read, name in ((attrs.integer, "eps"), (attrs.integers, "mixed"), (attrs.number, "to"), (attrs.text, "axis")):
        with pytest.raises(ValueError, match=f"^{name} is a"):
            read(name)


def test_settings_have_the_declared_defaults():
    b = IRBuilder("main")
    b.add("core.slice", b.param("x", ROWS), axis=1, start=0, stop=4)
    (op,) = b.ops
    assert op.settings.integer("step") == 1 and "step" not in op.attributes
    assert op.settings.size("stop") == size(4)
    b.add("core.sum", op.results[0], axes=(1,))
    assert b.ops[1].settings.flag("keepdim") is False and b.ops[1].settings.flag("other", True)
    with pytest.raises(ValueError, match=r"^stop is true or false, not 4"):
        op.settings.flag("stop")
    with pytest.raises(ValueError, match=r"^stop is an activation, not 4"):
        op.settings.activation("stop")
    with pytest.raises(ValueError, match=r"^axes is a size, not "):
        b.ops[1].settings.size("axes")


def test_free_names_count_up():
    names = Names(["x", "x.1"])
    assert [names.fresh(n) for n in ("x", "x", "y", "y", "x.1")] == ["x.2", "x.3", "y", "y.1", "x.1.1"]
    assert [Names(["x"], mark="_").fresh("x")] == ["x_1"]


def function(build):
    """Return a function of two parameters and a weight, with the ops and results that `build` makes."""
    b = IRBuilder("main")
    results = build(b, b.param("x", ROWS), b.param("z", ROWS), b.const("w", Tensor("w", ROWS)))
    return b.build(results)


def test_dead_code_goes_with_what_only_it_reads():
    def build(b, x, z, w):
        b.add("core.exp", b.add("core.mul", z, w))
        return [b.add("core.abs", x, hint="y")]

    before = function(build)
    after = eliminate_dead_code(before)
    assert [op.name for op in after.ops] == ["core.abs"] and not after.consts
    assert after.params == before.params and [p.name for p in eliminate_dead_code(before, params=True).params] == ["x"]
    assert eliminate_dead_code(after) is after


def test_of_two_ops_that_make_a_value_the_later_one_stays():
    def build(b, x, z, w):
        y = b.add("core.abs", x, hint="y")
        b.add("core.exp", z, hint=y)
        return [y]

    assert [op.name for op in eliminate_dead_code(function(build)).ops] == ["core.exp"]


def test_renaming_leaves_parameters_and_changes_what_reads():
    before = function(lambda b, x, z, w: [b.add("core.neg", b.add("core.mul", x, w, hint="t"), hint="y")])
    after = before.renamed({"t": "u", "w": "v"})
    assert [str(v) for op in after.ops for v in (*op.operands, *op.results)] == ["%x", "%v", "%u", "%u", "%y"]
    assert [c.value.name for c in after.consts] == ["v"] and before.renamed({}) is before
    assert isinstance(after, Function) and after.params == before.params
