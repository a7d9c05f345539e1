"""What `--quantize` says: from a short text to the pass that stores weights in fewer bits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import MoecError
from ..ir.pipelines import parse_pipeline
from ..rewrite.declare import spell_pass

ROLES = ("experts", "attention", "shared", "dense", "router", "embedding", "head")  # of weights: see rewrite/roles.py
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
