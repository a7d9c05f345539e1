"""Kernel specs: for each op of a lowered module the kernels that compute it, with the tile found for each number of tokens.

kernels.json holds all of it (kernels.schema.json is its schema): the tile program itself, where each tile lies, what is
expected of it and what else was considered. Equal ops of different layers share their kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise, product
from math import isfinite
from typing import Any, TypeAlias

import sympy

from ....compiler.ir.module import Module, Op, call_bindings
from ....compiler.ops import OPS
from ....compiler.ops.define import any_size_text
from ....compiler.version import __version__
from ..chip.chip import Profile
from ..predict.assumed import assumed_of
from ..predict.roofline import Rates, framework_row
from ..predict.work import WorkTable, call_counts, module_work, place_of
from ..select.choose import Fits, computation_of, fastest_kernels, weight_layouts
from ..select.exchange import exchange_entries
from ..select.implementations import Computation, Tokens
from ..select.search import Choice, Found
from ..tile.machine import chip_of, layout_of
from ..tile.packing import Packing
from ..tile.serialize import program_to_json
from ..tile.tiles import DEVICE, For, walk_statements
from .bindings import Binding, bind_kernel, check_op
from .library import call_json, exchange_json, library_of

# 2: bindings, every step, and what a simulation needs of the chip; 3: kernels by the new tokens of a sequence; 4: and by all
SCHEMA = 4
BUCKETS = (1, 4, 16, 64, 256, 1024, 8192)  # most tokens of a step that a kernel is tuned for
CONTEXT = 4096  # tokens before a decoding step, for what attention reads
DECODE = 64  # steps of at most so many tokens count as decoding: one token of each of so many sequences


Limits: TypeAlias = tuple[int, int | None]  # the least and the most of a number; None: any more
ANY: Limits = (1, None)


@dataclass(frozen=True)
class KernelSpec:
    """One kernel for one bucket of tokens: `low` to `high` tokens a step, `new` of a sequence at least and at most.

    `slots`: tokens of a sequence at least and at most, past ones and new ones together.
    """

    name: str
    kind: str
    op: str
    low: int
    high: int
    found: Found
    weights: Mapping[str, Packing]
    places: tuple[str, ...]  # results of the ops that it computes, as @function/%value
    calls: int  # launches in one run of the whole program
    objects: Mapping[str, Any] = field(default_factory=dict)  # what a toolchain made of it
    binding: Binding = field(default_factory=Binding)
    group: str = ""  # what the steps of kernels.json name: the kernels of the same ops
    new: Limits = ANY  # None: any more
    slots: Limits = ANY

    @property
    def best(self) -> Choice:
        """The tile that was chosen."""
        return self.found.best

    def to_json(self, profile: Profile) -> dict[str, Any]:
        """Return the spec as JSON values."""
        choice, program = self.best, self.best.program
        return {
            "name": self.name,
            "group": self.group,
            "kind": self.kind,
            "computes": {"op": self.op, "places": list(self.places), "calls": self.calls},
            "tokens": [self.low, self.high],
            "new": list(self.new),
            "slots": list(self.slots),
            "weights": {name: packing_json(p) for name, p in self.weights.items()},
            "binding": self.binding.to_json(),
            "tile": asdict(choice.tile),
            "grid": [{"axis": name, "extent": str(extent)} for name, extent in program.grid],
            "loops": [
                {"var": s.var, "from": str(s.start), "to": str(s.stop), "step": str(s.step), "stages": s.stages}
                for s in walk_statements(program.body)
                if isinstance(s, For)
            ],
            "placement": memory_use(choice, profile),
            "pipeline": {"stages": choice.tile.stages, "warps": choice.tile.warps},
            "predicted": prediction_json(choice),
            "alternatives": [
                {"tile": asdict(c.tile), "time": c.prediction.time, "bound": c.prediction.bound}
                for c in self.found.others
            ],
            "considered": {"tried": self.found.tried, "fitting": self.found.fitting},
            "operands": list(layout_of(profile, choice.tile.m).operands),
            **call_json(library_of(profile.family.library), self.op, self.weights, program),
            "program": program_to_json(program),
            **({"objects": dict(self.objects)} if self.objects else {}),
        }


def memory_use(choice: Choice, profile: Profile) -> dict[str, Any]:
    """Return each memory's bytes in use, its limit, and the buffers in it."""
    chip = chip_of(profile, layout_of(profile, choice.tile.m))
    found: dict[str, Any] = {}
    for memory, used in choice.use.items():
        buffers = {
            name: {"bytes": b.bytes, "copies": b.copies}
            for name, b in choice.program.buffers.items()
            if b.memory == memory
        }
        limit = None if memory == DEVICE else chip.capacity[memory]
        found[memory] = {"bytes": used, "limit": limit, "align": chip.align.get(memory, 1), "buffers": buffers}
    return found


def prediction_json(choice: Choice) -> dict[str, Any]:
    """Return a prediction as JSON values: seconds, bytes, FLOPs."""
    p = choice.prediction
    return {
        "time": p.time, "bound": p.bound, "flops": p.flops, "bytes": {"device": p.device_bytes, "cache": p.cache_bytes},
        "parts": {"launch": p.launch, "memory": p.memory, "cache": p.cache, "matrix": p.matrix, "vector": p.vector},
        "points": p.points, "rounds": p.rounds, "resident": p.resident,
    }  # fmt: skip


def packing_json(p: Packing) -> dict[str, Any]:
    """Return how a weight lies in memory as JSON values."""
    halves = p.quantized is not None and p.quantized.bits == 4
    order = "fractal" if p.fractal else "pairs" if p.pairs else "halves" if halves else "rows"
    return {
        "format": p.format,
        "order": order,
        "shape": [*([p.experts] if p.experts else []), p.rows, p.columns],
        "bytes": p.bytes,
        "parts": {name or "numbers": {"dtype": d, "shape": list(s)} for name, (d, s) in p.parts.items()},
    }


@dataclass(frozen=True)
class Kernels:
    """All kernels of a module on a chip."""

    target: str
    profile: Profile
    kernels: tuple[KernelSpec, ...]
    functions: tuple[dict[str, Any], ...]  # each op with the names of its kernels by bucket
    framework: tuple[dict[str, Any], ...]  # ops that the framework computes between kernels, with their times by bucket
    buckets: tuple[int, ...]
    problems: tuple[tuple[str, Any], ...] = ()  # what is computed, as (kind, problem)

    def to_json(self) -> dict[str, Any]:
        """Return the kernel's entry in kernels.json."""
        return {
            "schema": SCHEMA,
            "moec": __version__,
            "target": self.target,
            "chip": _chip_json(self.profile),
            "memories": _memories_json(self.profile),
            "assumed": assumed_of(self.profile),
            "buckets": list(self.buckets),
            "context": CONTEXT,
            "predicted": {str(b): self.time(b) for b in self.buckets},
            "exchange": self.exchange(),
            "functions": list(self.functions),
            "framework": list(self.framework),
            "kernels": [k.to_json(self.profile) for k in self.kernels],
        }

    def exchange(self) -> list[dict[str, Any]]:
        """Return what dispatch and combine cost where the routed experts lie on several devices."""
        experts = [problem for kind, problem in self.problems if kind == "experts_up"]
        library = exchange_json(library_of(self.profile.family.library))
        return [
            {
                "experts": [e.experts, e.chosen, e.hidden],
                "groups": exchange_entries(e, self.profile, self.buckets),
                **library,
            }
            for e in experts
        ]

    def time(self, tokens: int) -> float:
        """Return the predicted seconds of one step of so many tokens: kernels and the framework's ops, one after the other."""
        bucket = str(next((b for b in self.buckets if tokens <= b), self.buckets[-1]))
        step = step_of(tokens)
        found = (k for k in self.kernels if k.low <= tokens <= k.high and is_for_step(k, step.new, step.past))
        return sum(k.calls * k.best.prediction.time for k in found) + sum(
            e["predicted"][bucket] for e in self.framework
        )


def _chip_json(profile: Profile) -> dict[str, Any]:
    figures = {
        key: {"value": f.value, "grade": f.grade, "source": f.source} for key, f in profile.figures().items() if f
    }
    return {
        "name": profile.name, "variant": profile.variant, "family": profile.family.name, "arch": profile.arch,
        "toolchain": profile.toolchain, "figures": figures,
    }  # fmt: skip


def _memories_json(profile: Profile) -> dict[str, Any]:
    """Return what a simulation checks, beside the operands of each kernel: room, alignment, and paths between memories."""
    chip = chip_of(profile, layout_of(profile))
    room = {name: {"bytes": size, "align": chip.align.get(name, 1)} for name, size in chip.capacity.items()}
    return {"room": room, "paths": sorted(map(list, chip.paths))}


# --- from a module -------------------------------------------------------------------------------------------------


def kernel_specs(module: Module, profile: Profile, tokens: Sequence[int] = BUCKETS) -> Kernels:
    """Return the kernels of a module of stage kernel for each bucket of tokens.

    MoecError for an op that has no kernel, for a weight in a format that none reads, and where nothing fits the chip.
    """
    calls = call_counts(module)
    stored = weight_layouts(module, profile)
    groups: dict[tuple[str, Any], _Group] = {}
    functions, framework = [], []
    for function in module.functions:
        steps = []
        for op in function.ops:
            if op.callee:
                steps.append({"op": "call", "callee": op.callee, **_value_names(op), "bindings": call_bindings(op)})
                continue
            place = place_of(function, op)
            computation = computation_of(op, function, stored, profile)
            if computation is None:
                framework.append({"op": op.name, "place": place, "calls": calls[function.name]})
                steps.append({"op": op.name, "place": place, **_value_names(op), "attributes": _attribute_values(op)})
                continue
            if (computation.kind, computation.problem) not in groups:
                number = sum(g.computation.kind == computation.kind for g in groups.values())
                groups[computation.kind, computation.problem] = _Group(
                    computation, f"{computation.kind}_{number}", op.name
                )
            group = groups[computation.kind, computation.problem]
            group.places.append(place)
            group.ops.setdefault((op.operand_types, tuple(v.type for v in op.results)), (op, place))
            group.calls += calls[function.name]
            steps.append({"op": op.name, "place": place, "kernels": group.name, **_value_names(op, named=True)})
        functions.append({"name": function.name, "calls": calls[function.name], "steps": steps})
    buckets = tuple(sorted(tokens))
    kernels = [k for g in groups.values() for k in _group_specs(g, profile, buckets)]
    summed = _sum_calls(framework, _framework_times(module, profile, framework, buckets), buckets)
    return Kernels(profile.name, profile, tuple(kernels), tuple(functions), summed, buckets, tuple(groups))


def _framework_times(
    module: Module, profile: Profile, framework: Iterable[Mapping[str, Any]], buckets: tuple[int, ...]
) -> dict[str, dict[int, float]]:
    """Return the predicted seconds of ops that the framework computes, in all of their calls, by place and bucket."""
    places = {entry["place"] for entry in framework}
    table, rates = WorkTable(module, tuple(w for w in module_work(module) if w.place in places)), Rates.of(profile)
    found: dict[str, dict[int, float]] = {}
    for bucket in buckets:
        step = step_of(bucket)
        for work, amounts in zip(table.works, table.at(step.batch, step.new, step.past), strict=True):
            found.setdefault(work.place, {})[bucket] = framework_row(work, amounts, rates).time
    return found


@dataclass
class _Group:
    """Ops that share their kernels."""

    computation: Computation
    name: str
    op: str
    places: list[str] = field(default_factory=list)
    calls: int = 0
    ops: dict[Any, tuple[Op, str]] = field(default_factory=dict)  # one of each types of operands and results


def _value_names(op: Op, named: bool = False) -> dict[str, Any]:
    """Return the names of an op's operands and results: in order, or `named` as its signature has them."""
    operands, results = [None if v is None else v.name for v in op.operands], [v.name for v in op.results]
    if not named:
        return {"operands": operands, "results": results}
    signature = OPS[op.name].signature
    return {
        "operands": {d.name: name for d, name in zip(signature.operands, operands, strict=True)},
        "results": {d.name: name for d, name in zip(signature.results, results, strict=True)},
    }


def _attribute_values(op: Op) -> dict[str, Any]:
    """Return an op's attributes as JSON values; sizes and numbers that are not finite as texts."""
    return {name: _json_value(value) for name, value in op.attributes.items()}


def _json_value(value: Any) -> Any:
    match value:
        case tuple():
            return [_json_value(v) for v in value]
        case sympy.Expr():
            return any_size_text(value)
        case float() if not isfinite(value):
            return str(value)
    return value


def _group_specs(group: _Group, profile: Profile, buckets: tuple[int, ...]) -> Iterable[KernelSpec]:
    low = {high: before + 1 for before, high in pairwise((0, *buckets))}
    fits: Fits = {}
    for high, step, new, slots in _bucket_steps(buckets, group.computation):
        made: set[str] = set()
        for kernel, choice in fastest_kernels(group.computation, step, profile, fits):
            binding = bind_kernel(group.op, kernel, choice.best.program, group.computation.weights, made)
            for op, place in group.ops.values():
                check_op(op, choice.best.program, binding, place)
            yield KernelSpec(
                _kernel_name(group, kernel.name, high, new[0], slots[0]), kernel.name, group.op, low[high], high, choice,
                group.computation.weights, tuple(group.places), group.calls, binding=binding, group=group.name, new=new,
                slots=slots,
            )  # fmt: skip


def _bucket_steps(buckets: Iterable[int], computation: Computation) -> Iterator[tuple[int, Tokens, Limits, Limits]]:
    """Yield the most tokens of a bucket, the step to tune for, and of what sequences it is: new tokens, and all tokens."""
    for high, slots in product(buckets, _parts_at(computation.slots_at)):
        for new in _parts_at(computation.changes_at):
            if new == ANY:
                step = step_of(high)
            else:
                step = Tokens(high, 1, CONTEXT) if new[0] == 1 else Tokens(1, high, 0)
            if high < new[0] or (slots[1] or high) < new[0]:
                continue  # no step has so many new tokens
            if slots != ANY:
                step = _within_slots(step, slots)
            yield high, step, new, slots


def _parts_at(changes: int | None) -> tuple[Limits, ...]:
    """Return the limits of a number below and from where something changes."""
    return (ANY,) if changes is None else ((1, changes - 1), (changes, None))


def _within_slots(step: Tokens, slots: Limits) -> Tokens:
    """Return a step with as many past tokens as it takes to have so many in all, and no more new ones than that."""
    least, most = slots
    new = step.new if most is None else min(step.new, most)
    past = max(step.past, least - new) if most is None else min(step.past, most - new)
    return Tokens(step.count // new, new, past)


def is_within(new: int, limits: tuple[int, int | None]) -> bool:
    """Return whether a number of new tokens of a sequence is within limits; None: any more."""
    low, high = limits
    return low <= new and (high is None or new <= high)


def is_for_step(kernel: Any, new: int, past: int) -> bool:
    """Return whether a kernel with limits `new` and `slots` is for a step of so many new and past tokens of a sequence."""
    return is_within(new, kernel.new) and is_within(new + past, kernel.slots)


def _kernel_name(group: _Group, kernel: str, high: int, new: int, slots: int) -> str:
    """Return the name of a kernel, which is that of its file too: linear_0_t16, experts_down_0_combine_t16."""
    own = [] if kernel == group.computation.kind else [kernel]
    limits = [f"s{new}"] * (new > 1) + [f"c{slots}"] * (slots > 1)
    return "_".join([group.name, *own, f"t{high}", *limits])


def step_of(count: int) -> Tokens:
    """Return the step that a bucket of so many tokens is tuned for: one of each of so many sequences, or a prompt."""
    return Tokens(count, 1, CONTEXT) if count <= DECODE else Tokens(1, count, 0)


def _sum_calls(
    rows: list[dict[str, Any]], times: Mapping[str, Mapping[int, float]], buckets: tuple[int, ...]
) -> tuple[dict[str, Any], ...]:
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        nothing = {"calls": 0, "predicted": {str(b): 0.0 for b in buckets}, "places": []}
        entry = found.setdefault(row["op"], {"op": row["op"], **nothing})
        entry["calls"] += row["calls"]
        entry["places"].append(row["place"])
        for bucket, time in times.get(row["place"], {}).items():
            entry["predicted"][str(bucket)] += time
    return tuple(found.values())
