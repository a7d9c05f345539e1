"""Runs a program on a calibration text and keeps what its weights are multiplied with, layer by layer.

The program is one of stage moe; weights that it wants quantized are taken as they were before. The inputs go to files
without names, as bf16. An expert that saw fewer than UNDERSAMPLED tokens is rounded to nearest (starved=rtn), or works on
FORCED tokens of the whole text besides its own (starved=force).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import add
from pathlib import Path
from typing import Any

import torch

from ..check.live import live_bytes
from ..check.tiled import SCORES, TILE, TiledInterpreter
from ..errors import MoecError
from ..errors.progress import Phase, begin_phase
from ..ir.dims import evaluate
from ..ir.module import Function, Module, Op
from ..ir.recipes import Recipe
from ..runtime.tokenizer import load_tokenizer
from ..weights.calibrated import Inputs
from ..weights.row_file import RowFile
from ..weights.sources.source import WeightSource
from ..weights.steps.quantized import method_of, option_of, weight_of
from .options import CALIBRATED

TOKENS, WINDOW = 8192, 512
ENOUGH = 64 * TOKENS  # characters of a text that hold the tokens: all of a long one would take gigabytes
LIMIT = 10**9  # bytes that a run may take, by default
SHORTEST = 64  # tokens of a window that is cut shorter for want of memory
UNDERSAMPLED = 32  # tokens; an expert that saw fewer says too little about its inputs
FORCED = 1024  # tokens that such an expert is given besides its own, where it is forced


@dataclass(frozen=True)
class Coverage:
    """How many tokens of the calibration text each expert of a layer was given."""

    place: str
    tokens: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the counts with their least, mean, and the share of experts that saw too few."""
        few = sum(n < UNDERSAMPLED for n in self.tokens)
        mean = sum(self.tokens) / len(self.tokens)
        return {
            "layer": self.place, "least": min(self.tokens), "mean": mean, "most": max(self.tokens),
            "starved": few / len(self.tokens), "tokens": list(self.tokens),
        }  # fmt: skip


@dataclass(frozen=True)
class Calibration:
    """The inputs of every weight whose method wants them, and the coverage of every layer with experts."""

    tokens: int
    inputs: Mapping[str, Inputs]
    coverage: tuple[Coverage, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures for the manifest."""
        counts = [n for layer in self.coverage for n in layer.tokens]
        total = {"least": min(counts), "mean": sum(counts) / len(counts)} if counts else {}
        few = sum(n < UNDERSAMPLED for n in counts)
        return {
            "tokens": self.tokens, "starved_below": UNDERSAMPLED, "experts": len(counts), "starved": few, **total,
            "layers": [layer.to_dict() for layer in self.coverage],
        }  # fmt: skip


@dataclass(frozen=True)
class CalibrationText:
    """A text as tokens, and where it comes from."""

    tokens: tuple[int, ...]
    where: str
    sha256: str

    @staticmethod
    def read(file: Path, folder: Path | None) -> CalibrationText:
        """Read a file with the tokenizer of a checkpoint folder; MoecError if there is none, or no such file."""
        if folder is None:
            raise MoecError("a calibration text needs the tokenizer of a checkpoint folder", where=str(file))
        try:
            raw = file.read_bytes()
            text = raw.decode("utf-8")
        except OSError as error:
            raise MoecError(f"cannot read the calibration text: {error.strerror}", where=str(file)) from error
        except UnicodeDecodeError as error:
            raise MoecError(f"the calibration text is not UTF-8: {error}", where=str(file)) from error
        tokenizer = load_tokenizer(folder)
        tokens = tokenizer.encode(text[:ENOUGH]) if text else []
        if len(tokens) < TOKENS and len(text) > ENOUGH:
            tokens = tokenizer.encode(text)
        return CalibrationText(tuple(tokens), str(file), hashlib.sha256(raw).hexdigest())


def windows_of(text: CalibrationText, module: Module) -> torch.Tensor:
    """Return the windows i64[N, W] that a text is read in, at most TOKENS; MoecError if it does not fill one."""
    tokens = text.tokens
    window = _window_of(module)
    count = min(len(tokens), TOKENS) // window
    if count == 0:
        raise MoecError(
            f"the calibration text has {len(tokens)} tokens, one batch has {window}", where=text.where,
            todo=f"give a text of at least {window} tokens; {TOKENS} are used of a longer one",
        )  # fmt: skip
    return torch.tensor(tokens[: count * window], dtype=torch.int64).reshape(count, window)


def _window_of(module: Module) -> int:
    return min(WINDOW, next((d.high for d in module.dims if d.name == "S"), WINDOW))


def random_windows(module: Module) -> torch.Tensor:
    """Return windows i64[N, W] of TOKENS tokens drawn at random, the same ones at every call: what there is without a text."""
    window = _window_of(module)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary_of(module), (max(1, TOKENS // window), window), generator=generator)


def vocabulary_of(module: Module) -> int:
    """Return how many tokens a module predicts."""
    return int(next(v for v in module.main.results if not v.type.state).type.shape[-1])


def windows_in_memory(
    module: Module, windows: torch.Tensor, limit: int, taken: Callable[[int], int] | None = None
) -> tuple[torch.Tensor, int]:
    """Return windows i64[N, W], cut shorter where one alone takes too much memory, and how many are run at once.

    `taken` gives the bytes that a window of some length takes; by default those of the program's values.
    """
    while True:
        count, window = windows.shape
        each = taken(window) if taken else live_bytes(module, {"B": 1, "S": window, "P": 0})
        if each <= limit or window % 2 or window <= SHORTEST:
            return windows, max(1, min(count, limit // each))
        windows = windows.reshape(2 * count, window // 2)


def collect_inputs(
    module: Module,
    source: WeightSource,
    windows: torch.Tensor,
    folder: Path | None = None,
    limit: int = LIMIT,
) -> Calibration:
    """Run a module of stage moe on windows i64[N, W]; the inputs are kept in unnamed files in `folder`.

    As many windows are run at once as `limit` bytes have room for; every batch reads the weights again.
    """
    windows, size = windows_in_memory(module, windows, limit // 4)
    batches = windows.split(size)
    store = _Store(folder)

    def run(store: _Store, phase: Phase) -> None:
        for batch in batches:
            store.begin()
            tile, scores = min(TILE, limit // 16), min(SCORES, limit // 8)
            recorder = _Recorder(
                module, source, tuple(batch.shape), store=store, tile=tile, scores=scores, layer_done=phase.step
            )
            values = dict(zip((p.name for p in module.main.params), main_inputs(module, batch), strict=True))
            with torch.no_grad():
                recorder.steps(module.main, values, {})

    layers = len(batches) * sum(op.callee is not None for op in module.main.ops)
    if len(batches) > 1 and any(option_of(c.recipe, "starved") == "force" for f in module.functions for c in f.consts):
        # which experts are undersampled is known only when all tokens have been seen
        counted = _Store(folder, counts_only=True)
        with begin_phase("counting tokens of experts", layers, "layer") as phase:
            run(counted, phase)
        store = _Store(folder, totals=counted.counts, rows=windows.numel())
    with begin_phase("calibrating", layers, "layer") as phase:
        run(store, phase)
    return Calibration(windows.numel(), store.inputs(), tuple(store.coverage))


def main_inputs(module: Module, windows: torch.Tensor) -> list[torch.Tensor]:
    """Return the inputs of @main for windows i64[N, W] without a past; MoecError for an input of unknown meaning."""
    count, window = windows.shape
    known = {
        "input_ids": windows,
        "attention_mask": torch.ones_like(windows),
        "position_ids": torch.arange(window).expand(count, window),
    }
    found = []
    for value in module.main.params:
        if value.type.state:
            sizes = [evaluate(s, {"B": count, "S": window, "P": 0}) for s in value.type.shape]
            found.append(torch.zeros(sizes))
        elif value.name in known:
            found.append(known[value.name])
        else:
            raise MoecError(f"calibration does not know what to give for the input {value}", where="@main")
    return found


@dataclass
class _Kept:
    """The inputs of one weight so far: a file, which weights may share, and the positions of each expert's rows."""

    file: RowFile
    chosen: list[list[torch.Tensor]] | None


@dataclass
class _Store:
    """What recorders of one batch after the other keep. With `counts_only` it is the tokens of experts alone."""

    folder: Path | None
    counts_only: bool = False
    totals: Mapping[str, Sequence[int]] = field(default_factory=dict)  # tokens of each expert, where they are known
    rows: int = 0  # of the whole text, where they are known
    coverage: list[Coverage] = field(default_factory=list)  # of each op with experts, in the order in which they run
    counts: dict[str, list[int]] = field(default_factory=dict)  # by weight
    _op: int = 0  # the number of the next op with experts in this batch
    _kept: dict[str, _Kept] = field(default_factory=dict)
    _last: dict[int, tuple[torch.Tensor, RowFile, int]] = field(default_factory=dict)  # written last, by address

    def begin(self) -> None:
        """Begin a batch."""
        self._op = 0
        self._last.clear()

    def count(self, place: str, counts: Sequence[int]) -> None:
        """Add the tokens of each expert of the op that is next."""
        if self._op == len(self.coverage):
            self.coverage.append(Coverage(place, tuple(counts)))
        else:
            known = self.coverage[self._op]
            self.coverage[self._op] = replace(known, tokens=tuple(map(add, known.tokens, counts)))
        self._op += 1

    def keep(self, name: str, rows: torch.Tensor, chosen: tuple[torch.Tensor, ...] | None) -> None:
        """Keep rows f32[T, K] of a weight; the same rows, of several weights, are kept once."""
        if self.counts_only:
            return
        address, old = rows.data_ptr(), self._kept.get(name)
        if address not in self._last:
            file = old.file if old else RowFile(self.folder, rows.shape[1])
            start = len(file)
            file.append(rows)
            while len(self._last) > 1:
                self._last.pop(next(iter(self._last)))
            self._last[address] = rows, file, start  # the rows too, so that no others get their address
        _, file, start = self._last[address]
        kept = self._kept.setdefault(name, _Kept(file, None if chosen is None else [[] for _ in chosen]))
        for places, own in zip(kept.chosen or (), chosen or (), strict=True):
            places.append(own + start)

    def inputs(self) -> dict[str, Inputs]:
        """Return what was kept of every weight; None for experts that saw too few tokens."""

        def enough(places: list[torch.Tensor]) -> torch.Tensor | None:
            found = torch.cat(places)
            return found if len(found) >= UNDERSAMPLED else None

        return {
            name: Inputs(kept.file, None if kept.chosen is None else tuple(map(enough, kept.chosen)))
            for name, kept in self._kept.items()
        }


@dataclass
class _Recorder(TiledInterpreter):
    """An interpreter that keeps the inputs of weights whose method wants them."""

    store: _Store = field(default_factory=lambda: _Store(None))

    def before_op(self, function: Function, i: int, values: Mapping[str, Any], operands: Sequence[Any]) -> bool:
        """Leave out what no calibrated weight depends on: the logits of a long text are large."""
        if function is not self.module.main:
            return True
        needed = self._needed
        op = function.ops[i]
        if i not in needed and op.name == "core.linear" and torch.is_tensor(operands[0]):
            self.observe_inputs(operands[1], operands[0].reshape(-1, operands[0].shape[-1]))
        return i in needed

    @cached_property
    def _needed(self) -> set[int]:
        """The ops of @main that lead to an op with weights."""
        main = self.module.main
        weights = {c.value.name for c in main.consts}
        wanted: set[str] = set()
        needed = set()
        for i, op in reversed(list(enumerate(main.ops))):
            reads = [v.name for v in op.inputs]
            if wanted.intersection(v.name for v in op.results):
                needed.add(i)
                wanted |= set(reads)
            elif op.callee or any(name in weights for name in reads):
                wanted |= set(reads)
                if op.name != "core.linear":
                    needed.add(i)
        return needed

    def observe_inputs(
        self, weight: Recipe, rows: torch.Tensor, chosen: tuple[torch.Tensor, ...] | None = None
    ) -> None:
        """Keep the inputs of a weight whose method wants them."""
        if method_of(weight) in CALIBRATED:
            self.store.keep(weight_of(weight), rows, chosen)

    def rows_for_expert(self, weight: Recipe, expert: int, token: torch.Tensor, rows: int) -> torch.Tensor:
        """Return the rows of an expert; an undersampled one is given some of all rows where the weight says so."""
        name = weight_of(weight)
        if option_of(weight, "starved") != "force":
            return token
        if self.store.counts_only:
            counts = self.store.counts.setdefault(name, [0] * weight.type.sizes[0])
            counts[expert] += len(token)
            return token
        if (self.store.totals[name][expert] if name in self.store.totals else len(token)) >= UNDERSAMPLED:
            return token
        return torch.cat([token, torch.arange(0, rows, max(1, max(rows, self.store.rows) // FORCED))]).unique()

    def observe_routing(self, op: Op, bound: Mapping[str, str], counts: Sequence[int]) -> None:
        """Count the tokens of each expert."""
        place = ".".join([*(f"{name}.{value}" for name, value in bound.items()), *op.loc[:1]])
        self.store.count(place, counts)
