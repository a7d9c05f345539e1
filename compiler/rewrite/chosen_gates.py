"""Reads gates of all experts back to those of the chosen ones: `full[t, e]` is 0 but where e is one of ids[t].

Code that computes every expert for every token multiplies by such gates. They are a scatter of the chosen ones, or a
comparison of the ids with each expert's number, and what is computed of them number by number.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import Refuse
from ..ir.dims import Size
from ..ir.module import Function, Op, Value
from ..ops.builder import IRBuilder
from .patterns import Match


@dataclass(frozen=True)
class Chosen:
    """The chosen experts of each token: ids i64[*tokens, K], and what makes the gates [*tokens, K] from the values below.

    `expert` is the one expert whose gates were read (None: those of all). `gates` are values of the function, or None for 1.
    """

    ids: Value
    gates: Value | None
    expert: int | None = None


@dataclass
class GateReader:
    """Reads gates in a function; what it has to compute anew goes to `builder`."""

    function: Function
    builder: IRBuilder
    known: dict[Value, tuple[Value, Value | None]] = field(default_factory=dict)  # what _sparse has found

    def producer(self, value: Value) -> Op | None:
        """Return the op that makes a value."""
        return self.function.producers.get(value.name)

    def number(self, value: Value) -> float | int | bool | None:
        """Return the one number that a value holds everywhere, if it is a constant."""
        return Match(self.function, {"x": value}, {}, {}).number("x")

    def read_all(self, full: Value, experts: Size) -> Chosen:
        """Return what chose the experts of gates [*tokens, E]; Refuse where no choice is seen."""
        value = self.without_ones(full)
        if value.type.shape[-1] != experts and value.type.shape[0] == experts:
            raise Refuse(f"{value} chooses tokens for each expert (expert choice), not experts for each token", value)
        if value.type.shape[-1] != experts:
            raise Refuse(f"{value} is {value.type}, not a number for each of {experts} experts", value)
        ids, gates = self._sparse(value)
        return Chosen(ids, gates)

    def read_one(self, column: Value) -> Chosen:
        """Return what chose the experts where gates [*tokens, 1] are those of one expert."""
        value = self.without_ones(column)
        op = self.producer(value)
        if op is not None and op.name == "core.slice":  # a column of the gates of all
            start, stop = op.attributes.size("start"), op.attributes.size("stop")
            if op.attributes.integer("axis") == len(op["x"].type.shape) - 1 and stop - start == 1 and start.is_Integer:
                ids, gates = self._sparse(op["x"])
                return Chosen(ids, gates, int(start))
        summed = self.without_ones(op["x"]) if op is not None and op.name == "core.sum" else value
        if op is not None and op.name == "core.sum" and op.attributes["axes"] != (len(op["x"].type.shape) - 1,):
            raise Refuse(f"{value} is a sum over another axis than that of the choices", value)
        mask, gates = self._masked(summed)
        compared = self.producer(mask)
        if compared is None or compared.name != "core.eq":
            raise Refuse(f"{mask} does not compare ids with an expert's number", mask)
        ids, expert = self._split_number(compared)
        return Chosen(ids, gates, expert)

    def count_choices(self, ids: Value) -> int:
        """Return of how many experts ids are a choice of different ones; Refuse where that is not seen."""
        value = self.without_ones(ids)
        op = self.producer(value)
        if op is None or op.name != "core.topk" or op.results[1] != value:
            raise Refuse(f"{ids} are not the indices of a top-k, which are all different", ids)
        width = op.inputs[0].type.shape[-1]
        if op.attributes["axis"] != len(op.inputs[0].type.shape) - 1 or not width.is_Integer:
            raise Refuse(f"{ids} are chosen along another axis than that of the experts", ids)
        return int(width)

    def _masked(self, value: Value) -> tuple[Value, Value | None]:
        """Return the mask and the numbers of a value that is numbers where a mask is set and 0 elsewhere."""
        op = self.producer(value)
        if op is not None and op.name == "core.mul":
            for a, b in (op.inputs, op.inputs[::-1]):
                if (mask := self._mask_of(b)) is not None and mask.type.shape == value.type.shape:
                    return mask, self.without_ones(a)
        if op is not None and op.name == "core.where" and self.number(op.inputs[2]) == 0:
            return self.without_ones(op.inputs[0]), self.without_ones(op.inputs[1])
        if (mask := self._mask_of(value)) is not None:
            return mask, None
        raise Refuse(f"{value} is not a number where a mask is set", value)

    def _mask_of(self, value: Value) -> Value | None:
        """Return the mask that a value is the numbers 0 and 1 of."""
        while (op := self.producer(value)) is not None and op.name in ("core.cast", "core.reshape"):
            value = op.inputs[0]
        return value if value.type.dtype == "bool" else None

    def _split_number(self, compared: Op) -> tuple[Value, int]:
        for a, b in (compared.inputs, compared.inputs[::-1]):
            if (number := self.number(b)) is not None:
                return a, int(number)
        raise Refuse(f"{compared.results[0]} compares two values, not ids with a number", compared.results[0])

    def without_ones(self, value: Value) -> Value:
        """Return a value before reshapes that only put in or take away axes of 1."""
        while (op := self.producer(value)) is not None and op.name in ("core.reshape", "core.expand"):
            if not _only_ones_differ(op.inputs[0], value):
                break
            value = op.inputs[0]
        return value

    # --- gates of all experts ---------------------------------------------------------------------------------

    def _sparse(self, full: Value) -> tuple[Value, Value | None]:
        """Return the ids and the gates at them of a value that is 0 elsewhere; Refuse where that is not seen."""
        if full not in self.known:
            self.known[full] = self._read_sparse(full)
        return self.known[full]

    def _read_sparse(self, full: Value) -> tuple[Value, Value | None]:
        op = self.producer(full)
        last = len(full.type.shape) - 1
        if op is None:
            raise Refuse(f"{full} is given from outside: which experts it chooses is not known", full)
        match op.name:
            case "core.scatter" if op.attributes["axis"] == last and self.number(op.inputs[0]) == 0:
                ids, numbers = op.inputs[1], op.inputs[2]
                return ids, None if self.number(numbers) == 1 else numbers
            case "core.cast" if op.inputs[0].type.dtype != "bool":
                ids, gates = self._sparse(op.inputs[0])
                return ids, gates if gates is None else self.builder.add("core.cast", gates, to=full.type.dtype)
            case "core.mul" | "core.div":
                return self._scaled(op)
            case "core.where" if self.number(op.inputs[2]) == 0:
                ids, ones = self._sparse(op.inputs[0])
                if ones is not None:
                    raise Refuse(f"{op.inputs[0]} is not a choice", op.inputs[0])
                return ids, self._at(op.inputs[1], ids)
            case "core.sum" if len(op.attributes.integers("axes")) == 1:
                return self._one_hot(op)
            case "core.softmax" if op.attributes["axis"] == last:
                return self._softmax(op)
            case "core.ne" | "core.gt" if self.number(op.inputs[1]) == 0:
                ids, _ = self._sparse(op.inputs[0])
                return ids, None
            case "core.reshape" if _only_ones_differ(op.inputs[0], full):
                return self._sparse(op.inputs[0])
        raise Refuse(f"{full} is made by {op.name}: it chooses no experts", full)

    def _scaled(self, op: Op) -> tuple[Value, Value | None]:
        """Return the chosen gates times, or divided by, what they are multiplied by."""
        first: Refuse | None = None
        pairs = (op.inputs, op.inputs[::-1]) if op.name == "core.mul" else (op.inputs,)
        for a, b in pairs:
            if a.type.shape != op.results[0].type.shape:
                continue
            try:
                ids, gates = self._sparse(a)
            except Refuse as refusal:
                first = first or refusal
                continue
            other = self._at(b, ids, a, gates)
            if gates is None and op.name == "core.mul":
                return ids, other
            gates = self._ones(ids, op) if gates is None else gates
            return ids, self.builder.add(op.name, gates, other)
        raise first or Refuse(f"{op.results[0]} chooses no experts", op.results[0])

    def _at(self, value: Value, ids: Value, full: Value | None = None, gates: Value | None = None) -> Value:
        """Return numbers of all experts at the chosen ones; a sum over all gates of the chosen ones alone."""
        if not value.type.shape and self.number(value) is not None:
            return value
        op = self.producer(value)
        if value.type.shape[-1] == 1:
            if op is None or op.name != "core.sum" or full is None or op.inputs[0] != full or gates is None:
                return value
            return self.builder.add("core.sum", gates, axes=(len(gates.type.shape) - 1,), keepdim=True)
        if op is not None and op.name == "core.add" and self.number(op.inputs[1]) is not None:
            return self.builder.add("core.add", self._at(op.inputs[0], ids, full, gates), op.inputs[1])
        if len(value.type.shape) != len(ids.type.shape):
            raise Refuse(f"{value} is {value.type}, which does not fit the ids {ids.type}", value)
        return self.builder.add("core.gather", value, ids, axis=len(ids.type.shape) - 1)

    def _ones(self, ids: Value, op: Op) -> Value:
        return self.builder.add("core.full", shape=ids.type.shape, value=1.0, dtype=op.results[0].type.dtype)

    def _softmax(self, op: Op) -> tuple[Value, Value | None]:
        """Return the softmax of the chosen logits alone, where all others are -inf."""
        spread = self.producer(op.inputs[0])
        if spread is None or spread.name != "core.scatter" or self.number(spread.inputs[0]) != float("-inf"):
            raise Refuse(f"{op.results[0]} is a softmax over all experts: it is 0 for none", op.results[0])
        axis = len(spread.inputs[2].type.shape) - 1
        if spread.attributes["axis"] != axis:
            raise Refuse(f"{op.results[0]} is a softmax over another axis than that of the choices", op.results[0])
        return spread.inputs[1], self.builder.add("core.softmax", spread.inputs[2], axis=axis)

    def _one_hot(self, op: Op) -> tuple[Value, Value | None]:
        """Return the ids and gates of a sum over choices of gates where the id is the expert's number."""
        (axis,) = op.attributes.integers("axes")
        if axis == len(op.inputs[0].type.shape) - 1:
            raise Refuse(f"{op.results[0]} is a sum over the experts", op.results[0])
        mask, gates = self._masked(op.inputs[0])
        compared = self.producer(mask)
        if compared is None or compared.name != "core.eq" or axis != len(op.inputs[0].type.shape) - 2:
            raise Refuse(f"{op.results[0]} is no sum over choices of an expert's number", op.results[0])
        for a, b in (compared.inputs, compared.inputs[::-1]):
            counted = self.producer(self.without_ones(b))
            if counted is not None and counted.name == "core.iota":
                ids = self.without_ones(a)
                return ids, None if gates is None else self.without_ones(gates)
        raise Refuse(f"{mask} does not compare ids with the experts' numbers", mask)


def _only_ones_differ(a: Value, b: Value) -> bool:
    """Return whether two values have the same sizes but for axes of 1."""
    return [n for n in a.type.shape if n != 1] == [n for n in b.type.shape if n != 1]
