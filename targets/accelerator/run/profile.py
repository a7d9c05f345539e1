"""Times kernels one by one as they are launched: on a GPU by its own clock, elsewhere by the host's."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ....compiler.ir.module import Function, Module, Op
from ...session import OpTime
from .artifact import Launch, StoredKernels
from .launchers import Launcher, Tensors


@dataclass(eq=False)
class TimedLauncher:
    """Launches kernels on another launcher and records how long each takes. `module` says where ops come from.

    It waits for each kernel before the next one: what runs between two kernels is not in their times.
    """

    launcher: Launcher
    module: Module
    kernels: StoredKernels
    captures: bool = False
    _events: list[OpTime] = field(default_factory=list)
    _modules: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for function in self.module.functions:
            for op, step in zip(function.ops, self.kernels.steps[function.name], strict=True):
                if "kernels" in step:
                    self._modules[step["kernels"]] = _source_modules(function, op)

    @property
    def device(self) -> torch.device:
        """Where tensors lie."""
        return self.launcher.device

    @property
    def runs(self) -> str:
        """What runs, in words."""
        return self.launcher.runs

    @property
    def slow(self) -> bool:
        """Whether it is no chip."""
        return self.launcher.slow

    def __call__(self, launch: Launch, tensors: Tensors, scalars: Mapping[str, int]) -> None:
        """Run a kernel and record its time."""
        start = time.monotonic_ns()
        if self.device.type == "cpu":
            self.launcher(launch, tensors, scalars)
            seconds = (time.monotonic_ns() - start) / 1e9
        else:
            seconds = self._seconds_on_gpu(launch, tensors, scalars)
        self._events.append(OpTime(launch.name, self._modules.get(launch.group, ()), start, seconds, launch.predicted))

    def events(self) -> tuple[OpTime, ...]:
        """Return the kernels that ran, in their order."""
        return tuple(self._events)

    def _seconds_on_gpu(self, *given: Any) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.launcher(*given)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def _source_modules(function: Function, op: Op) -> tuple[str, ...]:
    """Return the modules of the source that an op is of; of one that a rewrite made, those of its first operand."""
    seen: Op | None = op
    while seen is not None and not seen.loc:
        seen = function.producers.get(seen.inputs[0].name) if seen.inputs else None
    return seen.loc if seen is not None else ()
