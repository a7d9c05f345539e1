"""What a kernel is launched on: the simulator in numpy, Triton's interpreter, or a GPU by compiled objects or Triton."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from ....compiler.errors import MoecError
from ....compiler.ir.dtypes import DTYPES
from ..chip.families import find_family
from ..tile.expr import evaluate
from ..tile.simulate import simulate
from ..tile.tiles import Argument
from ..triton.compile import ALIGN
from .artifact import Kernels, Launch, inside
from .cubin import Cubin, architecture, is_for

DEVICES = ("auto", "simulator", "interpreter", "cuda", "triton")
Tensors = Mapping[str, torch.Tensor]


class Launcher(Protocol):
    """Launches kernels. `runs` says in words what they run on, `device` where the tensors lie, `slow` that it is no chip."""

    @property
    def device(self) -> torch.device: ...

    @property
    def runs(self) -> str: ...

    @property
    def slow(self) -> bool: ...

    def __call__(self, launch: Launch, tensors: Tensors, scalars: Mapping[str, int]) -> None:
        """Run a kernel on tensors of exactly its arguments' shapes and dtypes; outputs are changed in place."""


class Simulated:
    """Executes tile programs in numpy, with the checks of simulate.py: it needs no chip and no compiler."""

    device = torch.device("cpu")
    slow = True

    def __init__(self, kernels: Kernels) -> None:
        """Simulate the chip that the kernels are for."""
        self._kernels = kernels
        self.runs = f"the simulator of {kernels.target}"

    def __call__(self, launch: Launch, tensors: Tensors, scalars: Mapping[str, int]) -> None:
        """Run a kernel."""
        arrays = {a.name: _array(tensors[a.name], a) for a in launch.program.arguments}
        simulate(launch.program, arrays, scalars, self._kernels.chip_for(launch))


def _array(tensor: torch.Tensor, a: Argument) -> np.ndarray:
    """Return the same memory as an array; bytes are viewed, since numpy has not all dtypes by itself."""
    kind = DTYPES[a.dtype].numpy
    if not tensor.numel():
        return np.zeros(tuple(tensor.shape), kind)
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().view(kind).reshape(tuple(tensor.shape))


class Printed:
    """Launches the printed Triton source of each program: on a GPU, or where Triton interprets, on the CPU."""

    def __init__(self, kernels: Kernels, interpreted: bool) -> None:
        """Prepare Triton; MoecError where it cannot be used so."""
        if interpreted:
            start_interpreter()
        from .launch import check_gpu

        if not interpreted:
            check_gpu()
        self._arch = kernels.chip.get("arch") or ""
        self._made: dict[str, _PrintedKernel] = {}
        self._interpreted = self.slow = interpreted

    @cached_property
    def device(self) -> torch.device:
        """Where tensors lie."""
        return torch.device("cpu" if self._interpreted else "cuda")

    @cached_property
    def runs(self) -> str:
        """What runs, in words."""
        return "Triton's interpreter" if self._interpreted else f"{torch.cuda.get_device_name()}, through Triton"

    def __call__(self, launch: Launch, tensors: Tensors, scalars: Mapping[str, int]) -> None:
        """Run a kernel; a grid without points launches nothing."""
        if launch.name not in self._made:
            self._made[launch.name] = _PrintedKernel(launch, self._arch)
        self._made[launch.name](tensors, scalars)


class Compiled:
    """Launches the compiled objects of an artifact through the driver of the GPU that they are for."""

    device = torch.device("cuda")
    slow = False

    def __init__(self, folder: Path, kernels: Kernels, arch: str) -> None:
        """Prepare to load objects of `folder` for an architecture."""
        self._folder, self._arch = folder, arch
        self._made: dict[str, Cubin] = {}
        self.runs = f"{torch.cuda.get_device_name()}, by the objects for {arch}"

    def __call__(self, launch: Launch, tensors: Tensors, scalars: Mapping[str, int]) -> None:
        """Run a kernel; a grid without points launches nothing."""
        points = prod(int(evaluate(extent, scalars)) for _, extent in launch.program.grid)
        if points < 1:
            return
        if launch.name not in self._made:
            self._made[launch.name] = self._load(launch)
        given = [aligned(tensors[a.name]) for a in launch.program.arguments]
        self._made[launch.name].launch(points, given, [scalars[name] for name in launch.program.scalars])

    def _load(self, launch: Launch) -> Cubin:
        entry = launch.objects[self._arch]
        path = inside(self._folder, str(entry["file"]))
        try:
            image = path.read_bytes()
        except OSError as error:
            raise MoecError(f"an object cannot be read: {error.strerror}", where=str(path)) from error
        return Cubin(image, launch.program.name, launch.warps, int(entry["shared"]))


class _PrintedKernel:
    """One kernel, printed when it is first launched."""

    def __init__(self, launch: Launch, arch: str) -> None:
        from .launch import GpuKernel

        limit = launch.objects.get(arch, {}).get("register_limit")
        self._program = launch.program
        self._kernel = GpuKernel(launch.program, launch.warps, limit)

    def __call__(self, tensors: Tensors, scalars: Mapping[str, int]) -> None:
        if all(int(evaluate(extent, scalars)) > 0 for _, extent in self._program.grid):
            self._kernel({name: aligned(tensor) for name, tensor in tensors.items()}, scalars)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that begins at an address as kernels are compiled for: itself or a copy. Outputs always do."""
    return tensor.clone() if tensor.data_ptr() % ALIGN else tensor


def start_interpreter() -> None:
    """Make Triton interpret, which is decided when it is imported. MoecError where it was imported otherwise before."""
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    from ..triton.compile import triton_module

    if not triton_module().knobs.runtime.interpret:
        raise MoecError(
            "Triton was imported before it could be told to interpret",
            todo="set TRITON_INTERPRET=1 before Python starts",
        )
    from . import interpreter

    interpreter.mend()


def open_launcher(device: str | None, folder: Path, kernels: Kernels) -> Launcher:
    """Return what runs the kernels on `device`, one of DEVICES: auto (None) is a GPU that they are for, else the simulator.

    `cuda` takes the compiled objects where they are for the GPU that is there, else Triton compiles the sources;
    `triton` always does the latter. MoecError for a device that there is not, and for one that does not run kernels of
    this chip.
    """
    name = device or "auto"
    if name not in DEVICES:
        raise MoecError(f"there is no device {name}", todo=f"give one of {', '.join(DEVICES)}")
    family = find_family(str(kernels.chip.get("family")))
    if name == "auto":
        name = "cuda" if family.device == "cuda" and torch.cuda.is_available() else "simulator"
    if name == "simulator":
        return Simulated(kernels)
    if family.device is None:
        raise MoecError(
            f"kernels for {kernels.target} are not run by {name}: it is a chip of the family {family.name}",
            todo="run them with --device simulator",
        )
    if name == "cuda" and all(is_for(k.objects, architecture()) for k in kernels.launches):
        return Compiled(folder, kernels, architecture())
    return Printed(kernels, interpreted=name == "interpreter")
