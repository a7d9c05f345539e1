"""Raises experts that are all computed for every token, and multiplied by gates that are 0 for those that were not chosen.

People write them with an axis for the experts, or as a loop over a list of modules whose results are added up. Both
become moe.dispatch, the experts' linears over sorted rows, and moe.combine: work for the chosen experts only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from ..compiler.errors import Refuse
from ..compiler.ir.dims import Size
from ..compiler.ir.module import Function, Module, Op, Value
from ..compiler.ir.notes import Note, Rewritten, refusal_note
from ..compiler.rewrite.chosen_gates import Chosen, GateReader
from ..compiler.rewrite.declare import pass_
from ..compiler.rewrite.editor import Editor
from ..compiler.rewrite.expert_bodies import BodyReader, Node
from ..compiler.rewrite.expert_writer import Block, write_block

_LEAST = 2  # experts: one alone is no choice


@pass_(reads="graph")
def raise_experts(module: Module, target: object) -> Rewritten:
    """Compute only the experts that were chosen, where the code computes all of them and multiplies by gates."""
    functions: dict[str, Function] = {}
    notes: list[Note] = []
    for function in module.functions:
        functions[function.name], found = _raise_all(function)
        notes += found
    return Rewritten(module.with_functions(functions), tuple(notes))


def _raise_all(function: Function) -> tuple[Function, list[Note]]:
    """Raise the experts of a function, one block after the other, the last one first."""
    notes: list[Note] = []
    seen: set[str] = set()
    while True:
        root = next(
            (op for op in reversed(function.ops) if op.results[0].name not in seen and _may_be_root(function, op)), None
        )
        if root is None:
            return function, notes
        place = function.ops.index(root)
        editor = Editor(function)
        editor.ops, editor.loc = list(function.ops[:place]), root.loc
        try:
            write_block(editor, _read_block(editor, root), root.results[0])
        except Refuse as reason:
            seen.add(root.results[0].name)
            notes.append(refusal_note("raise-experts", function, root, reason))
            continue
        editor.ops += function.ops[place + 1 :]
        function = editor.finish()


# --- reading ---------------------------------------------------------------------------------------------------


def _may_be_root(function: Function, op: Op) -> bool:
    """Return whether an op may add up weighted experts, so that a refusal is worth a note."""
    if op.name == "core.sum":
        made = function.producers.get(op.inputs[0].name)
        return (
            made is not None
            and made.name == "core.mul"
            and len(made.results[0].type.shape) > 2
            and _experts_in(function, op)
        )
    if op.name == "core.matmul":
        return _gates_of_product(function, op) is not None and _experts_in(function, op)
    if op.name not in ("core.add", "core.where"):
        return False
    users = function.uses.get(op.results[0].name, [])
    inner = len(users) == 1 and users[0] is not None and users[0].name == op.name
    terms = _weighted_terms(function, op)[0] if op.name == "core.add" else _masked_terms(function, op)[0]
    return not inner and len(terms) >= _LEAST


def _experts_in(function: Function, op: Op) -> bool:
    """Return whether an op's value is computed with matrices of several experts, or with several values stacked."""
    return any(
        (made.name == "core.matmul" and made is not op) or made.name == "core.concat"
        for made in _before(function, op.inputs)
    )


def _read_block(editor: Editor, root: Op) -> Block:
    gates = GateReader(editor.function, editor)
    if root.name == "core.add":
        return _read_loop(gates, root)
    if root.name == "core.where":
        return _read_branches(gates, root)
    if root.name == "core.matmul":
        found = _gates_of_product(editor.function, root)
        assert found is not None  # _may_be_root has seen it
        return _read_stacked(gates, root, *found)
    made = editor.function.producers[root.inputs[0].name]
    x, y = made.inputs
    outputs, column = (x, y) if x.type.shape == made.results[0].type.shape and y.type.shape != x.type.shape else (y, x)
    if len(axes := root.attributes.integers("axes")) != 1:
        raise Refuse("the sum is over several axes", root.results[0])
    (axis,) = axes
    if (taken := _taken_from(gates, outputs, axis)) is not None:
        return _read_experts(gates, taken[0], Chosen(taken[1], gates.without_ones(column)))
    return _read_stacked(gates, root, outputs, column, made.results[0].type.shape[axis])


def _taken_from(gates: GateReader, outputs: Value, axis: int) -> tuple[Value, Value] | None:
    """Return what all experts give, and the ids, where the outputs of the chosen ones are gathered from it."""
    op = gates.producer(outputs)
    if op is None or op.name != "core.gather" or op.attributes["axis"] != axis:
        return None
    return op.inputs[0], gates.without_ones(_before_repeating(gates.function, op.inputs[1]))


def _read_stacked(gates: GateReader, root: Op, outputs: Value, column: Value, experts: Size) -> Block:
    """Read experts whose results are multiplied by gates for all and added up."""
    if (ids := _gathered_by(gates.function, outputs)) is not None:
        return _read_experts(gates, outputs, Chosen(ids, gates.without_ones(column)))
    if not experts.is_Integer:
        raise Refuse(f"{experts} experts are added up", root.results[0])
    return _read_experts(gates, outputs, gates.read_all(_turned(gates.function, column), experts))


def _read_experts(gates: GateReader, outputs: Value, chosen: Chosen) -> Block:
    """Read what all experts give in one value; it is computed at once, or stacked of one for each."""
    count = gates.count_choices(chosen.ids)
    stacked = gates.producer(outputs)
    while stacked is not None and stacked.name in ("core.reshape", "core.transpose"):
        stacked = gates.producer(stacked.inputs[0])
    if stacked is not None and stacked.name == "core.concat" and len(stacked.inputs) == count:
        return Block(chosen, *_read_each(gates.function, [gates.without_ones(v) for v in stacked.inputs]))
    own, stacks = _computed_with(gates.function, count)
    tokens = _tokens_of(gates.function, outputs, own, stacks)
    body, _ = BodyReader(gates.function, tokens, own, count).body(outputs)
    return Block(chosen, tokens, [body])


def _gathered_by(function: Function, outputs: Value) -> Value | None:
    """Return the ids by which the matrices of the chosen experts are copied for each token; None where none are."""
    stacks = {c.value.name for c in function.consts if len(c.value.type.shape) == 3}
    taken = (op for op in _before(function, [outputs]) if op.name == "core.take" and op.inputs[0].name in stacks)
    found = next(taken, None)
    return None if found is None or found.attributes["axis"] != 0 else found.inputs[1]


def _turned(function: Function, column: Value) -> Value:
    """Return gates with the experts as their last axis, where the code has them first: [E, T, 1]."""
    value = column
    while (op := function.producers.get(value.name)) is not None and op.name in (
        "core.reshape",
        "core.expand",
        "core.transpose",
    ):
        if op.name == "core.transpose" and op.attributes["perm"] == tuple(
            reversed(range(len(op.inputs[0].type.shape)))
        ):
            return op.inputs[0]
        value = op.inputs[0]
    return column


def _gates_of_product(function: Function, op: Op) -> tuple[Value, Value, Size] | None:
    """Return outputs, gates and the number of experts of a product [.., 1, E] x [.., E, D] or [.., D, E] x [.., E, 1]."""
    x, y = op.inputs
    if len(x.type.shape) < 3 or len(x.type.shape) != len(y.type.shape):
        return None
    experts = x.type.shape[-1]
    if x.type.shape[-2] == 1:
        return y, x, experts
    return (x, y, experts) if y.type.shape[-1] == 1 else None


def _weighted_terms(function: Function, op: Op) -> tuple[list[tuple[Value, Value, Value]], list[Value]]:
    """Return the products that a chain of sums adds up, as (product, value, column of gates), and its other terms."""
    products, rest, waiting = [], [], [op.results[0]]
    while waiting:
        value = waiting.pop()
        made = function.producers.get(value.name)
        alone = value == op.results[0] or len(function.uses[value.name]) == 1
        if made is not None and made.name == "core.add" and alone and all(v.type == value.type for v in made.inputs):
            waiting += made.inputs
        elif made is not None and made.name == "core.mul" and (pair := _value_and_column(made)) is not None:
            products.append((value, *pair))
        else:
            rest.append(value)
    return products[::-1], rest[::-1]


def _value_and_column(product: Op) -> tuple[Value, Value] | None:
    for a, b in (product.inputs, product.inputs[::-1]):
        if b.type.shape and b.type.shape[-1] == 1 and a.type == product.results[0].type and a.type.shape[-1] != 1:
            return a, b
    return None


def _read_loop(gates: GateReader, root: Op) -> Block:
    """Read experts that are added up one after the other, each with its own ops."""
    products, rest = _weighted_terms(gates.function, root)
    groups: dict[tuple[Value, Value | None], dict[int, Value]] = {}
    members: dict[Value, tuple[Value, Value | None]] = {}
    first: Refuse | None = None
    for product, value, column in products:
        try:
            chosen = gates.read_one(column)
        except Refuse as refusal:
            first = first or refusal
            continue
        assert chosen.expert is not None
        own = groups.setdefault((chosen.ids, chosen.gates), {})
        if chosen.expert in own:
            raise Refuse(f"expert {chosen.expert} is added twice", value)
        own[chosen.expert] = value
        members[product] = (chosen.ids, chosen.gates)
    if not groups:
        raise first or Refuse("no term is chosen by a router", root.results[0])
    key, values = next(iter(groups.items()))
    others = [product for product, _, _ in products if members.get(product) != key]
    tokens, bodies = _read_each(gates.function, _in_order(gates, key[0], values))
    return Block(Chosen(*key), tokens, bodies, [v for v in (*rest, *others) if gates.number(v) != 0])


def _masked_terms(function: Function, op: Op) -> tuple[list[tuple[Value, Value]], Value]:
    """Return the values that are written where masks are set, with the masks, and what they are written over."""
    terms = []
    value = op.results[0]
    while (made := function.producers.get(value.name)) is not None and made.name == "core.where":
        mask, written, value = made.inputs
        if written.type != made.results[0].type:
            break
        terms.append((written, mask))
    return terms[::-1], value


def _read_branches(gates: GateReader, root: Op) -> Block:
    """Read experts that write the rows of the tokens which chose them, one expert a token."""
    terms, over = _masked_terms(gates.function, root)
    if gates.number(over) != 0:
        raise Refuse(f"the experts write over {over}, which is not 0", over)
    values: dict[int, Value] = {}
    keys: set[tuple[Value, Value | None]] = set()
    for value, mask in terms:
        chosen = gates.read_one(mask)
        if len(chosen.ids.type.shape) != 1 or chosen.expert is None or chosen.expert in values:
            raise Refuse(f"{mask} lets several experts write one row", mask)
        product = gates.producer(value)
        pair = _value_and_column(product) if product is not None and product.name == "core.mul" else None
        values[chosen.expert] = pair[0] if pair else value
        keys.add((chosen.ids, gates.without_ones(pair[1]) if pair else None))
    if len(keys) != 1:
        raise Refuse("the experts are weighted differently", root.results[0])
    ((ids, weights),) = keys
    tokens, bodies = _read_each(gates.function, _in_order(gates, ids, values))
    return Block(Chosen(ids, weights), tokens, bodies)


def _in_order(gates: GateReader, ids: Value, values: Mapping[int, Value]) -> list[Value]:
    """Return what experts give, in their order; Refuse where some of those that may be chosen are missing."""
    count = gates.count_choices(ids)
    if sorted(values) != list(range(count)) or count < _LEAST:
        raise Refuse(f"of {count} experts those that are added up are {sorted(values)}", ids)
    return [values[e] for e in range(count)]


def _read_each(function: Function, values: Sequence[Value]) -> tuple[Value, list[Node]]:
    """Return the tokens and the body of each expert; Refuse where they differ in more than their weights."""
    cones = [{v.name for op in _before(function, [value]) for v in op.results} for value in values]
    common = set.intersection(*cones)
    bodies: list[Node] = []
    found: Value | None = None
    for value, cone in zip(values, cones, strict=True):
        own = frozenset(cone - common)
        tokens = _tokens_of(function, value, own)
        if found is not None and tokens != found:
            raise Refuse(f"experts get {found} and {tokens}", tokens)
        found = tokens
        bodies.append(BodyReader(function, tokens, own).body(value)[0])
        if not bodies[-1].alike(bodies[0]):
            raise Refuse(f"the expert that gives {value} is not made as the first one is", value)
    assert found is not None  # there are experts
    return found, bodies


def _before(function: Function, values: Sequence[Value]) -> Iterator[Op]:
    """Yield the ops that values are computed by."""
    waiting, seen = list(values), set()
    while waiting:
        op = function.producers.get(waiting.pop().name)
        if op is not None and id(op) not in seen:
            seen.add(id(op))
            waiting += op.inputs
            yield op


def _computed_with(function: Function, experts: int) -> tuple[frozenset[str], set[str]]:
    """Return the names of what is computed with matrices of all experts [E, .., ..], and of these matrices."""
    stacks = {
        c.value.name for c in function.consts if len(c.value.type.shape) == 3 and c.value.type.shape[0] == experts
    }
    own: set[str] = set()
    for op in function.ops:
        read = {v.name for v in op.inputs}
        if op.name in ("core.transpose", "core.reshape", "core.take") and op.inputs[0].name in stacks:
            stacks |= {v.name for v in op.results}
        elif read & own or (op.name == "core.matmul" and op.inputs[1].name in stacks):
            own |= {v.name for v in op.results}
    return frozenset(own), stacks


def _tokens_of(function: Function, value: Value, own: frozenset[str], stacks: Collection[str] = ()) -> Value:
    """Return the one value that an expert is computed of, before it is repeated for each; Refuse for several."""
    weights = {c.value.name for c in function.consts}
    given: dict[str, Value] = {}
    for op in _before(function, [value]):
        if op.results[0].name in own:
            given |= {
                v.name: v for v in op.inputs if v.name not in own and v.name not in weights and v.name not in stacks
            }
    found = [v for v in given.values() if v.type.shape and not _is_fixed(function, v, weights)]
    found = list(dict.fromkeys(_before_repeating(function, v) for v in found))
    if len(found) != 1:
        raise Refuse(f"the experts get {', '.join(map(str, found)) or 'no tokens'}", *found)
    return found[0]


def _before_repeating(function: Function, value: Value) -> Value:
    """Return a value before axes of 1 were put in and repeated."""
    while (op := function.producers.get(value.name)) is not None:
        sizes = [[n for n in v.type.shape if n != 1] for v in (op.inputs[0], value)] if op.inputs else []
        if not (op.name == "core.reshape" and sizes[0] == sizes[1]) and op.name != "core.expand":
            break
        value = op.inputs[0]
    return value


def _is_fixed(function: Function, value: Value, weights: set[str]) -> bool:
    """Return whether a value is made of weights and numbers only."""
    return all(
        v.name in weights or v.name in function.producers for op in _before(function, [value]) for v in op.inputs
    ) and (value.name in function.producers)
