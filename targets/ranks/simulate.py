"""Runs the shards of a plan in one process: rows go to the devices that hold their experts, are computed there and come back.

Each device computes with nothing but its own files. Requests are spread over the copies of attention in the order of the batch;
what the parts of a matrix give is put together as an all-gather would.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...compiler.artifact.manifest import State, check_files, read_json, read_manifest
from ...compiler.check.interpret import bind_dims
from ...compiler.check.tiled import TiledInterpreter
from ...compiler.errors import MoecError
from ...compiler.ir.dtypes import DTYPES
from ...compiler.ir.module import Module, Op
from ...compiler.ir.recipes import Recipe
from ...compiler.ops.activation import apply_activation
from ...compiler.text.parser import parse_module
from ...compiler.weights.sources.checkpoint import read_tensors
from ...compiler.weights.sources.source import Box
from ..session import INPUTS, OpTime, check_step
from .emit import PLAN, divide_weights
from .layout import Layout
from .weights import Share, read_share

PROGRAM = "program.moir"
linear: Callable[..., torch.Tensor] = torch.nn.functional.linear


@dataclass(frozen=True)
class Store:
    """The shards of all devices, read: which shares there are of a weight, and the tensors of each file."""

    layout: Layout
    shares: Mapping[Recipe, Mapping[str, Share]]  # a weight's recipe -> file -> what it holds of it
    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    slots: tuple[tuple[int, ...], ...]
    whole: dict[Recipe, torch.Tensor] = field(default_factory=dict)

    def common(self, recipe: Recipe) -> torch.Tensor:
        """Return a weight that all tokens go through, its parts put together."""
        if recipe not in self.whole:
            parts = sorted(self.shares[recipe].items(), key=lambda item: item[1].part)
            found = [read_share(self.tensors[file], share) for file, share in parts]
            self.whole[recipe] = torch.cat(found, -2) if len(found) > 1 else found[0]
        return self.whole[recipe]

    def expert(self, recipe: Recipe | None, rank: int, index: int) -> torch.Tensor | None:
        """Return a matrix or bias of the expert in a slot of an expert-parallel rank, from that rank's files only."""
        if recipe is None:
            return None
        mine = sorted((share.part, file) for file, share in self.shares[recipe].items() if self._rank_of(file) == rank)
        found = {part: read_share(self.tensors[file], self.shares[recipe][file], index) for part, file in mine}
        return torch.cat([found[part] for part in sorted(found)], -2) if len(found) > 1 else found[mine[0][0]]

    def _rank_of(self, file: str) -> int:
        device = int(file.rpartition("rank-")[2].partition(".")[0])
        return device % self.layout.group // self.layout.moe_tp


@dataclass
class Traffic:
    """What went between devices: rows sent from each copy of attention to each expert-parallel rank, and rows computed by each rank."""

    rows: dict[tuple[int, int], int] = field(default_factory=lambda: defaultdict(int))
    computed: dict[int, int] = field(default_factory=lambda: defaultdict(int))


@dataclass
class RankInterpreter(TiledInterpreter):
    """Interprets a program whose weights lie in the files of devices."""

    store: Store = field(kw_only=True)
    sizes: Mapping[str, int] = field(kw_only=True)
    traffic: Traffic = field(kw_only=True)
    layer: int = 0

    @property
    def dims(self) -> dict[str, int]:
        """The dims of the step."""
        return dict(self.sizes)

    def tensor(self, value: Any, box: Box | None = None) -> Any:
        """Return a tensor for a tensor, None, or a weight of which a box may be asked for."""
        if not isinstance(value, Recipe):
            return value
        found = self.store.common(value)
        return found if box is None else found[tuple(slice(*span) for span in box)]

    def experts(self, op: Op, operands: Sequence[Any], bound: Mapping[str, str]) -> torch.Tensor:
        """Dispatch rows to the ranks of their experts, compute there, and combine: the formula stands at moe.experts."""
        x, ids, gates, *_ = operands
        slots, layout = self.store.slots[self.layer], self.store.layout
        self.layer += 1
        chosen = _choose_slots(ids, slots)
        each = len(slots) // layout.ep
        owner = torch.arange(len(x)) * layout.dp // max(len(x), 1)
        y = torch.zeros_like(x)
        for rank in range(layout.ep):
            here = chosen // each == rank
            token = torch.where(here.any(1))[0]
            for source in owner[token].tolist():
                self.traffic.rows[source, rank] += 1
            self.traffic.computed[rank] += int(here.sum())
            sent = x[token], torch.where(here, chosen - rank * each, each)[token], gates[token]
            y.index_add_(0, token, self._compute_on_rank(op, operands, rank, each, *sent))
        return y

    def _compute_on_rank(
        self, op: Op, operands: Sequence[Any], rank: int, each: int, x: torch.Tensor, slot: torch.Tensor,
        gates: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Return the weighted sums of what a rank's experts give for the rows that it was sent."""
        up, down, up_bias, down_bias = operands[3:7]
        act = op.settings.activation("act")
        y = torch.zeros_like(x)
        for index in range(each):
            token, choice = torch.where(slot == index)
            if len(token):
                mine = [self.store.expert(recipe, rank, index) for recipe in (up, up_bias, down, down_bias)]
                h = apply_activation(linear(x[token], mine[0], mine[1]), act)
                y.index_add_(0, token, linear(h, mine[2], mine[3]) * gates[token, choice, None])
        return y


def _choose_slots(ids: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
    """Return the slot for each choice of each token; tokens take the copies of an expert by turns."""
    table: dict[int, list[int]] = defaultdict(list)
    for slot, expert in enumerate(slots):
        table[expert].append(slot)
    most = max(map(len, table.values()))
    rows = torch.tensor([[held[i % len(held)] for i in range(most)] for _, held in sorted(table.items())])
    count = torch.tensor([len(held) for _, held in sorted(table.items())])
    turn = torch.arange(len(ids))[:, None] % count[ids]
    return rows[ids, turn]


@dataclass(frozen=True)
class States:
    """What one step hands to the next: the states in the program's order, after `length` tokens of `batch` rows."""

    batch: int
    length: int
    held: tuple[torch.Tensor, ...]

    def __len__(self) -> int:
        return len(self.held)


@dataclass(frozen=True, eq=False)
class Session:
    """The devices of a plan in one process; `traffic` counts what went between them since it was opened."""

    folder: Path
    module: Module
    store: Store
    states: tuple[State, ...]
    context: int
    traffic: Traffic = field(default_factory=Traffic)
    slow: bool = True
    computes: str = "f32"

    @property
    def runs(self) -> str:
        """What it runs on, in words."""
        layout = self.store.layout
        return f"a simulation of {layout.group * layout.pp} devices, experts on {layout.ep} of each stage"

    @property
    def vocabulary(self) -> int:
        """The width of the logits."""
        return int(self.module.main.results[0].type.shape[-1])

    def events(self) -> tuple[OpTime, ...]:
        """Return no times: those of a simulation say nothing."""
        return ()

    def start(self, batch: int) -> States:
        """Return the states before the first token."""
        held = (torch.zeros(s.sizes(B=batch, P=0), dtype=DTYPES[s.dtype].torch) for s in self.states)
        return States(batch, 0, tuple(held))

    def step(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, position_ids: np.ndarray,
        states: States | None = None, last: int = 0,
    ) -> tuple[np.ndarray, States]:  # fmt: skip
        """Run new tokens i64[B, S] after P past ones; see the sessions of other targets."""
        given = (np.asarray(a, np.int64) for a in (input_ids, attention_mask, position_ids))
        arrays = dict(zip(INPUTS, given, strict=True))
        states = states if states is not None else self.start(len(arrays["input_ids"]))
        main = self.module.main
        padded = "position_ids" in {p.name for p in main.params}
        own = states if isinstance(states, States) else None
        check_step(arrays, own, self.states, self.context, self.vocabulary, padded)
        batch, new = arrays["input_ids"].shape
        kept = iter(states.held)
        inputs = [next(kept) if p.type.state else _input_tensor(p.name, p.type.dtype, arrays) for p in main.params]
        dims = bind_dims(main.params, inputs, {"B": batch, "S": new, "P": states.length})
        interpreter = RankInterpreter(
            self.module, _NoSource(), (batch, new), store=self.store, sizes=dims, traffic=self.traffic
        )
        logits, *after = interpreter.run(main, inputs, {})
        return (logits[:, -last:] if last else logits).float().numpy(), States(batch, states.length + new, tuple(after))


def _input_tensor(name: str, dtype: str, arrays: Mapping[str, np.ndarray]) -> torch.Tensor:
    if name not in arrays:
        raise MoecError(f"the program has an unknown input {name}")
    return torch.from_numpy(np.ascontiguousarray(arrays[name])).to(DTYPES[dtype].torch)


class _NoSource:
    """Stands for a checkpoint where there is none: all weights are in the store."""

    tensors: Mapping[str, Any] = {}

    def read(self, name: str, box: Box | None = None, expected: Any = None) -> torch.Tensor:
        """Refuse: MoecError."""
        raise MoecError(f"{name} is in no file of the devices", exit_code=1)


def load_session(
    folder: Path, threads: int | None = None, spinning: bool = True, accuracy: str | None = None,
    device: str | None = None, profiling: bool = False,
) -> Session:  # fmt: skip
    """Open the shards of all devices in `folder`; of the options only `threads` means something here."""
    folder = Path(folder)
    if device not in (None, "simulator"):
        raise MoecError(f"shards of ranks do not run on {device}", todo="leave out --device: they are simulated")
    if threads is not None:
        if threads < 1:
            raise MoecError(f"{threads} threads are asked for", todo="give 1 or more")
        torch.set_num_threads(threads)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    path = folder / PROGRAM
    module = parse_module(path.read_text(encoding="utf-8"), str(path))
    plan = read_json(folder / PLAN)
    degrees = plan["degrees"]
    layout = Layout(
        degrees["tp"], degrees["attention_dp"], degrees["ep"], degrees["pp"], plan["experts"], str(folder / PLAN)
    )
    divided = divide_weights(module, layout)
    shares: dict[Recipe, dict[str, Share]] = defaultdict(dict)
    for name, own in divided.files.items():
        for share in own:
            shares[share.held.recipe][name] = share
    tensors = {name: read_tensors(folder / name) for name in divided.files}
    slots = divided.placement.slots if divided.placement else ()
    states = tuple(State.of(entry) for entry in manifest["states"])
    limit = manifest["dims"].get("S", (1, 1 << 31))[1]
    return Session(folder, module, Store(layout, shares, tensors, slots), states, limit)
