"""Reads a router backwards, from the weights and the indices that experts get to the logits.

On the way lie, each of them or not: factors, the division by a sum, the score of what was chosen, the choice, its
limit to groups, the bias, the score of all. What is read becomes one moe.route with the attributes that say it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf

from ..errors import MoecError, Refuse
from ..ir.dce import eliminate_dead_code
from ..ir.module import Function, Op, Value
from ..ir.names import Names
from ..ir.types import Attr
from ..ops import OPS
from ..ops.builder import IRBuilder
from .patterns import Match
from .rules import in_order

_SCORES = ("core.softmax", "core.sigmoid", "core.sqrt")  # the last op of a score
_OPERANDS = ("logits", "bias", "given", "expert_scale")


@dataclass
class Router:
    """A router as far as it was read, going backwards: the ops that moe.route replaces, its operands and attributes."""

    function: Function
    gates: Value
    ids: Value
    ops: dict[int, Op] = field(default_factory=dict)
    operands: dict[str, Value | None] = field(default_factory=dict)
    attrs: dict[str, Attr] = field(default_factory=dict)

    def producer(self, value: Value | None, *names: str) -> Op | None:
        """Return the op that makes a value, if it has one of the names, and note that it is read."""
        op = self.function.producers.get(value.name) if value else None
        if op is None or op.name not in names:
            return None
        self.ops[id(op)] = op
        return op

    def number(self, value: Value) -> float | int | bool | None:
        """Return the one number that a value holds everywhere, if it is a constant."""
        return Match(self.function, {"x": value}, {}, {}).number("x")

    def split(self, op: Op | None) -> tuple[Value, float] | None:
        """Return the operands of a two-operand op as a value and a number, if one of them is a number."""
        if op is None:
            return None
        x, y = op.inputs[0], op.inputs[-1]
        for value, other in ((x, y), (y, x)):
            if value.type == op.results[0].type and (number := self.number(other)) is not None:
                return value, float(number)
        return None

    def refusal_of(self, value: Value, instead: str) -> Refuse:
        """Return the refusal of a value that is not made as it should be."""
        op = self.function.producers.get(value.name)
        return Refuse(f"{value} is made by {op.name}, {instead}" if op else f"{value} is an input, {instead}", value)

    def with_route(self, reader: Op | None) -> Function:
        """Return the function with one moe.route for the ops that were read; Refuse where they are also used elsewhere."""
        function, read = self.function, self.ops.values()
        for value in (v for op in read for v in op.results if v not in (self.gates, self.ids)):
            other = next((u for u in function.uses.get(value.name, []) if u is None or id(u) not in self.ops), self)
            if other is not self:
                raise Refuse(f"{value} is also used outside the router", value)
        operands = tuple(self.operands.get(name) for name in _OPERANDS)
        defaults = OPS["moe.route"].attrs
        said = {n: v for n, v in self.attrs.items() if n == "score" or v != defaults[n][1]}
        builder = IRBuilder(function.name, names=Names(function.names))
        builder.loc = tuple(dict.fromkeys(text for op in function.ops if id(op) in self.ops for text in op.loc))
        given = "given" in self.operands
        try:
            hints = (self.gates, f"{self.ids.name}.routed" if given else self.ids)
            _, ids = builder.add_all("moe.route", *operands, hints=hints, **said)
        except MoecError as error:
            raise Refuse(error.what) from None
        last = max(i for i, op in enumerate(function.ops) if id(op) in self.ops)
        ops = [*function.ops[: last + 1], *builder.ops, *function.ops[last + 1 :]]
        kept = [_replace_operand(op, self.ids, ids) if op is reader else op for op in ops if id(op) not in self.ops]
        return eliminate_dead_code(replace(function, ops=in_order(tuple(kept))))

    # --- the weights, from the last step to the first ------------------------------------------------------

    def read(self) -> None:
        """Fill in operands and attributes; Refuse names the op in the way."""
        weights = self._read_normalization(self._read_factors(self.gates))
        late, chosen = self._read_score(weights)
        top = self.producer(self.ids, "core.topk")
        if top and (top.results[1] != self.ids or top.attributes["axis"] != 1):
            raise Refuse(f"{self.ids} is not a choice along the experts", self.ids)
        taken = self.producer(chosen, "core.topk", "core.gather")
        if taken is None or taken.attributes["axis"] != 1 or (taken.name == "core.topk" and taken is not top):
            raise self.refusal_of(chosen, "which does not take scores of the chosen experts")
        if taken.name == "core.gather" and taken["index"] != self.ids:
            raise Refuse(f"{chosen} takes the scores of other experts than {self.ids}", chosen)
        source = taken.inputs[0]
        self.attrs["k"] = int(self.ids.type.shape[1])
        if top is None:
            self._read_given_experts(source, late)
        else:
            self._read_choice(top.inputs[0], source, late)

    def _read_factors(self, x: Value) -> Value:
        """Return what factors are applied to: one number, or one number an expert."""
        scale = 1.0
        while (op := self.function.producers.get(x.name)) and op.name in ("core.mul", "core.div"):
            scaled = self.split(op) if op.name == "core.mul" or self.number(op["y"]) is not None else None
            if scaled:
                scale = scale * scaled[1] if op.name == "core.mul" else scale / scaled[1]
                x = scaled[0]
            elif op.name == "core.mul" and (factors := self._per_expert(op)) and "expert_scale" not in self.operands:
                x, self.operands["expert_scale"] = factors
            else:
                break
            self.ops[id(op)] = op
        if scale != 1.0:
            self.attrs["scale"] = scale
        return x

    def _per_expert(self, op: Op) -> tuple[Value, Value] | None:
        for value, factor in (op.inputs, op.inputs[::-1]):
            take = self.function.producers.get(factor.name)
            chosen = take is not None and take.name == "core.take" and take["index"] == self.ids
            if take and chosen and len(take.inputs[0].type.shape) == 1:
                self.ops[id(take)] = take
                return value, take.inputs[0]
        return None

    def _read_normalization(self, x: Value) -> Value:
        """Return the weights before they are divided by their sum or norm."""
        op = self.producer(x, "core.div")
        if op is None:
            return x
        weights, total = op.inputs[0], op.inputs[-1]
        if expand := self.producer(total, "core.expand"):
            total = expand.inputs[0]
        if weights.type != x.type or total.type.shape != (x.type.shape[0], 1):
            raise Refuse(f"{weights} is divided by {total}, not by one number a token", x)
        if (clamp := self.producer(total, "core.clamp")) and clamp.settings["max"] == inf:
            total, self.attrs["min_sum"] = clamp.inputs[0], clamp.attributes["min"]
        elif larger := self.split(self.producer(total, "core.maximum")):
            total, self.attrs["min_sum"] = larger
        if more := self.split(self.producer(total, "core.add")):
            total, self.attrs["eps"] = more
        self.attrs |= self._norm_attributes(weights, total)
        return weights

    def _norm_attributes(self, weights: Value, total: Value) -> dict[str, Attr]:
        """Return which norm of the weights a total is: their sum, or (sum |w|^p)^(1/p)."""
        wrong = self.refusal_of(total, f"which is not the sum of {weights} or their norm")
        root = self.producer(total, "core.sqrt", "core.pow")
        p = 1.0
        if root:
            given = self.number(root["y"]) if root.name == "core.pow" else 0.5
            if not given:
                raise wrong
            total, p = root.inputs[0], 1 / float(given)
        if reshape := self.producer(total, "core.reshape"):
            total = reshape.inputs[0]
        added = self.producer(total, "core.sum")
        if added is None or added.attributes["axes"] != (1,):
            raise wrong
        inner, exponent = added.inputs[0], 1.0
        if power := self.producer(inner, "core.mul", "core.pow"):
            square = power.name == "core.mul" and power.inputs[0] == power.inputs[-1]
            found = 2.0 if square else self.number(power["y"]) if power.name == "core.pow" else None
            inner, exponent = power.inputs[0], float(found or 0)
        absolute = self.producer(inner, "core.abs")
        inner = absolute.inputs[0] if absolute else inner
        if inner != weights or abs(exponent - p) > 1e-6 * p or not (absolute or exponent in (1, 2)):
            raise wrong
        return {"renorm": "norm", "p": exponent} if absolute or exponent == 2 else {"renorm": "sum"}

    def _read_score(self, x: Value) -> tuple[str, Value]:
        """Return the score that makes a value, and what it scores."""
        if (op := self.function.producers.get(x.name)) is None:
            return "identity", x
        if op.name == "core.softmax" and op.attributes["axis"] != 1:
            raise Refuse(f"{x} is a softmax along axis {op.attributes['axis']}, not along the experts", x)
        if op.name in ("core.softmax", "core.sigmoid"):
            self.ops[id(op)] = op
            return op.name.removeprefix("core."), op.inputs[0]
        inner = self.function.producers.get(op.inputs[0].name) if op.name == "core.sqrt" else None
        if inner and inner.name == "core.softplus":
            self.ops |= {id(op): op, id(inner): inner}
            return "sqrtsoftplus", inner.inputs[0]
        return "identity", x

    # --- the choice ------------------------------------------------------------------------------------------

    def _read_given_experts(self, source: Value, late: str) -> None:
        """Read weights of experts that are known beforehand."""
        early, logits = self._read_score(source)
        if late != "identity" and early != "identity":
            raise Refuse(f"{source} is scored before and after its experts are taken", source)
        if _depends_on(self.function, self.ids, logits):
            raise self.refusal_of(self.ids, f"which is not a choice of the largest, but depends on {logits}")
        self.operands |= {"logits": self._read_logits(logits), "given": self.ids}
        self._set_order(early, late, "scores")

    def _read_choice(self, choice: Value, source: Value, late: str) -> None:
        """Read the choice of the largest, and whether the weights are taken from it, from scores, or from logits."""
        scores = self._without_bias(self._without_groups(choice), source)
        early, logits = self._read_score(scores)
        self.operands["logits"] = self._read_logits(logits)
        if source == scores:
            self._set_order(early, late, "scores")
        elif source == choice:
            self._set_order(early, late, "choice")
        elif source == logits and late == "identity":
            self._set_order(early, late, "logits")
        elif early == late == "identity" and (found := self._read_score(source))[1] == logits and found[0] != "softmax":
            self._set_order(early, found[0], "scores")  # a score of each logit may as well be taken after the choice
        else:
            raise Refuse(f"the experts are chosen by {choice} and weighted by {source}, which scores otherwise", source)

    def _set_order(self, early: str, late: str, weigh: str) -> None:
        if early != "identity" and late != "identity":
            raise Refuse(f"the weights are a {late} of the chosen {early} scores")
        self.attrs["score"] = late if early == "identity" else early
        if late != "identity":
            self.attrs["order"] = "select_score"
        if weigh != "scores":
            self.attrs["weigh"] = weigh

    def _read_logits(self, logits: Value) -> Value:
        if len(logits.type.shape) != 2:
            raise Refuse(f"the logits {logits} have {len(logits.type.shape)} axes, not tokens and experts", logits)
        op = self.function.producers.get(logits.name)
        if op and op.name in ("core.where", "core.scatter", "core.softmax"):
            raise self.refusal_of(logits, "which is no limit to groups of experts that moe.route has")
        return logits

    def _without_bias(self, x: Value, source: Value) -> Value:
        """Return the choice before the bias was added; what also weighs the experts is the logits' own bias."""
        op = self.function.producers.get(x.name)
        if op is None or op.name != "core.add":
            return x
        experts = x.type.shape[-1:]
        for scores, bias in (op.inputs, op.inputs[::-1]):
            row = self.function.producers.get(bias.name)
            if bias.type.shape == (1, *experts) and row and row.name == "core.reshape":
                bias = row.inputs[0]
            made = self.function.producers.get(scores.name)
            if source == x and not (made and made.name in _SCORES):
                continue
            if bias.type.shape == experts and scores.type == x.type:
                self.ops[id(op)] = op
                self.operands["bias"] = bias
                return scores
        return x

    def _without_groups(self, x: Value) -> Value:
        """Return the choice before experts outside the best groups were masked."""
        op = self.function.producers.get(x.name)
        if op is None or op.name != "core.where":
            return x
        condition, yes, no = op.inputs
        kept, flipped = self._read_condition(condition)
        choice, other = (no, yes) if flipped else (yes, no)
        mask, spread = self.number(other), self.producer(kept, "core.reshape")
        groups = spread and self._group_attributes(spread, choice)
        if mask is None or not groups:
            raise Refuse(f"{x} is masked otherwise than by the best groups of experts", x)
        self.ops[id(op)] = op
        if groups["topk_groups"] != groups["groups"]:
            self.attrs |= {**groups, "mask": float(mask)}
        return choice

    def _read_condition(self, value: Value) -> tuple[Value, bool]:
        """Return what a truth value is made of, and whether it holds where that is 0."""
        flipped = False
        while op := self.producer(value, "core.logical_not", "core.cast", "core.ne", "core.eq", "core.gt"):
            if len(op.inputs) == 2 and self.number(op["y"]) != 0:
                break
            flipped ^= op.name in ("core.logical_not", "core.eq")
            value = op.inputs[0]
        return value, flipped

    def _group_attributes(self, spread: Op, choice: Value) -> dict[str, Attr] | None:
        """Return the groups' attributes if `spread` says for each expert whether its group is one of the best."""
        wide = self.producer(spread.inputs[0], "core.expand")
        column = wide and self.producer(wide.inputs[0], "core.reshape")
        marks = column and self.producer(column.inputs[0], "core.scatter")
        best = marks and self.producer(marks.inputs[1], "core.topk")
        if not (wide and column and marks and best) or len(marks.results[0].type.shape) != 2:
            return None
        kind, grouped = self._group_score(best.inputs[0])
        cut = self.producer(grouped, "core.reshape")
        (tokens, groups), (_, experts) = marks.results[0].type.shape, choice.type.shape
        shape = (tokens, groups, experts / groups)
        fits = (
            (marks.attributes["axis"], best.attributes["axis"], marks.inputs[1]) == (1, 1, best.results[1])
            and (self.number(marks.inputs[0]), self.number(marks.inputs[2])) == (0, 1)
            and best.inputs[0].type.shape == (tokens, groups)
            and (column.results[0].type.shape, wide.results[0].type.shape) == ((tokens, groups, 1), shape)
            and cut is not None
            and (cut.inputs[0], cut.results[0].type.shape) == (choice, shape)
        )
        return {"groups": int(groups), "topk_groups": best.attributes["k"], "group_score": kind} if fits else None

    def _group_score(self, x: Value) -> tuple[str, Value | None]:
        """Return how a group is judged by its experts, and the experts by groups."""
        if flat := self.producer(x, "core.reshape"):
            x = flat.inputs[0]
        kind, count = "max", 1
        if added := self.producer(x, "core.sum", "core.amax"):
            if added.attributes["axes"] != (2,):
                return kind, None
            x, kind, count = added.inputs[0], "top2", 2
            if added.name == "core.amax":
                return "max", x
        top = self.producer(x, "core.topk")
        if not top or top.results[0] != x or (top.attributes["axis"], top.attributes["k"]) != (2, count):
            return kind, None
        return kind, top.inputs[0]


def _depends_on(function: Function, value: Value, on: Value) -> bool:
    """Return whether a value is made of another."""
    queue = [value]
    for value in queue:
        op = function.producers.get(value.name)
        queue += [v for v in (op.inputs if op else ()) if v not in queue]
    return on in queue


def _replace_operand(op: Op, old: Value, new: Value) -> Op:
    return replace(op, operands=tuple(new if v == old else v for v in op.operands))
