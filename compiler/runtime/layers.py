"""Where a program first parts from its source model: what its ops compute, beside the outputs of the modules they come from.

The program is interpreted with its own weights, so that passes, recipes and formats are looked at; what a runtime makes of them is
compared by `compare.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..check.interpret import interpret
from ..errors import MoecError
from ..ir.dims import evaluate
from ..ir.dtypes import DTYPES
from ..ir.module import Function, Module, Op
from ..weights.evaluate import evaluate_recipe
from ..weights.uncalibrated import without_calibration
from .generate import left_pad
from .reference import Reference

if TYPE_CHECKING:
    from torch import Tensor

    from ..weights.sources.source import WeightSource

TOLERANCE = 1e-3  # of an exact program, relative to the largest number of the module's output
LOSSY = 0.5  # of one with quantized weights


@dataclass(frozen=True)
class Place:
    """An op that computes a module's output: where, which op of which function, and how far it is off."""

    module: str
    function: str
    op: str
    difference: float

    def line(self) -> str:
        """Return the place as text."""
        return f"{self.difference:9.2g}  {self.module}  ({self.op} in @{self.function})"


def compare_places(
    program: Module, weights: WeightSource, reference: Reference, prompts: Sequence[Sequence[int]]
) -> list[Place]:
    """Return how far the ops of a program are off at every place that is a module of the source, in the order in which they run.

    MoecError where no op comes from a module of the source.
    """
    ids, mask, positions = left_pad(prompts)
    with _recorded_outputs(reference.model) as outputs:
        reference.step(ids, mask, positions, None)
    found: dict[str, tuple[Function, Op, Tensor]] = {}

    def observe(function: Function, bound: Mapping[str, str], op: Op, results: Sequence[Tensor]) -> None:
        if len(op.loc) == 1:  # the last op of a place makes its output
            name = re.sub(r"\{(\w+)\}", lambda m: bound.get(m[1], m[0]), function.weights) + op.loc[0]
            for outer in [other for other in found if name.startswith(f"{other}.")]:
                del found[outer]  # its output is made later, by this op or one behind it
            if name in outputs:
                found.pop(name, None)
                found[name] = (function, op, results[0])

    run_program(program, weights, ids, mask, positions, observe)
    real = torch.from_numpy(mask.astype(bool))
    places = []
    for name, (function, op, value) in found.items():
        alike = [wanted for wanted in outputs[name] if wanted.numel() == value.numel() and value.is_floating_point()]
        if alike:  # of a module that returns several, the one that it is nearest to
            difference = min(_difference(value, wanted, real) for wanted in alike)
            places.append(Place(name, function.name, str(op.results[0]), difference))
    if not places:
        what = "no op of the program comes from a module of the source model"
        raise MoecError(what, where=reference.name, todo="compare the logits: moec verify DIR")
    return places


def run_program(
    program: Module,
    weights: WeightSource,
    ids: np.ndarray,
    mask: np.ndarray,
    positions: np.ndarray,
    observe: Any = None,
) -> dict[str, Tensor]:
    """Interpret the first step of a language model and return its results by name."""
    dims = {"B": ids.shape[0], "S": ids.shape[1], "P": 0}
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    inputs = []
    for param in program.main.params:
        dtype = DTYPES[param.type.dtype].torch
        if param.name in given:
            inputs.append(torch.from_numpy(given[param.name]).to(dtype))
        elif param.type.state:
            inputs.append(torch.zeros([evaluate(size, dims) for size in param.type.shape], dtype=dtype))
        else:
            raise MoecError(f"the program takes {param}, which a step does not give", where="@main")

    def tensor_of(recipe: Any) -> Tensor:
        return evaluate_recipe(without_calibration(recipe), weights)

    results = interpret(program, inputs, tensor_of, dims=dims, observe=observe)
    return {value.name: result for value, result in zip(program.main.results, results, strict=True)}


@contextmanager
def _recorded_outputs(model: Any) -> Iterator[dict[str, list[Tensor]]]:
    """Record the tensors that every module of a model returns the first time that it is called."""
    outputs: dict[str, list[Tensor]] = {}

    def recorder(name: str) -> Any:
        def record(_module: Any, _inputs: Any, output: Any) -> None:
            several = output if isinstance(output, (tuple, list)) else [output]
            found = [t.detach().float() for t in several if isinstance(t, torch.Tensor) and t.is_floating_point()]
            outputs.setdefault(name, found)

        return record

    hooks = [module.register_forward_hook(recorder(name)) for name, module in model.named_modules() if name]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _difference(found: Tensor, wanted: Tensor, real: Tensor) -> float:
    """Return the largest difference relative to the largest number, of tokens that are no padding where rows are tokens."""
    found = found.float().reshape(wanted.shape)
    rows = int(real.numel())
    if wanted.numel() % rows == 0 and wanted.shape[0] in (rows, real.shape[0]) and wanted.ndim > 1:
        chosen = real.flatten()
        if wanted.shape[0] == rows or wanted.shape[1] == real.shape[1]:
            found, wanted = found.reshape(rows, -1)[chosen], wanted.reshape(rows, -1)[chosen]
    largest = float(wanted.abs().max())
    difference = float((found - wanted).abs().max())
    return difference / largest if largest else difference
