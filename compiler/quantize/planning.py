"""What the driver does with a calibration text: a plan for `--quantize auto`, and weights that know their inputs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MoecError
from ..frontends import Loaded
from ..ir.module import Module
from ..weights.heap import returning_freed_memory
from .options import AUTO, ROLES, Spec
from .plan import KEEP, Budget, Plan, read_plan

if TYPE_CHECKING:
    from ...targets import Target
    from ..ir.module import Op
    from ..ir.storage import Format
    from ..rewrite.declare import PassDef

_LOWERED = "the program is already lowered"


def find_plan(
    spec: Spec, budget: str | None, loaded: Loaded, before: Callable[[], Module], quantize: PassDef, target: Target,
    file: Path | str | None, limit: int,
) -> Plan | None:  # fmt: skip
    """Return the plan that `--quantize` asks for: read from its file, or made under a budget; None if it asks for none.

    `before` gives the module that is to be quantized, `quantize` is the pass that does it, `file` is the calibration text,
    and `limit` are the bytes to work in.
    """
    if spec.plan is None:
        return None
    if spec.plan != AUTO:
        return read_plan(Path(spec.plan))
    assert budget is not None  # judged before the import
    wanted = Budget.parse(budget)
    text = _text(loaded, file, "--quantize auto measures what formats cost on a text")
    module = before()
    if module.stage != "moe":
        raise MoecError(f"{_LOWERED}: its formats are fixed", todo="enter at stage moe or earlier")
    assert loaded.weights is not None
    from .calibrate import windows_of
    from .sensitivity import make_plan

    def store(module: Module, layers: str) -> Module:
        return quantize(module, target, None, **dict.fromkeys(ROLES, KEEP), layers=layers)

    method = spec.options.get("method", "rtn")

    def obstacle(op: Op, format: Format) -> str | None:
        return target.holds(op, format) or target.slow(op, format)

    with returning_freed_memory():
        return make_plan(module, loaded.weights, windows_of(text, module), wanted, method, store, obstacle, limit)


def calibrated(
    loaded: Loaded, module: Module | None, file: Path | str | None, out: Path, limit: int
) -> tuple[Loaded, dict[str, Any]]:
    """Return the source with weights that know their inputs on a text, and what there is to report of it.

    `module` is the one that is to be lowered; None if it is lowered already. `limit` are the bytes to work in.
    """
    from ..weights.awq import fit
    from ..weights.calibrated import Calibrated
    from .calibrate import calibrate, windows_of

    if module is None:
        raise MoecError(f"{_LOWERED}, and its weights want a calibration", todo="enter at stage moe or earlier")
    text = _text(loaded, file, "the method looks at what weights are multiplied with")
    assert loaded.weights is not None
    out.parent.mkdir(parents=True, exist_ok=True)
    found = calibrate(module, loaded.weights, windows_of(text, module), out.parent, limit)
    fitted = fit(module, loaded.weights, found.inputs)
    source = Calibrated(loaded.weights, found.inputs, fitted, limit // 4)
    return replace(loaded, weights=source), {"text": text.sha256, **found.to_dict()}


def _text(loaded: Loaded, file: Path | str | None, why: str) -> Any:
    """Return the calibration text as tokens."""
    from .calibrate import CalibrationText

    if file is None:
        raise MoecError(f"there is no calibration text: {why}", todo="name a text file: --calibration FILE")
    if loaded.folder is not None or not loaded.brought:
        return CalibrationText.read(Path(file), loaded.folder)
    with tempfile.TemporaryDirectory() as folder:  # of a live model
        for name, content in loaded.brought.items():
            Path(folder, name).write_bytes(content)
        return CalibrationText.read(Path(file), Path(folder))
