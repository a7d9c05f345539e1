"""What `--quantize`, `--budget` and `--calibration` ask for, judged before the source is imported; and the passes for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..artifact.ahead import check_text
from ..errors import MoecError
from ..ir.pipelines import LOWER, PassCall, Pipeline, put_before
from .options import CALIBRATED, ROLES
from .plan import KEEP as PLAIN
from .plan import Budget, Plan, read_plan

if TYPE_CHECKING:
    from ..ir.module import Module

PASS, KEEP_PASS = "quantize", "keep-codes"
AFTER = ("round-weights", LOWER)  # passes that follow those two: what is stored in few bits is rounded once
KEEP, AUTO = "keep", "auto"  # the pass keep-codes, and a plan that is made under a budget, as --quantize names them


@dataclass(frozen=True)
class Request:
    """What is to be stored in fewer bits.

    `keep` says whether the pass keep-codes runs (None: if the checkpoint is quantized), `options` are those of the pass
    quantize (None: it does not run). Formats of single layers are those of `plan`, or of one that is made under `budget`.
    """

    keep: bool | None = None
    options: Mapping[str, str] | None = None
    plan: Plan | None = None
    budget: Budget | None = None

    @property
    def method(self) -> str:
        """The method that weights are quantized with."""
        return (self.options or {}).get("method", self.plan.method if self.plan else "rtn")

    @property
    def calls(self) -> Pipeline:
        """The pass quantize with the options that are known without a module."""
        return () if self.options is None else (PassCall(PASS, self.options),)


UNASKED, NOTHING = Request(), Request(keep=False)


def read_request(
    quantize: str | None, budget: str | None = None, calibration: Path | str | None = None, unasked: Request = UNASKED
) -> Request:
    """Return what is asked for; MoecError for what means nothing, or lacks its budget or its calibration text.

    `quantize` is a format (`int4`, `int8`: every role but the router in it, with the pass's own choice where int4 would
    cost too much), `auto`, the file of a plan (`quantization.json`) or `keep`, and options of the pass behind it or alone
    (`experts=int4,head=int8,group=64`, `int4,method=gptq`), or None, which means `unasked`. Behind `keep` these are formats of roles, as in
    `keep,attention=int8`: their weights are quantized where they do not keep codes.
    """
    words = None if quantize is None else [word.strip() for word in quantize.split(",") if word.strip()]
    automatic = words is not None and words[:1] == [AUTO]
    if (budget is not None) != automatic:
        if budget is not None:
            raise MoecError("a budget is for --quantize auto", todo="leave it out, or write --quantize auto")
        todo = "add --budget 4.5bpw (bits per weight) or --budget 6GB"
        raise MoecError("--quantize auto needs a budget", todo=todo)
    request = unasked if words is None else _read_words(words, budget)
    if calibration is not None:
        check_text(Path(calibration))
    elif request.method in CALIBRATED:
        why = "the method looks at what weights are multiplied with"
        raise MoecError(f"there is no calibration text: {why}", todo="name a text file: --calibration FILE")
    return request


def _read_words(words: Sequence[str], budget: str | None) -> Request:
    match words:
        case []:
            todo = "give a format such as int4, or options such as experts=int4,head=int8"
            raise MoecError("--quantize is empty", todo=todo)
        case [word] if word == KEEP:
            return Request(keep=True)
        case [word, *rest] if word == KEEP:
            return Request(True, {**dict.fromkeys(ROLES, PLAIN), **_parse_options(rest)})
        case [word, *rest] if word == AUTO and budget is not None:
            return Request(False, _parse_options(rest), budget=Budget.parse(budget))
        case [word, *rest] if word.endswith(".json") and "=" not in word:
            return Request(False, _parse_options(rest), plan=read_plan(Path(word)))
    return Request(False, _parse_options(words))


def _parse_options(words: Sequence[str]) -> dict[str, str]:
    """Return options of the pass quantize; the first word may be a format."""
    named = bool(words) and "=" not in words[0]
    options = _options_of_format(words[0]) if named else {}
    for word in words[named:]:
        name, equals, value = word.partition("=")
        if not equals or not re.fullmatch(r"[a-z_]+", name):
            raise MoecError(f"{word!r} in --quantize is not option=value", todo="as in int4,head=int8,group=64")
        options[name] = value
    return options


def _options_of_format(format: str) -> dict[str, str]:
    """Return the options that put every role but the router in one format; int4 is what the pass does by itself."""
    if format == "int4":
        return {}
    if format == "int2":  # what every token goes through does not stand two bits
        return {"experts": "int2"}
    return {role: format for role in ROLES if role != "router"}


def with_quantization(
    pipeline: Pipeline, request: Request, module: Module, make_plan: Callable[[Budget, str], Plan] | None = None
) -> tuple[Pipeline, Plan | None]:
    """Return a pipeline with the passes that a request asks for before the lowering, and the plan of formats if there is one.

    `make_plan` makes the plan of a request with a budget, for a method.
    """
    from .stored import is_from_codes

    keep = is_from_codes(module) if request.keep is None else request.keep
    kept = (PassCall(KEEP_PASS),) if keep else ()
    if request.options is None:
        return put_before(pipeline, AFTER, *kept), None
    plan = make_plan(request.budget, request.method) if request.budget and make_plan else request.plan
    planned = {} if plan is None else {"layers": plan.layers(), "method": plan.method}
    return put_before(pipeline, AFTER, *kept, PassCall(PASS, {**planned, **request.options})), plan
