"""Compares an artifact that is called with arrays with the module, program or ONNX model that it was compiled from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact.manifest import check_files, size_of
from ..errors import MoecError
from .calls import NUMPY
from .subject import Compiled, recorded_source

TOLERANCE = 1e-4  # of artifacts without a lossy pass, relative to the largest number of a result
HALF_TOLERANCE = 1e-2  # where the source computes in half floats, and the artifact in f32
SIZES = (2, 7, 33)  # of every axis that is not fixed


@dataclass(frozen=True)
class CallComparison:
    """How far results are off, for each size of the free axes: the largest difference over the largest number."""

    against: str
    lossless: bool
    tolerance: float
    cases: Mapping[str, float]

    @property
    def relative(self) -> float:
        """The largest difference of any case; NaN counts as infinite."""
        return max(math.inf if math.isnan(n) else n for n in self.cases.values())

    @property
    def passed(self) -> bool:
        """Whether the numbers are within what is allowed: for quantized weights anything finite."""
        return self.relative <= self.tolerance if self.lossless else math.isfinite(self.relative)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        finite = {name: n if math.isfinite(n) else None for name, n in self.cases.items()}
        relative = self.relative if math.isfinite(self.relative) else None
        return {**asdict(self), "cases": finite, "relative": relative, "passed": self.passed}

    def lines(self) -> list[str]:
        """Return the findings as text, a line each."""
        found = [f"{name}: results differ by {n:.2g}" for name, n in self.cases.items()]
        bound = f"at most {self.tolerance:g} is allowed" if self.lossless else "the weights are quantized"
        verdict = "equal to" if self.lossless and self.passed else "compared with" if self.passed else "differs from"
        return [*found, f"{verdict} {self.against}: relative difference {self.relative:.2g} ({bound})"]


def compare_calls(artifact: Compiled, against: Any = None, session: Any = None, **options: Any) -> CallComparison:
    """Compare an artifact with the module, program or model that it was compiled from, on random inputs of several sizes.

    `against` is the module, an exported program, an ONNX model, or a `.pt2` or `.onnx` file (by default the file that the
    artifact names); ONNX Runtime runs an ONNX model. Integers are drawn from 0 and 1. MoecError if there is nothing to compare with, and for a file that is not as it was written.
    """
    reference = _open_reference(artifact, against)
    check_files(artifact.folder, artifact.manifest, hashes=True)
    runner = session or artifact.session(**{key: options[key] for key in ("accuracy", "device") if key in options})
    cases = {}
    for label, arrays in _random_inputs(artifact.manifest):
        found, wanted = runner.call(arrays), reference.call(arrays)
        cases[label] = max(_relative(a, b) for a, b in zip(found.values(), wanted, strict=True))
    return CallComparison(reference.name, not artifact.lossy, reference.tolerance, cases)


@dataclass(frozen=True)
class _Reference:
    """What an artifact is compared with: its name, how it is called, and how far off its numbers may be."""

    name: str
    call: Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]
    tolerance: float = TOLERANCE


def _open_reference(artifact: Compiled, against: Any) -> _Reference:
    import torch

    if isinstance(against, torch.nn.Module):
        return _Reference(type(against).__name__, partial(_call_torch, against))
    source = against if against is not None else recorded_source(artifact)
    if isinstance(source, torch.export.ExportedProgram):
        return _Reference("the exported program", partial(_call_torch, source.module(check_guards=False)))
    if not isinstance(source, str) and type(source).__name__ == "ModelProto":
        return _open_onnx(source.SerializeToString(), "the ONNX model")
    if isinstance(source, (str, Path)) and Path(source).suffix == ".onnx":
        from ..frontends.onnx.model import import_file

        import_file(Path(source), str(source))  # looks through the file, which ONNX Runtime is to read
        return _open_onnx(str(source), str(source))
    if not isinstance(source, (str, Path)) or Path(source).suffix != ".pt2":
        what = "the artifact does not name the module that it was compiled from"
        raise MoecError(
            what, str(artifact.folder), todo="artifact.verify(against=module), or name the .pt2 or .onnx file"
        )
    from ..frontends.programs.archive import open_archive

    return _Reference(str(source), partial(_call_torch, open_archive(Path(source)).module(check_guards=False)))


def _open_onnx(model: str | bytes, name: str) -> _Reference:
    """Return ONNX Runtime's session of a model; its inputs are given in their order."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors are raised
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises types that share no base
        raise MoecError(f"ONNX Runtime cannot open the source: {str(error).splitlines()[0]}", where=name) from error
    inputs = [(entry.name, np.float16 if entry.type == "tensor(float16)" else None) for entry in session.get_inputs()]

    def call(arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        given = zip(inputs, arrays.values(), strict=True)
        fed = {entry: array if half is None else array.astype(half) for (entry, half), array in given}
        return [np.asarray(found, np.float32) for found in session.run(None, fed)]

    half = any("float16" in entry.type for entry in (*session.get_inputs(), *session.get_outputs()))
    return _Reference(name, call, HALF_TOLERANCE if half else TOLERANCE)


def _random_inputs(manifest: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yield inputs for several sizes of the free axes, each within its range; those without one once."""
    rng, seen = np.random.default_rng(0), set()
    for number in SIZES:
        dims = {name: min(max(number, low), high) for name, (low, high) in manifest["dims"].items()}
        label = ", ".join(f"{name} = {n}" for name, n in dims.items()) or "fixed sizes"
        if label in seen:
            continue
        seen.add(label)
        arrays = {}
        for entry in manifest["inputs"]:
            shape = tuple(size_of(size, dims) for size in entry["shape"])
            dtype = NUMPY[entry["dtype"]]
            floats = dtype.kind == "f"
            drawn = rng.standard_normal(shape) if floats else rng.integers(0, 2, shape)
            arrays[entry["name"]] = np.asarray(drawn).astype(dtype)
        yield label, arrays


def _call_torch(module: Any, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    import torch
    from torch.utils import _pytree

    with torch.no_grad():
        found = module(*(torch.from_numpy(a) for a in arrays.values()))
    return [leaf.detach().float().numpy() for leaf in _pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor)]


def _relative(found: np.ndarray, wanted: np.ndarray) -> float:
    if found.shape != wanted.shape:
        raise MoecError(f"a result has the shape {list(found.shape)}, the source gives {list(wanted.shape)}")
    largest = float(np.abs(wanted).max(initial=0.0))
    return float(np.abs(found.astype(np.float64) - wanted).max(initial=0.0)) / (largest or 1.0)
