"""States of a running model: KV caches in buffers with room for more tokens, and what else lives from step to step.

A cache that is only appended to stays where it is: the runtime gets one buffer as its past and as its present, and
writes the new tokens after the past ones. Buffers grow by half when they are full. Whoever goes on from older states
than the newest ones gets a copy, so that states never change under the hands of others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ....compiler.artifact.manifest import State
from ....compiler.ir.dtypes import DTYPES

# ONNX's numbers of the dtypes that a state may have
ELEMENTS = {
    "f32": 1, "u8": 2, "i8": 3, "i32": 6, "i64": 7, "f16": 10, "f64": 11, "bf16": 16, "f8e4m3": 17,
}  # fmt: skip
STEP = 64  # buffers have room for a multiple of this many tokens


@dataclass
class Buffers:
    """The caches of one sequence of steps; `filled` tokens of the room are taken by the newest of its states."""

    arrays: tuple[np.ndarray, ...]
    room: int
    filled: int
    binding: Any = None  # an IOBinding that has the arrays as inputs and outputs

    def with_room(self, states: Sequence[State], past: int, room: int) -> Buffers:
        """Return buffers with the first `past` tokens of these and more room."""
        made = []
        for state, array in zip(states, self.arrays, strict=True):
            shape = list(array.shape)
            shape[state.axis or 0] = room
            new: np.ndarray = np.empty(shape, array.dtype)
            kept = (*(slice(None),) * (state.axis or 0), slice(past))
            new[kept] = array[kept]
            made.append(new)
        return Buffers(tuple(made), room, past)


@dataclass(frozen=True)
class States:
    """The states that one step hands to the next: caches of `length` tokens in buffers, other states as the runtime's values."""

    batch: int
    length: int
    others: tuple[Any, ...]
    buffers: Buffers = field(compare=False)
    total: int = 0  # states in all

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[Any]:
        return iter((*self.buffers.arrays, *self.others))

    def with_room(self, states: Sequence[State], new: int) -> States:
        """Return these states in buffers that `new` more tokens may be written to."""
        wanted = self.length + new
        if self.buffers.filled == self.length and wanted <= self.buffers.room:
            return self
        room = self.buffers.room if wanted <= self.buffers.room else max(wanted, self.buffers.room * 3 // 2)
        return replace(self, buffers=self.buffers.with_room(states, self.length, -(-room // STEP) * STEP))


def initial_states(states: Sequence[State], batch: int) -> States:
    """Return the states before the first token: caches without room, and zeros where a state does not grow."""
    import onnxruntime

    arrays, others = [], []
    for state in states:
        # integers of the same width: ONNX Runtime does not take every float from numpy
        zeros: np.ndarray = np.zeros(state.sizes(B=batch, P=0), f"u{DTYPES[state.dtype].bits // 8}")
        if state.in_place:
            arrays.append(zeros)
        else:
            others.append(onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(zeros, ELEMENTS[state.dtype]))
    return States(batch, 0, tuple(others), Buffers(tuple(arrays), 0, 0), len(states))
