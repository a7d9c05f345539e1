"""Runs a program on a calibration text and keeps what its weights are multiplied with, layer by layer.

The program is one of stage moe; weights that it wants quantized are taken as they were before. The inputs go to files
without names, as bf16. An expert that saw fewer than STARVED tokens is rounded to nearest (starved=rtn), or works on
FORCED tokens of the whole text besides its own (starved=force).
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..check.tiled import TiledInterpreter
from ..errors import MoecError
from ..ir.dims import evaluate
from ..ir.module import Function, Module, Op
from ..ir.quantize_step import method_of, option_of, weight_of
from ..ir.recipes import Recipe
from ..runtime.tokenizer import load_tokenizer
from ..weights.calibrated import Inputs
from ..weights.sources.source import WeightSource
from .options import CALIBRATED

TOKENS, WINDOW = 8192, 512
STARVED = 32  # tokens; an expert that saw fewer says too little about its inputs
FORCED = 1024  # tokens that such an expert is given besides its own, where it is forced


@dataclass(frozen=True)
class Coverage:
    """How many tokens of the calibration text each expert of a layer was given."""

    place: str
    tokens: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the counts with their least, mean, and the share of experts that saw too few."""
        few = sum(n < STARVED for n in self.tokens)
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
        few = sum(n < STARVED for n in counts)
        return {
            "tokens": self.tokens, "starved_below": STARVED, "experts": len(counts), "starved": few, **total,
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
        tokens = load_tokenizer(folder).encode(text) if text else []
        return CalibrationText(tuple(tokens), str(file), hashlib.sha256(raw).hexdigest())


def windows_of(text: CalibrationText, module: Module) -> torch.Tensor:
    """Return the windows i64[N, W] that a text is read in, at most TOKENS; MoecError if it does not fill one."""
    tokens = text.tokens
    context = next((d.high for d in module.dims if d.name == "S"), WINDOW)
    window = min(WINDOW, context)
    count = min(len(tokens), TOKENS) // window
    if count == 0:
        raise MoecError(
            f"the calibration text has {len(tokens)} tokens, one batch has {window}", where=text.where,
            todo=f"give a text of at least {window} tokens; {TOKENS} are used of a longer one",
        )  # fmt: skip
    return torch.tensor(tokens[: count * window], dtype=torch.int64).reshape(count, window)


def calibrate(
    module: Module,
    source: WeightSource,
    windows: torch.Tensor,
    folder: Path | None = None,
) -> Calibration:
    """Run a module of stage moe on windows i64[N, W]; the inputs are kept in unnamed files in `folder`."""
    recorder = _Recorder(module, source, tuple(windows.shape), folder=folder)
    values = dict(zip((p.name for p in module.main.params), main_inputs(module, windows), strict=True))
    with torch.no_grad():
        recorder.steps(module.main, values, {})
    return Calibration(windows.numel(), recorder.inputs, tuple(recorder.coverage))


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
class _Recorder(TiledInterpreter):
    """An interpreter that keeps the inputs of weights whose method wants them."""

    folder: Path | None = None
    inputs: dict[str, Inputs] = field(default_factory=dict)
    coverage: list[Coverage] = field(default_factory=list)
    _last: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)  # rows that were kept, by address

    def before(self, function: Function, i: int, values: Mapping[str, Any], operands: Sequence[Any]) -> bool:
        """Leave out what no calibrated weight depends on: the logits of a long text are large."""
        if function is not self.module.main:
            return True
        needed = self._needed
        op = function.ops[i]
        if i not in needed and op.name == "core.linear" and torch.is_tensor(operands[0]):
            self.seen(operands[1], operands[0].reshape(-1, operands[0].shape[-1]))
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

    def seen(self, weight: Recipe, rows: torch.Tensor, chosen: tuple[torch.Tensor, ...] | None = None) -> None:
        """Keep the inputs of a weight whose method wants them."""
        if method_of(weight) in CALIBRATED:
            enough = None if chosen is None else tuple(c if len(c) >= STARVED else None for c in chosen)
            self.inputs[weight_of(weight)] = Inputs(self._keep(rows), enough)

    def forced(self, weight: Recipe, token: torch.Tensor, rows: int) -> torch.Tensor:
        """Return the rows of an expert; a starved one is given some of all rows where the weight says so."""
        if len(token) >= STARVED or option_of(weight, "starved") != "force":
            return token
        return torch.cat([token, torch.arange(0, rows, max(1, rows // FORCED))]).unique()

    def routed(self, op: Op, bound: Mapping[str, str], counts: Sequence[int]) -> None:
        """Count the tokens of each expert."""
        place = ".".join([*(f"{name}.{value}" for name, value in bound.items()), *op.loc[:1]])
        self.coverage.append(Coverage(place, tuple(counts)))

    def _keep(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows as bf16 in a file; the same rows, of several weights, are kept once."""
        address = rows.data_ptr()
        if address not in self._last:
            with tempfile.TemporaryFile(dir=self.folder) as file:  # lives on as long as it is mapped
                mapped = np.memmap(file, np.int16, "w+", shape=tuple(rows.shape))
            kept = torch.from_numpy(mapped).view(torch.bfloat16)
            kept.copy_(rows)
            while len(self._last) > 1:
                self._last.pop(next(iter(self._last)))
            self._last[address] = rows, kept  # the rows too, so that no others get their address
        return self._last[address][1]
