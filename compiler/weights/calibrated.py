"""A source of weights together with their inputs, recorded on a calibration text."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

from ..errors import MoecError
from ..ir.deferred import torch
from ..ir.recipes import WEIGHT, Step, tensors_of
from ..ir.types import TensorType
from .row_file import RowFile
from .sources.safetensors_header import TensorInfo
from .sources.source import Box, WeightSource, slice_box
from .unchanged import Opened

PIECE = 8 << 20  # bytes of f32 rows that are worked on at once
_PARTS = 4  # matrices of the size of a factor that making one takes
_KEPT = 4  # factors that are kept: the tiles of a weight come one after the other, to a few threads


@dataclass(frozen=True)
class Inputs:
    """The inputs of a weight: `rows` bf16[T, K], and for experts those that each of them is given.

    `chosen` holds for each expert the positions of its rows, in order; None for an expert that saw too few. It is None
    itself for a weight that all rows go through. Rows may lie on disk: they are read a piece at a time.
    """

    rows: torch.Tensor | RowFile
    chosen: tuple[torch.Tensor | None, ...] | None = None

    def pieces(self, expert: int | None) -> Iterator[torch.Tensor] | None:
        """Return the rows of an expert, or of the whole weight for None, a few f32[N, K] at a time; None if they are too few."""
        places = self._row_places(expert)
        return None if places is None else self._row_chunks(places)

    def sample(self, expert: int | None, most: int) -> torch.Tensor | None:
        """Return about `most` of the rows f32[N, K], equally far apart."""
        places = self._row_places(expert)
        if places is None:
            return None
        some = places[:: max(1, len(places) // most)].contiguous()
        return torch.cat([self.rows[0:0].float(), *self._row_chunks(some)])

    def _row_places(self, expert: int | None) -> torch.Tensor | None:
        """Return which rows are an expert's."""
        return torch.arange(len(self.rows)) if self.chosen is None or expert is None else self.chosen[expert]

    def _row_chunks(self, places: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the rows f32[N, K] at some places, which are in order, as many at a time as PIECE bytes hold."""
        step = max(1, PIECE // (4 * max(1, self.rows[0:0].shape[1])))
        for low in range(0, len(self.rows), step):
            first, end = torch.searchsorted(places, torch.tensor([low, low + step])).tolist()
            if first < end:
                yield self.rows[low : low + step][places[first:end] - low].float()


@dataclass(frozen=True, eq=False)
class Calibrated:
    """A source with the inputs of quantized weights, by their names, and with tensors fitted to them. Thread-safe."""

    source: WeightSource
    inputs: Mapping[str, Inputs]
    fitted: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)
    room: int = 1 << 40  # bytes for gptq's factors: those that are kept, and those that are being made
    _factors: OrderedDict[tuple[str, int | None], torch.Tensor | None] = field(default_factory=OrderedDict, repr=False)
    _locks: dict[tuple[str, int | None], threading.Lock] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _making: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors that are there."""
        return self.source.tensors

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the weights that an artifact records."""
        return getattr(self.source, "fingerprint", "")

    @property
    def opened(self) -> Opened | None:
        """The files of the source as they were opened; None for weights in memory."""
        return getattr(self.source, "opened", None)

    def read(self, name: str, box: Box | None = None, expected: TensorType | None = None) -> torch.Tensor:
        """Return the part of a tensor in `box`; fitted tensors are available."""
        if name in self.fitted:
            return slice_box(self.fitted[name], box)
        return self.source.read(name, box, expected)

    def factor(self, quantized: Step, expert: int | None) -> torch.Tensor | None:
        """Return gptq's factor for a weight (of one expert); None for an expert that saw too few tokens, or only zeros."""
        key = (str(quantized.attributes.get(WEIGHT)), expert)
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:  # the threads that work on tiles of the same weight wait for the first of them
            with self._lock:
                if key in self._factors:
                    return self._factors[key]
            found = inputs_of(quantized, self.inputs)
            size = 4 * quantized.type.sizes[-1] ** 2
            alone = self._making if 2 * _PARTS * size > self.room else nullcontext()
            with alone:
                pieces = found.pieces(expert)
                factor = None if pieces is None else factor_from(pieces, quantized.type.sizes[-1])
            with self._lock:
                self._factors[key] = factor
                while len(self._factors) > max(1, min(_KEPT, self.room // size - _PARTS)):
                    self._factors.popitem(last=False)
            return factor


def sum_of_grams(pieces: Iterable[torch.Tensor], width: int) -> torch.Tensor:
    """Return XᵀX f32[K, K] of rows that come in pieces [N, K]."""
    found = torch.zeros(width, width)
    for piece in pieces:
        rows = piece.float()
        found.addmm_(rows.T, rows)
    return found


def factor_from(pieces: Iterable[torch.Tensor], width: int) -> torch.Tensor | None:
    """Return gptq's factor of the weight whose inputs come in pieces [N, K]; None for inputs that are only zeros."""
    from ..formats.gptq import factor_of

    return factor_of(sum_of_grams(pieces, width))


def inputs_of(quantized: Step, inputs: Mapping[str, Inputs]) -> Inputs:
    """Return what a weight is multiplied with; MoecError if the calibration did not see it."""
    name = quantized.attributes.get(WEIGHT)
    if name not in inputs:
        raise MoecError(
            f"the calibration saw nothing that the weight {name or 'without a name'} is multiplied with",
            model=", ".join(t.name for t in itertools.islice(tensors_of(quantized), 3)),
            todo=f"method={quantized.attributes['method']} needs it: run the pass quantize again, or with method=rtn",
        )
    return inputs[str(name)]
