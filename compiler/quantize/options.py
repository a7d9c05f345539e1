"""What `--quantize` says: from a short text to the pass that stores weights in fewer bits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import MoecError
from ..ir.fragments import parse_pipeline
from ..ir.module import Module
from ..ir.narrow import is_narrowing
from ..ir.quantize_step import method_of
from ..ir.recipes import steps_of
from ..rewrite.pipeline import spell_pass
from ..rewrite.roles import ROLES

PASS, KEEP_PASS = "quantize", "keep-codes"
LAST = ("round-weights", "lower")  # passes that come behind those two: what is stored in few bits is rounded once
KEEP = "keep"  # what --quantize calls the pass keep-codes
CALIBRATED = ("gptq", "awq")  # methods that look at the inputs of a weight


AUTO = "auto"


@dataclass(frozen=True)
class Spec:
    """What `--quantize` says: options of the pass, and where a plan comes from (`auto`, or a file) if there is one."""

    options: Mapping[str, str]
    plan: str | None = None

    @staticmethod
    def parse(text: str) -> Spec:
        """Return what a text says.

        It is a format (`int4`, `int8`: every role but the router in it, with the pass's own choice where int4 would cost
        too much), `auto`, or the file of a plan (`quantization.json`), and options of the pass behind it or alone
        (`experts=int4,head=int8,group=64`, `int4,method=gptq`). MoecError for a text that is none of these.
        """
        words = [word.strip() for word in text.split(",") if word.strip()]
        if not words:
            raise MoecError(
                "--quantize is empty", todo="give a format such as int4, or options such as experts=int4,head=int8"
            )
        options: dict[str, str] = {}
        plan = None
        if "=" not in words[0]:
            first = words.pop(0)
            if first == AUTO or first.endswith(".json"):
                plan = first
            else:
                options = _everything(first)
        for word in words:
            name, equals, value = word.partition("=")
            if not equals or not re.fullmatch(r"[a-z_]+", name):
                raise MoecError(f"{word!r} in --quantize is not option=value", todo="as in int4,head=int8,group=64")
            options[name] = value
        return Spec(options, plan)


def with_quantize(pipeline: str, options: Mapping[str, str]) -> str:
    """Return the pipeline with the pass `quantize` before the lowering."""
    return before_lowering(pipeline, spell_pass(PASS, options))


def with_keep(pipeline: str, options: str = "") -> str:
    """Return the pipeline with the pass `keep-codes` before the lowering.

    `options` are formats of roles, as in `attention=int8`: their weights are quantized where they do not keep codes.
    """
    kept = before_lowering(pipeline, KEEP_PASS)
    if not options:
        return kept
    return with_quantize(kept, {**{role: "f32" for role in ROLES}, **Spec.parse(options).options})


def before_lowering(pipeline: str, spelled: str) -> str:
    """Return the pipeline with a pass before the lowering."""
    steps = [step for step in re.split(r",(?![^{]*})", pipeline) if step.strip()]
    names = [parse_pipeline(step)[0][0] for step in steps]
    place = next((i for i, name in enumerate(names) if name in LAST), len(steps))
    return ",".join([*steps[:place], spelled, *steps[place:]])


def _everything(format: str) -> dict[str, str]:
    """Return the options that put every role but the router in one format; int4 is what the pass does by itself."""
    if format == "int4":
        return {}
    if format == "int2":  # what every token goes through does not stand two bits
        return {"experts": "int2"}
    return {role: format for role in ROLES if role != "router"}


def is_lossy(module: Module) -> bool:
    """Return whether a weight of a module is stored in fewer bits than it has in the checkpoint."""
    steps = [step for f in module.functions for c in f.consts for step in steps_of(c.recipe)]
    return any(step.name == "quantize" or is_narrowing(step) for step in steps)


def precision(module: Module) -> dict[str, list[str]]:
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
