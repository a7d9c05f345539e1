"""States with room for more tokens: a kernel appends to a buffer in place instead of copying what is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from ....compiler.errors import MoecError

STEP = 64  # buffers have room for a multiple of so many tokens


@dataclass
class _Filled:
    """How many slots of a buffer are taken, by the newest state in it."""

    slots: int
    parts: dict[str, torch.Tensor] = field(default_factory=dict)  # what lies beside the buffer, slot by slot: scales


@dataclass(frozen=True, eq=False)
class Slots:
    """The first `length` slots along an axis of a buffer, which has room for more.

    Who appends to an older state than the newest one in the buffer gets a copy: a state never changes under the hands
    of others.
    """

    buffer: torch.Tensor
    axis: int
    length: int
    _filled: _Filled = field(repr=False)

    @property
    def taken(self) -> torch.Tensor:
        """The slots that are taken, as they lie."""
        return self.buffer.narrow(self.axis, 0, self.length)

    @property
    def tensor(self) -> torch.Tensor:
        """The numbers in the slots that are taken."""
        taken = self.taken
        scales = self._filled.parts.get("scales")
        return taken if scales is None else taken.float() * scales.narrow(self.axis, 0, self.length)

    def part(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return what lies in the buffer, or by the name of a part beside it: one number for each row."""
        if name in ("", "codes"):
            return self.buffer
        if name not in self._filled.parts:
            self._filled.parts[name] = torch.zeros((*self.buffer.shape[:-1], 1), dtype=dtype, device=self.buffer.device)
        return self._filled.parts[name]

    def has_room(self, more: int) -> bool:
        """Return whether so many slots can be appended where it lies: it is the newest state in its buffer."""
        return self._filled.slots == self.length and self.length + more <= self.buffer.shape[self.axis]


# a value of a program: numbers, a state with room, or the codes and scales of numbers in a quantized format
Held: TypeAlias = "torch.Tensor | Slots | Mapping[str, torch.Tensor]"


def tensor_of(value: Held) -> torch.Tensor:
    """Return the numbers of a value, whether it has room or not; MoecError for codes, which only kernels read."""
    if isinstance(value, Mapping):
        raise MoecError("a value that lies as codes and scales is read by what is no kernel", exit_code=1)
    return value.tensor if isinstance(value, Slots) else value


def with_room(past: Held, axis: int, length: int, dtype: torch.dtype) -> Slots:
    """Return a buffer that begins with the slots of `past` and has `length` in all, those behind not yet written."""
    same = isinstance(past, Slots) and past.axis == axis and past.buffer.dtype == dtype
    if isinstance(past, Slots) and same and past.has_room(length - past.length):
        past._filled.slots = length
        return Slots(past.buffer, axis, length, past._filled)
    old, beside = tensor_of(past), dict[str, torch.Tensor]()
    if isinstance(past, Slots) and same:
        old, beside = past.taken, past._filled.parts
    shape = list(old.shape)
    # a buffer that is outgrown grows by half, so that a long generation copies each token a few times at most
    wanted = max(length, shape[axis] * 3 // 2 if shape[axis] else 0)
    shape[axis] = -(-max(wanted, 1) // STEP) * STEP
    buffer = torch.zeros(shape, dtype=dtype, device=old.device)
    buffer.narrow(axis, 0, old.shape[axis]).copy_(old)
    parts = {name: torch.zeros((*shape[:-1], 1), dtype=part.dtype, device=part.device) for name, part in beside.items()}
    for name, part in parts.items():
        part.narrow(axis, 0, old.shape[axis]).copy_(beside[name].narrow(axis, 0, old.shape[axis]))
    return Slots(buffer, axis, length, _Filled(length, parts))
