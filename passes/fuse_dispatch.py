"""Fuses routed experts that are written as separate ops, so that no token is copied for every expert it goes to.

A rule is put together of parts: how the tokens reach their experts (`_Spelling`), where the gate and the other half of
an expert's first matrix come from (`_halves_patterns`), and the activation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..compiler.errors import Refuse
from ..compiler.ir.activation import KINDS, Activation
from ..compiler.ir.module import Function, Module, Value
from ..compiler.ir.notes import Note, Rewritten, refusal_note
from ..compiler.ir.recipes import Recipe
from ..compiler.rewrite.declare import pass_
from ..compiler.rewrite.editor import join_recipes_along
from ..compiler.rewrite.patterns import Guard
from ..compiler.rewrite.rules import Match, Rule, apply_rules, rule


@dataclass(frozen=True)
class _Spelling:
    """The parts of a pattern before, between and after: `linear` multiplies %x by the weight %w of each row's expert, giving %y."""

    name: str
    before: str
    linear: str
    after: str
    operands: str  # of the moe.experts that takes its place

    def __call__(self, y: str, x: str, w: str, b: str) -> str:
        return self.linear.format(y=y, x=x, w=w, b=b)


_GROUPED = _Spelling(
    name="grouped",
    before="""
      %rows, %offsets, %perm = moe.dispatch(%x, %ids)""",
    linear="""
      %{y} = moe.grouped_linear(%{x}, %{w}, %offsets, %{b})""",
    after="""
      %y = moe.combine(%o, %gates, %perm)""",
    operands="%x, %ids, %gates, %up, %down, %up_bias, %down_bias",
)
_BATCHED = _Spelling(  # a copy of the weights for every row
    name="batched",
    before="""
      %numbers = core.iota()
      %column = core.reshape(%numbers)
      %repeated = core.expand(%column)
      %token = core.reshape(%repeated)
      %rows = core.take(%x, %token) {axis=0}
      %rows_in = core.reshape(%rows)
      %flat = core.reshape(%ids)""",
    linear="""
      %{w}_own = core.take(%{w}, %flat) {{axis=0}}
      %{y}_out = core.matmul(%{w}_own, %{x}_in)
      %{y} = core.reshape(%{y}_out)""",
    after="""
      %share = core.reshape(%gates)
      %weighted = core.mul(%o, %share)
      %each = core.reshape(%weighted)
      %y = core.sum(%each) {axes=[1], keepdim=false}""",
    operands="%x, %ids, %gates, %up, %down, _, _",
)
_OPTIONAL = ("bg", "bu", "up_bias", "down_bias")
_SHARED = ("column", "repeated", "token")  # the numbers of rows are the same in every layer


def _halves_patterns(spelling: _Spelling) -> dict[str, str]:
    """Return where %g and %u come from: two weights, or the halves of one."""
    cut = """
      %g = core.slice(%gu) {axis=1, start=0, stop=Stop, step=Step}
      %u = core.slice(%gu) {axis=1, start=Start, stop=End, step=Step}"""
    return {
        "apart": spelling("g", "rows", "wg", "bg") + spelling("u", "rows", "wu", "bu"),
        "packed": spelling("gu", "rows", "up", "up_bias") + cut,
    }


_CLAMP_GATE = "%gc = core.clamp(%g) {min=Low, max=Limit}\n"
_CLAMP = "%uc = core.clamp(%u) {min=Lower, max=Upper}\n"
_GATED_KINDS = ("silu", "gelu", "gelu_tanh", "relu")
# what makes %h of %g and %u
_GATED = {
    **{kind: f"{KINDS[kind]}\n%h = core.mul(%a, %u)" for kind in _GATED_KINDS},
    "clamped_silu": _CLAMP_GATE + _CLAMP + """
      %a = core.silu(%gc)
      %h = core.mul(%a, %uc)""",
    "gpt_oss": _CLAMP_GATE + _CLAMP + """
      %s = core.mul(%gc, %alpha)
      %t = core.sigmoid(%s)
      %a = core.mul(%gc, %t)
      %v = core.add(%uc, %beta)
      %h = core.mul(%v, %a)""",
    "silu_clamped_after": _CLAMP + """
      %a = core.silu(%g)
      %ac = core.clamp(%a) {min=Low, max=Limit}
      %h = core.mul(%ac, %uc)""",
}  # fmt: skip
_PLAIN = {kind: KINDS[kind].replace("%a", "%h") for kind in (*_GATED_KINDS, "relu2")}


def _end_pattern(spelling: _Spelling) -> str:
    column = "\n      %h_in = core.reshape(%h)" if spelling is _BATCHED else ""
    return column + spelling("o", "h", "down", "down_bias") + spelling.after


def _gated_rule(spelling: _Spelling, halves: str, name: str) -> Rule:
    def guard(m: Match, target: Any) -> Mapping[str, Any]:
        """Read tokens where they are and add results where they belong, instead of copying a row for each expert."""
        if spelling is _BATCHED:
            _check_order(m)
        layout = "concat" if halves == "apart" else _gate_layout(m)
        act = Activation(name if name in KINDS else "silu", layout=layout)
        if "Limit" in m.attrs:
            act = replace(act, limit=_clamp_limit(m), clamp_after=name == "silu_clamped_after")
        if name == "gpt_oss":
            act = replace(act, alpha=_constant_number(m, "alpha"), beta=_constant_number(m, "beta"))
        return {"Act": act, **(join_gate_and_up(m, 1) if halves == "apart" else {})}

    guard.__name__ = f"{spelling.name}_{halves}_{name}_into_experts"
    before = f"{spelling.before}{_halves_patterns(spelling)[halves]}\n{_GATED[name]}{_end_pattern(spelling)}"
    return _into_experts(spelling, before)(guard)


def _ungated_rule(spelling: _Spelling, kind: str) -> Rule:
    def guard(m: Match, target: Any) -> Mapping[str, Any]:
        """Read experts without a gate as one op."""
        if spelling is _BATCHED:
            _check_order(m)
        return {"Act": Activation(kind, gated=False)}

    guard.__name__ = f"{spelling.name}_plain_{kind}_into_experts"
    first = spelling("g", "rows", "up", "up_bias")
    return _into_experts(spelling, f"{spelling.before}{first}\n{_PLAIN[kind]}{_end_pattern(spelling)}")(guard)


def _into_experts(spelling: _Spelling, before: str) -> Callable[[Guard], Rule]:
    return rule(
        before=before,
        after=f"%y = moe.experts({spelling.operands}) {{act=Act}}",
        optional=_OPTIONAL,
        shared=_SHARED if spelling is _BATCHED else (),
    )


def join_gate_and_up(m: Match, axis: int) -> dict[str, Any]:
    """Return the weight with the rows (along `axis`) of the gate and then those of the other half, and its bias."""
    if m.wg.type != m.wu.type:
        raise Refuse(f"the weights are {m.wg.type} and {m.wu.type}", m.wg, m.wu)
    bg, bu = m.values.get("bg"), m.values.get("bu")
    if (bg is None) != (bu is None):
        raise Refuse(f"only {bg or bu} has a bias of the two", m.g, m.u)
    bias = None if bg is None else join_recipes_along(_weight_recipe(m, "bg"), _weight_recipe(m, "bu"), axis=axis)
    return {"up": join_recipes_along(_weight_recipe(m, "wg"), _weight_recipe(m, "wu"), axis=axis), "up_bias": bias}


def _weight_recipe(m: Match, name: str) -> Recipe:
    recipe = m.recipe(name)
    if recipe is None:
        raise Refuse(f"{m[name]} is not a weight, it cannot be put beside another beforehand", m[name])
    return recipe


def _check_order(m: Match) -> None:
    """Refuse reshapes other than those between [T, K] and [T*K], and between a row and a column."""
    tokens, chosen = m.ids.type.shape
    wanted = {
        "column": (tokens, 1), "repeated": (tokens, chosen), "flat": (tokens * chosen,), "share": (tokens * chosen, 1),
        "rows_in": (*m.rows.type.shape, 1), "h_in": (*m.h.type.shape, 1), "each": (tokens, chosen, m.x.type.shape[1]),
        **{y: m[f"{y}_out"].type.shape[:2] for y in ("g", "u", "gu", "o") if f"{y}_out" in m.values},
    }  # fmt: skip
    for name, shape in wanted.items():
        if m[name].type.shape != shape:
            raise Refuse(f"{m[name]} is {m[name].type}, not [{', '.join(map(str, shape))}]", m[name])


def _gate_layout(m: Match) -> str:
    """Return how the rows of gate and up lie in one weight; Refuse where they are not its halves."""
    width = m.gu.type.shape[1]
    found = {(1, width / 2, width / 2): "concat", (2, width, 1): "interleaved"}.get((m.Step, m.Stop, m.Start))
    if found is None or m.End != width:
        raise Refuse(f"{m.g} and {m.u} are not the halves of {m.gu.type}", m.gu)
    return found


def _clamp_limit(m: Match) -> float:
    if m.Low != float("-inf") or (m.Lower, m.Upper) != (-m.Limit, m.Limit):
        limits = f"{m.Low}..{m.Limit} and {m.Lower}..{m.Upper}"
        raise Refuse(
            f"the halves are clamped to {limits}, not to -inf..limit and -limit..limit",
            m["ac" if "ac" in m.values else "gc"],
            m.uc,
        )
    return float(m.Limit)


def _constant_number(m: Match, name: str) -> float:
    number = m.number(name)
    if number is None:
        raise Refuse(f"{m[name]} is not a constant", m[name])
    return float(number)


_SPELLINGS = (_GROUPED, _BATCHED)
RULES = (
    *(_gated_rule(s, halves, name) for s in _SPELLINGS for halves in _halves_patterns(s) for name in _GATED),
    *(_ungated_rule(s, kind) for s in _SPELLINGS for kind in _PLAIN),
)


@pass_(reads="moe")
def fuse_dispatch(module: Module, target: Any) -> Rewritten:
    """Fuse dispatch, the experts' linears, activation and weighted sum into moe.experts, without a copy of the tokens."""
    fused, notes = apply_rules(module, target, RULES)
    return Rewritten(fused, (*notes, *_notes_on_unexplained(fused, notes)))


def _notes_on_unexplained(module: Module, notes: Iterable[Note]) -> Iterator[Note]:
    """Yield a note for each block that stays and that no rule came near."""
    explained = {(note.function, note.loc) for note in notes}
    for function in module.functions:
        for op in function.ops:
            if op.name == "moe.combine" and (function.name, op.loc) not in explained:
                between = ", ".join(dict.fromkeys(_op_names_between(function, op.inputs[0]))) or "nothing"
                yield refusal_note(
                    "fuse-dispatch", function, op, f"between the experts' linears no rule knows {between}"
                )


def _op_names_between(function: Function, rows: Value) -> Iterator[str]:
    """Yield the names of the ops from a block's last grouped linear back to the ones before it, the last op first."""
    last = function.producers.get(rows.name)
    waiting = list(last.inputs[:1]) if last and last.name == "moe.grouped_linear" else [rows]
    while waiting:
        op = function.producers.get(waiting.pop().name)
        if op is not None and op.name.startswith("core."):
            yield op.name
            waiting += op.inputs
