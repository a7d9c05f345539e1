"""Exports a live torch module with example inputs, for every size of their axes for which its code is the same."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram, export

from ...errors import MoecError
from .logs import without_logs

OWN = Path(__file__).parents[2]  # compiler/: what a user has to change is not there
Examples = torch.Tensor | Sequence[Any] | Mapping[str, Any]


def export_module(module: torch.nn.Module, example_inputs: Examples) -> ExportedProgram:
    """Export a module as it is called with its example inputs, in eval mode: a tensor, a tuple, or a dict by name.

    Axes that the module's code does not fix are sizes of the program; the examples must not be 0 or 1 there. MoecError
    for code that torch.export cannot trace: it shows the line, and what to change.
    """
    args, kwargs = _split_examples(example_inputs)
    free = {name: _free_axes(value) for name, value in kwargs.items()}
    dynamic = free if kwargs else tuple(_free_axes(value) for value in args)
    with _eval_mode(module), without_logs(), torch.no_grad():
        try:
            return export(module, tuple(args), kwargs, dynamic_shapes=dynamic, strict=False)
        except MoecError:
            raise
        except Exception as error:  # torch.export raises many types that share no base
            raise _export_error(module, error) from error


def _split_examples(given: Examples) -> tuple[list[Any], dict[str, Any]]:
    if isinstance(given, torch.Tensor):
        return [given], {}
    if isinstance(given, Mapping):
        return [], dict(given)
    if isinstance(given, (tuple, list)):
        return list(given), {}
    what = f"example inputs cannot be a {type(given).__name__}"
    raise MoecError(what, todo="give a tensor, a tuple of tensors, or a dict of them by name")


def _free_axes(value: Any) -> dict[int, Any] | None:
    """Return that every axis of a tensor may be a size of the program; torch finds out which are fixed."""
    return {axis: Dim.AUTO for axis in range(value.dim())} if isinstance(value, torch.Tensor) else None


@contextmanager
def _eval_mode(module: torch.nn.Module) -> Iterator[None]:
    """Put a module and what is in it into eval mode, and back as each was."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _export_error(module: torch.nn.Module, error: Exception) -> MoecError:
    """Return the error of code that cannot be traced: torch's reason, the line of the module, and what would do."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    todo = "make the code the same for all inputs, or give an exported program of it"
    if "DataDependent" in type(error).__name__ or "data-dependent" in str(error):
        todo = (
            "let the code do the same whatever the numbers are: loop over all experts, not over those that were chosen, "
            "and leave out tests of whether any token chose one; rows that no token chose cost nothing in the artifact"
        )
    return MoecError(
        f"torch.export cannot trace it: {type(error).__name__}: {lines[0] if lines else ''}",
        where=f"python:{type(module).__name__}", excerpt=_line_of(error), todo=todo,
    )  # fmt: skip


def _line_of(error: BaseException) -> str:
    """Return the line of code outside of torch where an error arose, the innermost one."""
    library = Path(torch.__file__).parent
    found = ""
    for frame in traceback.extract_tb(error.__traceback__):
        file = Path(frame.filename)
        if file.is_file() and library not in file.parents and OWN not in file.parents and frame.line:
            found = f"{file.name}:{frame.lineno}: {frame.line}"
    return found
