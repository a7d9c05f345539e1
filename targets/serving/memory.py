"""Whether a model fits: bytes that one device holds, the largest batch and context, and the experts that have to lie elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..systems.system import System
from .degrees import Degrees
from .storage import FIXED_STATE, Storage
from .workload import Workload

CHUNK = 8192  # tokens of prompts that engines make room for, to read them in one step
BUFFERS = 8  # numbers of the width of a layer that a token of a step needs at a time
ACTIVATION = 2  # bytes of such a number
WORKSPACE = 1_500_000_000  # bytes of contexts, graphs and communication buffers of one device: general knowledge


@dataclass(frozen=True)
class Memory:
    """Bytes of one device; `cache` is that of all sequences, `sequence` of one at its full length, `typical` of one of the others.

    Requests that are served at once are of all ages: one is taken to be at its end, the others half through their answers.
    """

    weights: int
    cache: int
    sequence: int
    typical: int
    activations: int
    workspace: int
    capacity: int

    @property
    def needed(self) -> int:
        """Bytes of everything."""
        return self.weights + self.cache + self.activations + self.workspace

    @property
    def free(self) -> int:
        """Bytes that are left, less than 0 where it does not fit."""
        return self.capacity - self.needed

    @property
    def largest_batch(self) -> int:
        """Sequences of an attention rank that the cache has room for."""
        room = self.free + self.cache - self.sequence
        if room < 0:
            return 0
        return 1 + room // self.typical if self.typical else 10**6

    def entry(self) -> dict[str, int]:
        """Return the bytes as plain data."""
        return {"weights": self.weights, "cache": self.cache, "activations": self.activations,
                "workspace": self.workspace, "needed": self.needed, "capacity": self.capacity}  # fmt: skip


def device_memory(
    workload: Workload, system: System, degrees: Degrees, storage: Storage, batch: int, context: int, answer: int = 0
) -> Memory:
    """Return what one device holds for `batch` sequences of an attention rank with up to `context` tokens, `answer` of them generated."""
    weights = resident_weights(workload, degrees, storage)
    sequence = sequence_bytes(workload, degrees, storage, context)
    typical = sequence_bytes(workload, degrees, storage, context - answer // 2)
    exchanged = 3 if degrees.dp > 1 else 0
    activations = CHUNK * workload.hidden * (BUFFERS * ACTIVATION + exchanged)
    return Memory(
        weights, sequence + (batch - 1) * typical, sequence, typical, activations, WORKSPACE, int(system.device.memory.value)
    )  # fmt: skip


def with_copies(memory: Memory, workload: Workload, degrees: Degrees, storage: Storage, copies: int) -> Memory:
    """Return the memory with copies of experts, evenly over the devices."""
    if not copies:
        return memory
    bits = storage.roles["experts"].bits
    size = sum(layer.calls * e.elements for layer in workload.layers for e in layer.experts) * bits / 8
    return replace(memory, weights=memory.weights + int(copies * size / degrees.devices))


def resident_weights(workload: Workload, degrees: Degrees, storage: Storage) -> int:
    """Return the bytes of weights of one device, the fullest one: experts over the whole group, the rest over `tp`."""
    layers, ends = 0.0, 0.0
    for layer in workload.layers:
        dense = sum(w.elements * storage.roles[w.role].bits / 8 for w in layer.weights) / degrees.tp
        experts = sum(e.count * e.elements for e in layer.experts) * storage.roles["experts"].bits / 8 / degrees.group
        if layer.states or layer.experts:
            layers += layer.calls * (dense + experts)
        else:
            ends += layer.calls * (dense + experts)
    return int(layers / degrees.pp + ends)


def sequence_bytes(workload: Workload, degrees: Degrees, storage: Storage, context: int) -> int:
    """Return the bytes of cache and states that one sequence takes on a device."""
    total = sum(
        layer.calls * state.kept(context) * (storage.cache_bytes if state.grows else FIXED_STATE)
        / min(degrees.tp, state.heads)
        for layer in workload.layers for state in layer.states
    )  # fmt: skip
    return int(total / degrees.pp)


def largest_context(
    workload: Workload, system: System, degrees: Degrees, storage: Storage, batch: int, moved: int = 0
) -> int:
    """Return the tokens of each of `batch` sequences that fit, at most what the model takes; 0 where none do.

    `moved` are bytes of experts that may lie elsewhere.
    """
    low, high = 0, max(workload.context, 1)

    def fits(context: int) -> bool:
        return device_memory(workload, system, degrees, storage, batch, context).free + moved >= 0

    if fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
