"""The rewrite engine: matching, refusing, replacing, ending."""

from __future__ import annotations

import pytest
from moec.compiler.check.compare import compare_modules
from moec.compiler.errors import MoecError, Refuse
from moec.compiler.ir.module import Module
from moec.compiler.ir.recipes import Tensor
from moec.compiler.ir.types import TensorType
from moec.compiler.ops.verify import verify_module
from moec.compiler.rewrite.editor import join_recipes_along
from moec.compiler.rewrite.rules import apply_rules, rule
from moec.compiler.text.parser import parse_module
from moec.compiler.text.printer import print_module
from moec.compiler.weights.steps.table import step


def program(body: str, results: str = "f32[B, 8]", returned: str = "%y", params: str = "%x: f32[B, 8]") -> Module:
    """Return a module with one function."""
    return parse_module(
        f"moec 1 stage graph\ndim B in 1..64\nfunc @main({params}) -> ({results}) {{\n{body}\n  return {returned}\n}}\n",
        "test",
    )


def texts(notes) -> list[str]:
    return [str(note) for note in notes]


def rewritten(module: Module, *rules) -> list[str]:
    """Return the statements after the rules, checked and with the same numbers."""
    result = apply_rules(module, None, rules).module
    verify_module(result)
    compare_modules(module, result, 1e-5)
    lines = print_module(result).splitlines()
    return [line.strip() for line in lines if line.startswith("  ") and "->" not in line and "return" not in line]


@rule(before="%s = core.sigmoid(%x)\n%y = core.mul(%x, %s)", after="%y = core.silu(%x)")
def sigmoid_into_silu(m, target):
    """Read x sigmoid(x) as silu(x)."""


def test_unchanged_is_the_same_module():
    module = program("  %y = core.exp(%x) : f32[B, 8]")
    assert apply_rules(module, None, [sigmoid_into_silu]).module is module


@pytest.mark.parametrize("operands", ["%x, %s", "%s, %x"])
def test_commutative_ops_match_in_both_orders(operands):
    module = program(f"  %s = core.sigmoid(%x) : f32[B, 8]\n  %y = core.mul({operands}) : f32[B, 8]")
    assert rewritten(module, sigmoid_into_silu) == ["%y = core.silu(%x) : f32[B, 8]"]


def test_a_value_used_elsewhere_is_refused_by_the_matcher():
    module = program(
        '  %s = core.sigmoid(%x) : f32[B, 8]\n  %m = core.mul(%x, %s) : f32[B, 8] loc("mlp")\n'
        "  %y = core.add(%m, %s) : f32[B, 8]"
    )
    result, notes = apply_rules(module, None, [sigmoid_into_silu])
    assert result is module
    assert texts(notes) == ["note: sigmoid_into_silu not applied at %m (mlp): %s is also used outside the pattern"]


def test_a_returned_value_is_used_elsewhere():
    module = program(
        "  %s = core.sigmoid(%x) : f32[B, 8]\n  %y = core.mul(%x, %s) : f32[B, 8]", "f32[B, 8], f32[B, 8]", "%y, %s"
    )
    assert apply_rules(module, None, [sigmoid_into_silu]).module is module


@rule(
    before="%t = core.mul(%x, %c)\n%s = core.sigmoid(%t)\n%y = core.mul(%t, %s)",
    after="%t = core.mul(%x, %c)\n%y = core.silu(%t)",
)
def silu_after_scale(m, target):
    """Read t sigmoid(t), where t is scaled, as silu(t)."""
    if m.number("c") is None:
        raise Refuse("the scale is not a constant", m.c)


def test_kept_names_locations_and_constants():
    module = program(
        "  %two = core.constant() {dtype=f32, value=2.0} : f32[]\n"
        '  %t = core.mul(%two, %x) : f32[B, 8] loc("a")\n  %s = core.sigmoid(%t) : f32[B, 8] loc("b")\n'
        '  %other = core.exp(%t) : f32[B, 8]\n  %m = core.mul(%s, %t) : f32[B, 8] loc("a", "c")\n'
        "  %y = core.add(%m, %other) : f32[B, 8]"
    )
    # %t is on both sides, so that %other may read it, from before the place of the last matched op
    assert rewritten(module, silu_after_scale) == [
        "%two = core.constant() {dtype=f32, value=2.0} : f32[]",
        '%t = core.mul(%x, %two) : f32[B, 8] loc("a", "b", "c")',
        "%other = core.exp(%t) : f32[B, 8]",
        '%m = core.silu(%t) : f32[B, 8] loc("a", "b", "c")',
        "%y = core.add(%m, %other) : f32[B, 8]",
    ]


def test_guard_refusal_names_the_culprit():
    module = program(
        "  %t = core.mul(%x, %x) : f32[B, 8]\n  %s = core.sigmoid(%t) : f32[B, 8]\n  %y = core.mul(%t, %s) : f32[B, 8]"
    )
    _, notes = apply_rules(module, None, [silu_after_scale])
    assert texts(notes) == ["note: silu_after_scale not applied at %y (@main): the scale is not a constant (%x)"]


@rule(
    before="""
      %g = core.linear(%x, %wg, _)
      %u = core.linear(%x, %wu, _)
      %a = core.silu(%g)
      %h = core.mul(%a, %u)
    """,
    after="""
      %gu = core.linear(%x, %w, _)
      %g = core.slice(%gu) {axis=1, start=0, stop=Half}
      %upper = core.slice(%gu) {axis=1, start=Half, stop=All}
      %a = core.silu(%g)
      %h = core.mul(%a, %upper)
    """,
)
def gate_and_up_into_one(m, target):
    """Multiply by gate and up at once."""
    half = m.wg.type.sizes[0]
    return {"w": step("concat", m.recipe("wg"), m.recipe("wu"), axis=0), "Half": half, "All": 2 * half}


def test_guard_binds_recipes_and_attributes_and_new_names_are_free():
    module = program(
        '  const %w : f32[8, 8] = tensor("g", f32[8, 8])\n  const %w.1 : f32[8, 8] = tensor("u", f32[8, 8])\n'
        "  %gu = core.linear(%x, %w, _) : f32[B, 8]\n  %u = core.linear(%x, %w.1, _) : f32[B, 8]\n"
        "  %a = core.silu(%gu) : f32[B, 8]\n  %y = core.mul(%a, %u) : f32[B, 8]"
    )
    assert rewritten(module, gate_and_up_into_one) == [
        'const %w.2 : f32[16, 8] = concat(tensor("g", f32[8, 8]), tensor("u", f32[8, 8]), axis=0)',
        "%gu.1 = core.linear(%x, %w.2, _) : f32[B, 16]",
        "%gu = core.slice(%gu.1) {axis=1, start=0, stop=8} : f32[B, 8]",
        "%upper = core.slice(%gu.1) {axis=1, start=8, stop=16} : f32[B, 8]",
        "%a = core.silu(%gu) : f32[B, 8]",
        "%y = core.mul(%a, %upper) : f32[B, 8]",
    ]


@rule(
    before="%a = core.sin(%x)\n%b = core.cos(%x)",
    after="%b = core.cos(%x)\n%n = core.mul(%b, %tan)\n%a = core.add(%n, %zero)",
)
def siblings(m, target):
    """Match two ops that only share an operand."""
    raise Refuse("found")


def test_siblings_are_found_through_the_shared_operand():
    body = "  %s = core.sin(%x) : f32[B, 8]\n  %c = core.cos(%x) : f32[B, 8]\n  %y = core.add(%s, %c) : f32[B, 8]"
    _, notes = apply_rules(program(body), None, [siblings])
    assert texts(notes) == ["note: siblings not applied at %c (@main): found"]


@rule(
    before="%v, %i = core.topk(%p) {axis=1, k=K}\n%s = core.sum(%v) {axes=[1], keepdim=true}\n%n = core.div(%v, %s)",
    after="%q, %i = core.topk(%p) {axis=1, k=K}\n%n = core.softmax(%q) {axis=1}",
)
def wrong_order(m, target):
    """Replace the weights of a selection; %i stays for its other readers."""


def test_several_results_and_order_of_definitions():
    module = program(
        "  %v, %i = core.topk(%x) {axis=1, k=2} : f32[B, 2], i64[B, 2]\n"
        "  %far = core.gather(%x, %i) {axis=1} : f32[B, 2]\n"
        "  %s = core.sum(%v) {axes=[1], keepdim=true} : f32[B, 1]\n  %n = core.div(%v, %s) : f32[B, 2]\n"
        "  %y = core.add(%n, %far) : f32[B, 2]",
        "f32[B, 2]",
    )
    result = apply_rules(module, None, [wrong_order]).module
    verify_module(result)
    assert [op.name for op in result.main.ops] == ["core.topk", "core.gather", "core.softmax", "core.add"]


def test_a_cycle_through_the_outside_is_refused():
    module = program(
        "  %v, %i = core.topk(%x) {axis=1, k=8} : f32[B, 8], i64[B, 8]\n"
        "  %far = core.gather(%x, %i) {axis=1} : f32[B, 8]\n  %n = core.mul(%v, %far) : f32[B, 8]\n"
        "  %y = core.add(%n, %far) : f32[B, 8]"
    )

    @rule(
        before="%v, %i = core.topk(%x) {axis=1, k=8}\n%n = core.mul(%v, %f)",
        after="%z = core.mul(%x, %f)\n%v, %i = core.topk(%z) {axis=1, k=8}\n%n = core.add(%v, %z)",
    )
    def through_outside(m, target):
        """Make %i depend on what may depend on %i."""

    result, notes = apply_rules(module, None, [through_outside])
    assert result is module
    assert "depends on one and feeds the other" in notes[0].reason


def test_near_misses_say_what_did_not_fit():
    module = program(
        "  %t = core.abs(%x) : f32[B, 8]\n  %s = core.sigmoid(%t) : f32[B, 8]\n  %y = core.mul(%t, %s) : f32[B, 8]"
    )
    _, notes = apply_rules(module, None, [silu_after_scale])
    assert texts(notes) == ["note: silu_after_scale not applied at %y (@main): %t is made by core.abs, not core.mul"]


def test_rules_without_end_are_an_error():
    @rule(before="%y = core.abs(%x)", after="%a = core.neg(%x)\n%y = core.abs(%a)")
    def forever(m, target):
        """Never stop."""

    with pytest.raises(MoecError, match="do not come to an end: 100 rewrites of @main, the last one by forever"):
        apply_rules(program("  %y = core.abs(%x) : f32[B, 8]"), None, [forever])


def test_a_rule_that_changes_a_type_is_an_error_with_its_name():
    @rule(before="%y = core.abs(%x)", after="%y = core.cast(%x) {to=f64}")
    def other_type(m, target):
        """Give another dtype."""

    with pytest.raises(MoecError, match=r"rule other_type: core.cast gives f64\[B, 8\] for %y, which is f32\[B, 8\]"):
        apply_rules(program("  %y = core.abs(%x) : f32[B, 8]"), None, [other_type])


@pytest.mark.parametrize(
    ("before", "after", "what"),
    [
        ("%y = core.abs(%x)", "%y = core.nothing(%x)", "rule wrong, after: unknown op core.nothing"),
        ("%y = core.abs(%x, %x)", "%y = core.abs(%x)", "core.abs takes 1 operands, 2 given"),
        ("%y = core.abs(%x) {axis=1}", "%y = core.abs(%x)", "core.abs has no attribute axis"),
        ("%y = core.abs(%x)", "%x = core.abs(%y)", "`after` defines %x"),
        ("%y = core.abs(%x)", "%y = core.add(%x, %z)", "nothing binds %z"),
        ("%y = core.abs(%x)", "%y = core.sum(%x) {axes=A}", "nothing binds A"),
        ("%a = core.exp(%b)\n%y = core.abs(%x)", "%y = core.exp(%x)", "shares no value"),
        ("%y = core.abs(%x)", "", "could never be applied"),
        ("%y = core.abs(%x)", "%z = core.exp(%x)", "could never be applied"),
    ],
)
def test_wrong_rules_are_errors(before, after, what):
    @rule(before=before, after=after)
    def wrong(m, target):
        """Be wrong."""

    with pytest.raises(MoecError) as caught:
        apply_rules(program("  %y = core.abs(%x) : f32[B, 8]"), None, [wrong])
    assert what in caught.value.what


@rule(before="%l = core.linear(%x, %w, %b)\n%y = core.silu(%l)", after="%y = core.linear(%x, %w, %b)", optional=["b"])
def silu_away(m, target):
    """Forget an activation; wrong, but it shows operands that may be absent."""


@pytest.mark.parametrize("bias", ["%b", "_"])
def test_an_optional_operand_is_kept_or_stays_absent(bias):
    module = program(
        f"  %l = core.linear(%x, %w, {bias}) : f32[B, 8]\n  %y = core.silu(%l) : f32[B, 8]",
        params="%x: f32[B, 8], %w: f32[8, 8], %b: f32[8]",
    )
    lines = print_module(apply_rules(module, None, [silu_away]).module).splitlines()
    assert f"  %y = core.linear(%x, %w, {bias}) : f32[B, 8]" in lines


def test_an_operand_that_is_not_optional_must_be_there():
    strict = rule(before=silu_away.before_text, after=silu_away.after_text)(silu_away.guard)
    module = program(
        "  %l = core.linear(%x, %w, _) : f32[B, 8]\n  %y = core.silu(%l) : f32[B, 8]",
        params="%x: f32[B, 8], %w: f32[8, 8]",
    )
    assert apply_rules(module, None, [strict]).module is module


def _refuse(m, target):
    raise Refuse("never", m.s)


def test_a_note_knows_its_parts():
    module = program('  %s = core.tanh(%x) : f32[B, 8]\n  %y = core.mul(%x, %s) : f32[B, 8] loc("mlp")')
    refuse = rule(before="%s = core.tanh(%x)\n%y = core.mul(%x, %s)", after="%y = core.silu(%x)")(_refuse)
    (note,) = apply_rules(module, None, [refuse]).notes
    assert (note.function, note.loc, note.op, note.matched) == ("main", ("mlp",), "%y", 1.0)
    assert note.reason == "never (%s)" and str(note) == f"note: _refuse not applied at %y (mlp): {note.reason}"


def test_joined_weights_are_cast_once_at_the_end():
    low, high = Tensor("a", TensorType.of("bf16", 2, 4)), Tensor("b", TensorType.of("bf16", 3, 4))
    joined = join_recipes_along(step("cast", low, to="f32"), step("cast", high, to="f32"), axis=0)
    assert joined == step("cast", step("concat", low, high, axis=0), to="f32")
    apart = join_recipes_along(step("cast", low, to="f32"), Tensor("c", TensorType.of("f32", 3, 4)), axis=0)
    assert apart.name == "concat" and apart.type == TensorType.of("f32", 5, 4)
