"""An ONNX model of a language model as a runner: ONNX Runtime on the source file, whatever moec made of it.

Exporters differ in what padding means to their attention, so that each sequence runs by itself, without any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact.manifest import vocabulary_of
from ..errors import MoecError
from ..frontends.onnx.graph import identifier
from ..frontends.onnx.model import import_file
from ..ir.dims import evaluate
from ..ir.dtypes import DTYPES

Rows = tuple[dict[str, np.ndarray], ...]  # the caches of each sequence, by the names of inputs


@dataclass(frozen=True)
class OnnxReference:
    """A session on an ONNX file that runs step by step; `caches` are its inputs with the outputs that they come back as."""

    session: Any
    name: str
    inputs: Mapping[str, str]  # the name of an input in programs -> in the file
    caches: Mapping[str, str]
    empty: Mapping[str, np.ndarray]
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
            fed = {self.inputs[name]: array[None] for name, array in given.items() if name in self.inputs}
            logits, caches = self._run_row({**fed, **row}) if real.any() else (None, row)
            whole = np.zeros((new, self.vocabulary if logits is None else logits.shape[-1]), np.float32)
            if logits is not None:
                whole[real] = logits[0]
            found.append(whole)
            after.append(caches)
        return np.stack(found)[:, -last:], tuple(after)

    def _run_row(self, arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        names = [output.name for output in self.session.get_outputs()]
        try:
            results = dict(zip(names, self.session.run(names, dict(arrays)), strict=True))
        except Exception as error:  # ONNX Runtime raises types that share no base
            raise MoecError(f"ONNX Runtime cannot run the source: {str(error).splitlines()[0]}", self.name) from error
        return results["logits"].astype(np.float32), {past: results[present] for past, present in self.caches.items()}


def open_onnx_reference(path: Path) -> OnnxReference:
    """Open the ONNX file of a language model; MoecError for another model, and for one that ONNX Runtime does not open."""
    import onnxruntime

    module, _, _ = import_file(path, str(path))  # looks through the file, which ONNX Runtime is to read
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors are raised
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises types that share no base
        raise MoecError(f"ONNX Runtime cannot open the source: {str(error).splitlines()[0]}", str(path)) from error
    inputs = {identifier(entry.name): entry for entry in session.get_inputs()}
    outputs = {identifier(entry.name): entry.name for entry in session.get_outputs()}
    pasts = [p for p in module.main.params if p.type.state]
    presents = [r for r in module.main.results if r.type.state]
    caches, empty = {}, {}
    start = {dim.name: 1 if dim.low else 0 for dim in module.dims}  # one sequence, nothing past
    for past, present in zip(pasts, presents, strict=True):
        entry = inputs[past.name]
        caches[entry.name] = outputs[present.name]
        dtype = np.float16 if "float16" in entry.type else DTYPES[past.type.dtype].numpy
        empty[entry.name] = np.zeros([evaluate(size, start) for size in past.type.shape], dtype)
    longest = next((dim.high for dim in module.dims if dim.name == "S"), 1 << 20)
    rows = vocabulary_of(module)
    if rows is None:
        raise MoecError("the number of tokens that the model knows is not seen", where=str(path))
    names = {name: entry.name for name, entry in inputs.items()}
    return OnnxReference(session, str(path), names, caches, empty, rows, longest)
