"""How the weights of a module are stored: in which formats, whether that lost numbers, what is still to be calibrated."""

from __future__ import annotations

from ..ir.module import Module
from ..ir.recipes import steps_of
from ..weights.demote import is_demotion
from ..weights.steps.quantized import method_of
from .options import CALIBRATED


def is_lossy(module: Module) -> bool:
    """Return whether a weight of a module is stored in fewer bits than it has in the checkpoint."""
    steps = [step for f in module.functions for c in f.consts for step in steps_of(c.recipe)]
    return any(step.name == "quantize" or is_demotion(step) for step in steps)


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
