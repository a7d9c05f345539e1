"""Checks the weights that a program's text names against a checkpoint, and points at the name that is wrong."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

from ..errors import MoecError
from ..ir.module import Const, Function, Module, walk_calls
from ..ir.recipes import FITTED, Tensor, bind_recipe, written_tensors
from ..ir.syntax import Place, Source
from ..ir.types import TensorType, expand_range
from ..weights.sources.checkpoint import Checkpoint
from ..weights.sources.onnx import OnnxSource


def check_text_weights(module: Module, checkpoint: Checkpoint | OnnxSource, text: str, path: Path) -> None:
    """Check that every tensor that a program reads is there as it should be; MoecError points at its name in the text."""
    for function, bound in walk_calls(module):
        for const in function.consts:
            for leaf in written_tensors(const.recipe):
                named = bind_recipe(leaf, function.weights, bound)
                assert isinstance(named, Tensor)
                for name in expand_range(named.name):
                    if (problem := _weight_problem(name, leaf.type, checkpoint)) is not None:
                        raise _error_at_name(problem, function, const, leaf, Source(text, str(path)))


def _weight_problem(name: str, wanted: TensorType, checkpoint: Checkpoint | OnnxSource) -> MoecError | None:
    info = checkpoint.tensors.get(name)
    if name.endswith(FITTED):
        return None
    if info is None:
        return checkpoint.lacks(name)
    if info.type != wanted:
        return MoecError(f"the tensor {name} is {info.type}, {wanted} is wanted", where=str(info.file))
    return None


def _error_at_name(problem: MoecError, function: Function, const: Const, leaf: Tensor, source: Source) -> MoecError:
    """Return the error at the name's place in the text; as it is where the name is not found there."""
    name = json.dumps(leaf.name, ensure_ascii=False)
    inside = False
    for number, line in enumerate(source.text.split("\n"), 1):
        if line.startswith("func "):
            inside = bool(re.match(rf"func @{re.escape(function.name)}\W", line))
        column = line.find(name)
        if inside and column >= 0 and re.match(rf"\s*const %{re.escape(const.value.name)}\s*:", line):
            shown = source.error(problem.what, Place(number, column + 1, len(name)))
            return replace(shown, todo=problem.todo, model=problem.where)
    return problem
