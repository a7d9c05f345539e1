"""Stores weights in fewer bits, each role in a format of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..compiler.errors import MoecError
from ..compiler.formats.format import Format, GroupCodec
from ..compiler.formats.table import GROUPS, find_format
from ..compiler.ir.module import Function, Module, Op, Value
from ..compiler.ir.names import Names
from ..compiler.ir.notes import Note, Rewritten, note_on
from ..compiler.ir.recipes import WEIGHT
from ..compiler.quantize.awq_scales import fold_awq_scales
from ..compiler.quantize.choices import KEEP, check_options, quantize_attributes
from ..compiler.quantize.plan import Unit, parse_layers
from ..compiler.rewrite.declare import pass_
from ..compiler.rewrite.editor import Editor
from ..compiler.rewrite.expert_groups import split_experts
from ..compiler.rewrite.roles import weight_operands, weight_roles
from ..compiler.weights.steps.table import step

# groups that are tried in this order where the user names no group: experts are the largest part and the least sensitive one,
# attention is the most sensitive one
PREFERRED = {"experts": (256, 128, 64, 32, 16), "attention": (32, 16)}
PREFERRED_ELSEWHERE = (128, 64, 32, 16)
_ONE_WEIGHT = ("nn.embedding", "core.linear")  # ops that store no weights alike


@pass_(reads="moe", rounds=True, judge=check_options)
def quantize(
    module: Module, target: Any, *, experts: str = "int4", attention: str = "int4", shared: str = "int4",
    dense: str = "int4", router: str = "f32", embedding: str = "int8", head: str = "int4", group: int | None = None,
    symmetric: bool = False, method: str = "rtn", starved: str = "rtn", layers: str = "",
) -> Rewritten:  # fmt: skip
    """Store weights in fewer bits.

    Each role takes a number of bits (int8, int4, int2), a format by its name (uint4_g64, mxfp4, nvfp4, fp8_b128 ...), or f32
    to be left as it is. A head that is tied to the embedding is stored once, in the more bits of the two, if no format is
    named. Weights of 2 and 4 bits have zero points unless `symmetric` is set. `group` is the number of weights that share
    a scale; without one it is the largest that divides, that the target holds and is not slow at.
    `method` is rtn (to nearest, with a search for the scale), gptq or awq (with the inputs on a calibration text);
    `starved` is what these do with experts that saw fewer than 32 tokens of that text: rtn, or force (other tokens are
    sent through them). `layers` gives single layers formats of their own, as in `0..2.attention=int8_g128
    3.experts=uint4_g64 head=int8_g64`; layers that come to differ become functions of their own.
    """
    policy = {
        "experts": experts, "attention": attention, "shared": shared, "dense": dense, "router": router,
        "embedding": embedding, "head": head,
    }  # fmt: skip
    how = quantize_attributes(method, starved)
    module, policies = _split_by_policy(module, policy, parse_layers(layers))
    roles = weight_roles(module)
    # one format for everything is not meant for a table that the target only looks rows up in
    everything = len({spec for role, spec in policy.items() if role != "router"}) == 1
    notes: list[Note] = []
    functions = {}
    for function in module.functions:
        own = roles[function.name]
        found = {
            place: _choose_format(function, place, spec, group, symmetric, target, own, everything)
            for place, spec in _format_specs(function, own, policies[function.name])
        }
        chosen = {place: format for place, format in found.items() if isinstance(format, Format)}
        chosen |= _shared_formats(function, chosen, own, policies[function.name], target)
        scaled, unscaled = fold_awq_scales(function) if method == "awq" and chosen else (function, [])
        functions[function.name] = _quantize_operands(scaled, chosen, how)
        refused = [note for note in found.values() if isinstance(note, Note)]
        notes += [*refused, *unscaled, *(_rounded_blocks(function, chosen) if how else [])]
    return Rewritten(module.with_functions(functions), tuple(notes))


Place = tuple[int, int]  # an op and one of its operands


def _format_specs(function: Function, roles: Mapping[Place, str], policy: Policy) -> list[tuple[Place, str]]:
    found = [(place, policy.of(function.ops[place[0]], role)) for place, role in roles.items()]
    return [(place, spec) for place, spec in found if spec not in KEEP]


# --- layers with formats of their own --------------------------------------------------------------------------


@dataclass(frozen=True)
class Policy:
    """The formats of a function: by role, and by op (the name of its first result) where the experts are in groups."""

    roles: Mapping[str, str]
    groups: Mapping[tuple[int, ...], str]
    ops: Mapping[str, str] = field(default_factory=dict)

    def of(self, op: Op, role: str) -> str:
        """Return the format of a weight of an op."""
        return self.ops.get(op.results[0].name, self.roles[role])


def _split_by_policy(
    module: Module, policy: Mapping[str, str], single: Mapping[Unit, str]
) -> tuple[Module, dict[str, Policy]]:
    """Return the module with a function for every set of layers of one policy, and the policy of every function."""
    roles = {name: set(uses.values()) for name, uses in weight_roles(module).items()}
    names = Names(module.by_name, mark="_")
    policies: dict[str, Policy] = {}
    made: dict[tuple[str, tuple], str] = {}
    clones: dict[str, list[Function]] = {}
    used: set[Unit] = set()

    def function_for(name: str, layer: int | None) -> str:
        """Return the function that a call in a layer is to call."""
        own = {unit: f for unit, f in single.items() if unit.layer == layer and unit.role in roles[name]}
        used.update(own)
        key = (name, tuple(sorted((unit[1:], f) for unit, f in own.items())))
        if key not in made:
            first = name not in policies
            made[key] = name if first else names.fresh(f"{name}_{layer}")
            whole = {unit.role: f for unit, f in own.items() if not unit.experts}
            policies[made[key]] = Policy(
                {**policy, **whole}, {unit.experts: f for unit, f in own.items() if unit.experts}
            )
            if not first:
                clones.setdefault(name, []).append(replace(module.by_name[name], name=made[key]))
        return made[key]

    callers = {}
    for caller in module.functions:
        if caller.name == "main":
            function_for("main", None)
        calls = {i: function_for(op.callee, _layer_number(op)) for i, op in enumerate(caller.ops) if op.callee}
        ops = tuple(
            replace(op, callee=calls[i]) if calls.get(i, "") != op.callee else op for i, op in enumerate(caller.ops)
        )
        callers[caller.name] = (
            caller if all(a is b for a, b in zip(ops, caller.ops, strict=True)) else replace(caller, ops=ops)
        )
    if unknown := [str(unit) for unit in single if unit not in used]:
        known = sorted(
            {
                str(Unit(_layer_number(op), r))
                for f in module.functions
                for op in f.ops
                if op.callee
                for r in roles[op.callee]
            }
        )
        raise MoecError(
            f"layers: there is no {unknown[0]}",
            todo=f"there are {', '.join([*known[:12], *sorted(roles['main'])])} ...",
        )
    functions = [f for old in module.functions for f in (callers[old.name], *clones.get(old.name, ()))]
    split = replace(module, functions=tuple(functions)) if clones else module
    grouped = {f.name: _in_groups(f, policies.get(f.name, Policy(policy, {}))) for f in split.functions}
    return split.with_functions({n: f for n, (f, _) in grouped.items()}), {n: p for n, (_, p) in grouped.items()}


def _in_groups(function: Function, policy: Policy) -> tuple[Function, Policy]:
    """Return the function with its experts in the groups of the policy, and the policy with the formats of their ops."""
    found: dict[str, str] = {}
    for op in function.ops if policy.groups else ():
        if op.name != "moe.experts":
            continue
        count = int(op["up"].type.shape[0])
        named = [e for group in policy.groups for e in group]
        if max(named) >= count:
            raise MoecError(
                f"layers: there is no expert {max(named)}", where=f"@{function.name}", todo=f"there are {count}"
            )
        rest = tuple(e for e in range(count) if e not in named)
        groups = {**policy.groups, **({rest: policy.roles["experts"]} if rest else {})}
        function, ops = split_experts(function, op, list(groups))
        found |= {op.results[0].name: f for op, f in zip(ops, groups.values(), strict=True)}
    return function, replace(policy, ops=found)


def _layer_number(op: Op) -> int | None:
    layer = op.attributes.get("layer")
    return layer if isinstance(layer, int) else None


# --- which format ----------------------------------------------------------------------------------------------


def _choose_format(
    function: Function, place: Place, spec: str, group: int | None, symmetric: bool, target: Any,
    roles: Mapping[Place, str], everything: bool,
) -> Format | Note:  # fmt: skip
    """Return the format of a weight; a note where no group fits a weight and the user asked for no group.

    `everything` says that all roles were given one format: then an embedding that cannot have it stays as it is.
    """
    op, role = function.ops[place[0]], roles[place]
    weights = [v for k in weight_operands(op) if (v := op.operands[k]) is not None]  # an op stores all alike
    named = find_format(spec)
    if named is not None:
        candidates = [named]
    else:
        bits = int(spec.lstrip("uint"))
        zeros = spec.startswith("u") or (bits < 8 and not symmetric)
        preferred = PREFERRED.get(role, PREFERRED_ELSEWHERE) if bits <= 4 else PREFERRED_ELSEWHERE
        # two groups in a row or more, where there is a choice: it is small matrices that lose most
        shortest = min(int(v.type.shape[-1]) for v in weights)
        groups = [group] if group else [g for g in preferred if 2 * g <= shortest] or preferred
        # where the target takes no zero points, the same without
        signs = ("u", "") if zeros and not spec.startswith("u") else ("u" * zeros,)
        names = [f"{sign}int{bits}_g{g}" for sign in signs for g in groups]
        candidates = [f for name in names if (f := find_format(name))]
    asked_for = (named is not None or group is not None) and not (everything and role == "embedding")
    reasons = []
    for format in candidates:
        # what the user asks for may be slow: lowering notes it
        reason = _why_not_stored(op, weights, format, target, or_slow=not asked_for)
        if not reason:
            return format
        reasons.append(f"{format.name}: {reason}")
    what = f"{op.operands[place[1]]} ({role}, {weights[0].type.shape[-1]} columns) cannot be stored as {reasons[0]}"
    if asked_for:
        where = f"{op.operands[place[1]]} in @{function.name}"
        raise MoecError(
            what, where=where, model=", ".join(op.loc), todo=_would_work(op, weights, candidates[0], target)
        )
    return note_on(function, op, f"{what}; it stays f32")


def _why_not_stored(op: Op, weights: list[Value], format: Format, target: Any, or_slow: bool = True) -> str:
    """Return why weights cannot have a format, or with `or_slow` should not; nothing if they can."""
    for weight in weights:
        if weight.type.dtype != "f32":
            return f"it is {weight.type.dtype}"
        if weight.type.sizes[-1] % format.group:
            return f"groups of {format.group} do not divide {weight.type.sizes[-1]}"
    if target is None:
        return ""
    return target.formats.holds(op, format) or (or_slow and target.formats.slow(op, format)) or ""


def _would_work(op: Op, weights: list[Value], format: Format, target: Any) -> str:
    """Return the formats like this one that the weights could have."""
    names = [f"{prefix}int{bits}_g{g}" for bits in (format.bits, 4, 8) for prefix in ("", "u") for g in GROUPS]
    fitting = [n for n in dict.fromkeys(names) if (f := find_format(n)) and not _why_not_stored(op, weights, f, target)]
    return f"formats that work: {', '.join(fitting[:8])}" if fitting else "leave this role at f32"


def _shared_formats(
    function: Function, chosen: Mapping[Place, Format], roles: Mapping[Place, str], policy: Policy, target: Any
) -> dict[Place, Format]:
    """Return one format for a weight that several ops read in formats that no name asks for: a head tied to an embedding.

    It is the one of most bits: storing the weight in both would take more bytes, and lose more of its numbers.
    """
    readers: dict[Value, list[Place]] = {}
    for i, k in chosen:
        op = function.ops[i]
        if op.name in _ONE_WEIGHT and find_format(policy.of(op, roles[i, k])) is None and (value := op.operands[k]):
            readers.setdefault(value, []).append((i, k))
    found: dict[Place, Format] = {}
    for value, places in readers.items():
        widest = max((chosen[place] for place in places), key=lambda f: f.bits_per_weight)
        if not any(_why_not_stored(function.ops[i], [value], widest, target) for i, _ in places):
            found |= dict.fromkeys(places, widest)
    return found


# --- storing it ------------------------------------------------------------------------------------------------


def _rounded_blocks(function: Function, chosen: Mapping[Place, Format]) -> list[Note]:
    """Return a note for each weight of blocks, which no method looks at the inputs of."""
    blocks = [(function.ops[i], k) for i, k in chosen if function.ops[i].name == "nn.block_linear"]
    reason = "its blocks have inputs of their own, it is rounded to nearest"
    return [note_on(function, op, f"{op.operands[k]}: {reason}") for op, k in blocks]


def _quantize_operands(function: Function, chosen: Mapping[Place, Format], how: Mapping[str, str]) -> Function:
    """Return the function with the chosen operands quantized; the same weight in two formats becomes two."""
    if not chosen:
        return function
    editor = Editor(function)
    made: dict[tuple[str, str], Value] = {}
    # a table that is only looked up is multiplied with nothing: there are no inputs to choose its codes by; what the
    # blocks of a weight are multiplied with differs from block to block, and calibration keeps the inputs of whole rows
    multiplied = {
        (function.ops[i][k].name, format.name)
        for (i, k), format in chosen.items()
        if function.ops[i].name not in ("nn.embedding", "nn.block_linear")
    }

    def stored(value: Value, format: Format) -> Value:
        key = (value.name, format.name)
        if key not in made:
            name = f"{value.name}.{format.name}"
            calibrated = bool(how) and key in multiplied and isinstance(format.codec(), GroupCodec)
            options = {**how, WEIGHT: f"{function.name}:{name}"} if calibrated else {}
            recipe = step("quantize", editor.recipe(value), to=format.name, **options)
            made[key] = editor.const(name, recipe)
        return made[key]

    for i, op in enumerate(function.ops):
        operands = [
            stored(v, chosen[i, k]) if v is not None and (i, k) in chosen else v for k, v in enumerate(op.operands)
        ]
        editor.ops.append(replace(op, operands=tuple(operands)) if any(k[0] == i for k in chosen) else op)
    return _with_old_names(editor.finish(), made)


def _with_old_names(function: Function, made: Mapping[tuple[str, str], Value]) -> Function:
    """Give a quantized weight the name of the one that it replaces, if that one is gone and was replaced once."""
    kept = {c.value.name for c in function.consts}
    olds = [old for old, _ in made]
    names = {new.name: old for (old, _), new in made.items() if old not in kept and olds.count(old) == 1}
    return function.renamed(names)
