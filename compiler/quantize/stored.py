"""How the weights and states of a module are stored: in which formats, whether that lost numbers, what is still to be calibrated."""

from __future__ import annotations

from ..ir.dtypes import DTYPES
from ..ir.module import Module, Op
from ..ir.recipes import steps_of
from ..ops import OPS
from ..weights.demote import is_demotion
from ..weights.steps.quantized import method_of
from .options import CALIBRATED


def is_lossy(module: Module) -> bool:
    """Return whether a weight is stored in fewer bits than it has in the checkpoint, or a state in fewer than what it is made of."""
    steps = [step for f in module.functions for c in f.consts for step in steps_of(c.recipe)]
    if any(step.name == "quantize" or is_demotion(step) for step in steps):
        return True
    return any(_rounds_state(op) for f in module.functions for op in f.ops if not op.callee)


def _rounds_state(op: Op) -> bool:
    """Return whether an op stores a state in fewer bits than the numbers have that it computes."""
    if op.attributes.get("cache") and OPS[op.name].stored:
        return True
    computed = [DTYPES[v.type.dtype].bits for v in op.results if not v.type.state and v.type.dtype in DTYPES]
    return any(DTYPES[v.type.dtype].bits < min(computed, default=0) for v in op.results if v.type.state)


def stored_formats(module: Module) -> dict[str, list[str]]:
    """Return the formats that the weights of each function are stored in, at any stage."""
    found = {}
    for function in module.functions:
        names = set()
        for const in function.consts:
            quantized = [str(s.attributes["to"]) for s in steps_of(const.recipe) if s.name in ("quantize", "packed")]
            names.add(quantized[0] if quantized else const.value.type.dtype)
        if names:
            found[function.name] = sorted(names)
    return found


def is_from_codes(module: Module) -> bool:
    """Return whether a weight of a module is quantized in its checkpoint, and none is stored in fewer bits yet."""
    names = {s.name for f in module.functions for c in f.consts for s in steps_of(c.recipe)}
    return "dequantize" in names and not names & {"quantize", "packed"}


def kept_codes(module: Module) -> dict[str, dict[str, list[str]]]:
    """Return for each function the formats that hold the checkpoint's codes, and those that are only near them."""
    found = {}
    for function in module.functions:
        formats: dict[str, set[str]] = {"exact": set(), "near": set()}
        for const in function.consts:
            steps = list(steps_of(const.recipe))
            formats["exact"].update(str(s.attributes["to"]) for s in steps if s.name == "packed")
            if any(s.name == "dequantize" for s in steps):
                formats["near"].update(str(s.attributes["to"]) for s in steps if s.name == "quantize")
        if any(formats.values()):
            found[function.name] = {kind: sorted(names) for kind, names in formats.items() if names}
    return found


def needs_calibration(module: Module) -> bool:
    """Return whether a weight's method wants to know what the weight is multiplied with."""
    return any(method_of(c.recipe) in CALIBRATED for f in module.functions for c in f.consts)
