"""An ONNX model of a language model as a runner: ONNX Runtime on the source file, whatever moec made of it.

Exporters differ in what padding means to their attention, so that each sequence runs by itself, without any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto

from ..artifact.manifest import vocabulary_of
from ..errors import MoecError
from ..frontends.onnx.graph import identifier
from ..frontends.onnx.model import import_file
from ..ir.dims import evaluate

Rows = tuple[dict[str, Any], ...]  # the caches of each sequence as ONNX Runtime's values, by the names of inputs
# of the types that caches have: ONNX's number, and how many bytes an element takes
_ELEMENTS = {
    "tensor(float)": (TensorProto.FLOAT, 4), "tensor(float16)": (TensorProto.FLOAT16, 2),
    "tensor(bfloat16)": (TensorProto.BFLOAT16, 2), "tensor(int8)": (TensorProto.INT8, 1),
}  # fmt: skip


@dataclass(frozen=True)
class OnnxReference:
    """A session on an ONNX file that runs step by step; `caches` are its inputs with the outputs that they come back as."""

    session: Any
    name: str
    inputs: Mapping[str, str]  # the name of an input in programs -> in the file
    caches: Mapping[str, str]
    empty: Mapping[str, Any]
    vocabulary: int
    context: int
    decoding: None = None

    def step(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, position_ids: np.ndarray, states: Any = None,
        last: int = 0,
    ) -> tuple[np.ndarray, Any]:  # fmt: skip
        """Run new tokens after those in `states`; see generate.Runner. Logits of padding are 0."""
        before: Rows = states if states is not None else tuple(dict(self.empty) for _ in input_ids)
        new, found, after = input_ids.shape[1], [], []
        for ids, mask, places, row in zip(input_ids, attention_mask, position_ids, before, strict=True):
            real = mask[-new:].astype(bool)
            given = {"input_ids": ids[real], "attention_mask": mask[mask != 0], "position_ids": places[real]}
            fed = {self.inputs[n]: _as_ort_value(array[None]) for n, array in given.items() if n in self.inputs}
            logits, caches = self._run_row({**fed, **row}) if real.any() else (None, row)
            whole = np.zeros((new, self.vocabulary if logits is None else logits.shape[-1]), np.float32)
            if logits is not None:
                whole[real] = logits[0]
            found.append(whole)
            after.append(caches)
        return np.stack(found)[:, -last:], tuple(after)

    def _run_row(self, given: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        names = [output.name for output in self.session.get_outputs()]
        try:
            results = dict(zip(names, self.session.run_with_ort_values(names, dict(given)), strict=True))
        except Exception as error:  # ONNX Runtime raises types that share no base
            raise MoecError(f"ONNX Runtime cannot run the source: {str(error).splitlines()[0]}", self.name) from error
        return results["logits"].numpy().astype(np.float32), {
            past: results[present] for past, present in self.caches.items()
        }


def open_onnx_reference(path: Path) -> OnnxReference:
    """Open the ONNX file of a language model; MoecError for another model, and for one that ONNX Runtime does not open."""
    import onnxruntime

    imported = import_file(path, str(path))  # looks through the file, which ONNX Runtime is to read
    module = imported.module
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors are raised
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises types that share no base
        raise MoecError(f"ONNX Runtime cannot open the source: {str(error).splitlines()[0]}", str(path)) from error
    inputs = {identifier(entry.name): entry for entry in session.get_inputs()}
    start = {dim.name: 1 if dim.low else 0 for dim in module.dims}  # one sequence, nothing past
    sizes = {p.name: [evaluate(size, start) for size in p.type.shape] for p in module.main.params if p.type.state}
    empty = {}
    for name, cache in imported.states.items():
        entry = inputs[identifier(name)]
        # scales are beside what they belong to, and no states of the program
        shape = [1, *entry.shape[1 : cache.axis], 0] if cache.scales else sizes[identifier(name)]
        empty[name] = _empty_cache(entry.type, shape, path)
    longest = next((dim.high for dim in module.dims if dim.name == "S"), 1 << 20)
    rows = vocabulary_of(module)
    if rows is None:
        raise MoecError("the number of tokens that the model knows is not seen", where=str(path))
    names = {name: entry.name for name, entry in inputs.items()}
    caches = {name: cache.present for name, cache in imported.states.items()}
    return OnnxReference(session, str(path), names, caches, empty, rows, longest)


def _empty_cache(type: str, shape: list[int], path: Path) -> Any:
    """Return a value of ONNX Runtime without elements, or of zeros, made of integers: numpy does not have all floats."""
    import onnxruntime

    if type not in _ELEMENTS:
        raise MoecError(f"its caches are {type}, which is not run", where=str(path))
    element, width = _ELEMENTS[type]
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(np.zeros(shape, f"u{width}"), element)


def _as_ort_value(array: np.ndarray) -> Any:
    """Return an array as a value of ONNX Runtime."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
