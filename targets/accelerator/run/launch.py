"""Runs printed kernels on a GPU through torch and times them.

Triton compiles the printed file itself when it is first launched: the same source with the same alignment as
triton_compile.py takes, for whatever chip is there. Under Triton's interpreter the same path runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from ....compiler.errors import MoecError
from ....compiler.ir.dtypes import DTYPES
from ..tile.expr import evaluate_expr
from ..tile.tiles import Program
from ..triton.compile import ALIGN, load_kernel, triton_module
from ..triton.source import triton_source


@dataclass(frozen=True)
class GpuKernel:
    """A program that can be launched with so many warps a block, and at most `limit` registers a thread."""

    program: Program
    warps: int = 4
    limit: int | None = None

    @cached_property
    def _launch(self) -> Callable[..., None]:
        triton_module()
        return load_kernel(triton_source(self.program, self.warps, self.limit), self.program.name)["launch"]

    def __call__(self, tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, int]) -> None:
        """Run it: the tensors of its arguments by name, those of role output are changed. MoecError for one that does not fit."""
        given = []
        for a in self.program.arguments:
            tensor, shape = tensors.get(a.name), tuple(int(evaluate_expr(n, scalars)) for n in a.shape)
            if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != DTYPES[a.dtype].torch:
                found = "nothing" if tensor is None else f"{tensor.dtype}{list(tensor.shape)}"
                raise MoecError(f"{self.program.name}: {a.name} is {a.dtype}{list(shape)}, {found} was given")
            if not tensor.is_contiguous() or tensor.data_ptr() % ALIGN:
                raise MoecError(
                    f"{self.program.name}: {a.name} does not lie row by row from a multiple of {ALIGN} bytes"
                )
            given.append(tensor)
        check_device(given[0].device)
        self._launch(*given, *(scalars[name] for name in self.program.scalars))


def check_device(device: torch.device) -> None:
    """Raise MoecError where no kernel runs on a device: it is no GPU that is there, and Triton does not interpret."""
    interprets = bool(triton_module().knobs.runtime.interpret)
    if device.type == "cpu" and interprets:
        return
    if device.type != "cuda" or not torch.cuda.is_available():
        raise MoecError(
            f"kernels run on a GPU, not on {device.type}",
            todo="run it where torch.cuda.is_available(), or check the numbers with the simulator",
            exit_code=1,
        )


def check_gpu() -> None:
    """Raise MoecError where torch finds no GPU."""
    if not torch.cuda.is_available():
        raise MoecError("no GPU is here to time kernels on", todo="torch.cuda.is_available() says False", exit_code=1)
