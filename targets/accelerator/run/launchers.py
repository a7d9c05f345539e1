"""What a kernel is launched on: the simulator in numpy, Triton's interpreter, or a GPU by compiled objects or Triton."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from ....compiler.errors import MoecError
from ....compiler.ir.dtypes import DTYPES
from ..chip.families import find_family
from ..tile.expr import evaluate_expr
from ..tile.simulate import simulate_program
from ..tile.tiles import Argument
from ..triton.architectures import architecture_of
from ..triton.compile import ALIGN
from .artifact import Launch, StoredKernels, path_inside
from .driver import LoadedKernel, captured_node, gpu_architecture, is_for

DEVICES = ("auto", "simulator", "interpreter", "cuda", "hip", "triton")
Tensors = Mapping[str, torch.Tensor]


class NotCaptured(Exception):
    """Why a step cannot be captured as a graph."""


class Launcher(Protocol):
    """Launches kernels. `runs` says in words what they run on, `device` where the tensors lie, `slow` that it is no chip.

    `captures`: what is launched is kept to be replayed after more tokens, so that sizes have to stay as they are.
    """

    @property
    def device(self) -> torch.device: ...

    @property
    def runs(self) -> str: ...

    @property
    def slow(self) -> bool: ...

    @property
    def captures(self) -> bool: ...

    def __call__(self, launch: Launch, tensors: Tensors, scalars: Mapping[str, int]) -> None:
        """Run a kernel on tensors of exactly its arguments' shapes and dtypes; outputs are changed in place."""


class Simulated:
    """Executes tile programs in numpy, with the checks of simulate.py: it needs no chip and no compiler."""

    device = torch.device("cpu")
    slow, captures = True, False

    def __init__(self, kernels: StoredKernels) -> None:
        """Simulate the chip that the kernels are for."""
        self._kernels = kernels
        self.runs = f"the simulator of {kernels.target}"

    def __call__(self, launch: Launch, tensors: Tensors, scalars: Mapping[str, int]) -> None:
        """Run a kernel."""
        arrays = {a.name: _array_of_tensor(tensors[a.name], a) for a in launch.program.arguments}
        simulate_program(launch.program, arrays, scalars, self._kernels.chip_for(launch))


def _array_of_tensor(tensor: torch.Tensor, a: Argument) -> np.ndarray:
    """Return the same memory as an array; bytes are viewed, since numpy has not all dtypes by itself."""
    kind = DTYPES[a.dtype].numpy
    if not tensor.numel():
        return np.zeros(tuple(tensor.shape), kind)
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().view(kind).reshape(tuple(tensor.shape))


class Printed:
    """Launches the printed Triton source of each program: on a GPU, or where Triton interprets, on the CPU."""

    captures = False

    def __init__(self, kernels: StoredKernels, interpreted: bool) -> None:
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
    slow, captures = False, False

    def __init__(self, folder: Path, kernels: StoredKernels, arch: str) -> None:
        """Prepare to load objects of `folder` for an architecture."""
        self._folder, self._arch = folder, arch
        self._made: dict[str, LoadedKernel] = {}
        self.runs = f"{torch.cuda.get_device_name()}, by the objects for {arch}"

    def __call__(self, launch: Launch, tensors: Tensors, scalars: Mapping[str, int]) -> None:
        """Run a kernel; a grid without points launches nothing."""
        if points := _grid_points(launch, scalars):
            self._kernel(launch).launch(points, *_launch_arguments(launch, tensors, scalars))

    def capture(self, launch: Launch, tensors: Tensors, scalars: Mapping[str, int]) -> CapturedLaunch | None:
        """Launch a kernel on a stream that is being captured; None for a grid without points."""
        if not (points := _grid_points(launch, scalars)):
            return None
        kernel, (given, numbers) = self._kernel(launch), _launch_arguments(launch, tensors, scalars)
        kernel.launch(points, given, numbers)
        return CapturedLaunch(launch, kernel, tuple(given), dict(scalars), captured_node())

    def _kernel(self, launch: Launch) -> LoadedKernel:
        if launch.name not in self._made:
            self._made[launch.name] = self._load(launch)
        return self._made[launch.name]

    def _load(self, launch: Launch) -> LoadedKernel:
        entry = launch.objects[self._arch]
        path = path_inside(self._folder, str(entry["file"]))
        try:
            image = path.read_bytes()
        except OSError as error:
            raise MoecError(f"an object cannot be read: {error.strerror}", where=str(path)) from error
        threads = architecture_of(self._arch).warp * launch.warps
        return LoadedKernel(image, launch.program.name, threads, int(entry["shared"]))


def _grid_points(launch: Launch, scalars: Mapping[str, int]) -> int:
    return max(0, prod(int(evaluate_expr(extent, scalars)) for _, extent in launch.program.grid))


def _launch_arguments(
    launch: Launch, tensors: Tensors, scalars: Mapping[str, int]
) -> tuple[list[torch.Tensor], list[int]]:
    return [aligned_tensor(tensors[a.name]) for a in launch.program.arguments], [
        scalars[n] for n in launch.program.scalars
    ]


@dataclass(frozen=True, eq=False)
class CapturedLaunch:
    """A launch in a captured graph: what it was given, and its node."""

    launch: Launch
    kernel: LoadedKernel
    tensors: tuple[torch.Tensor, ...]
    scalars: Mapping[str, int]
    node: int

    def update(self, graph: int, dims: Mapping[str, int]) -> None:
        """Change the dims among its scalars, in an instantiated graph."""
        scalars = {**self.scalars, **{name: n for name, n in dims.items() if name in self.scalars}}
        numbers = [scalars[name] for name in self.launch.program.scalars]
        self.kernel.update(graph, self.node, _grid_points(self.launch, scalars), self.tensors, numbers)


class _PrintedKernel:
    """One kernel, printed when it is first launched."""

    def __init__(self, launch: Launch, arch: str) -> None:
        from .launch import GpuKernel

        limit = launch.objects.get(arch, {}).get("register_limit")
        self._program = launch.program
        self._kernel = GpuKernel(launch.program, launch.warps, limit)

    def __call__(self, tensors: Tensors, scalars: Mapping[str, int]) -> None:
        if all(int(evaluate_expr(extent, scalars)) > 0 for _, extent in self._program.grid):
            self._kernel({name: aligned_tensor(tensor) for name, tensor in tensors.items()}, scalars)


def aligned_tensor(tensor: torch.Tensor) -> torch.Tensor:
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

    interpreter.mend_interpreter()


def open_launcher(device: str | None, folder: Path, kernels: StoredKernels) -> Launcher:
    """Return what runs the kernels on `device`, one of DEVICES: auto (None) is a GPU that they are for, else the simulator.

    `cuda`, or `hip` where torch is built for AMD's GPUs, takes the compiled objects where they are for the GPU that is
    there, else Triton compiles the sources; `triton` always does the latter. MoecError for a device that there is not, and for one that does not run kernels of
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
    if name == "hip":
        if not torch.version.hip:
            raise MoecError(
                "torch is not built for AMD's GPUs here", todo="give --device cuda or simulator", exit_code=1
            )
        name = "cuda"  # as torch calls them
    if name == "cuda" and all(is_for(k.objects, gpu_architecture()) for k in kernels.launches):
        return Compiled(folder, kernels, gpu_architecture())
    return Printed(kernels, interpreted=name == "interpreter")
