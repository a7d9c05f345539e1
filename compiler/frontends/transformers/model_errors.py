"""Says what stopped a model's own code: where in the modelling file, and what in the config it stumbled over."""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from ...errors import MoecError

# what a model's code raises while it is built or run; all are errors of this package's user, or of the model
CODE_ERRORS = (
    RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ArithmeticError,
    ImportError, NameError,
)  # fmt: skip

_NEEDS_NUMBERS = re.compile(r"meta tensor|\.item\(\)|[Mm]eta device|data-dependent|GuardOnDataDependent|no data")
_ATTRIBUTE = re.compile(r"'(\w*Config)' object has no attribute '(\w+)'")


def model_error(error: BaseException, model: str, config: Any, doing: str) -> MoecError:
    """Return the MoecError for an exception of model code; `doing` is what could not be done, as in "cannot be built"."""
    steps = _traceback_steps(error)
    at, line = "", ""
    if steps:
        file = steps[0].tb_frame.f_code.co_filename
        at = f"{Path(file).name}:{steps[0].tb_lineno}"
        line = linecache.getline(file, steps[0].tb_lineno).strip()
    read = next((r for step in steps if (r := _describe_settings(step.tb_frame.f_code.co_names, config))), "")
    what, todo = _describe_cause(error, config, at)
    if not todo and read:
        todo = f"it reads {read} of the config"
    return MoecError(
        f"{model} {doing}: {what}",
        excerpt=f"|   {line}" if line else "",
        model=at,
        todo=todo or "--debug shows the whole traceback",
    )


def _traceback_steps(error: BaseException) -> list[TracebackType]:
    """Return the way of an exception through modelling files, or else through transformers, from where it was raised."""
    steps: list[TracebackType] = []
    step = error.__traceback__
    while step is not None:
        steps.insert(0, step)
        step = step.tb_next
    files = [Path(step.tb_frame.f_code.co_filename) for step in steps]
    modelling = [step for step, file in zip(steps, files, strict=True) if file.name.startswith("modeling_")]
    return modelling or [step for step, file in zip(steps, files, strict=True) if "transformers" in file.parts]


def _describe_settings(names: Iterable[str], config: Any) -> str:
    """Return the numbers of a config that a function reads by their own names, as a text."""
    values = config.get_text_config(decoder=True).to_dict() if config is not None else {}
    numbers = ((name, values.get(name)) for name in names)
    found = [f"{name} {value}" for name, value in numbers if isinstance(value, (int, float)) and value is not True]
    return ", ".join(found)


def _describe_cause(error: BaseException, config: Any, at: str) -> tuple[str, str]:
    """Return what stopped the code, and what to do where that is known."""
    text = str(error)
    if found := _ATTRIBUTE.search(text):
        return f"its code reads {found[2]}, which the config does not have", f"add {found[2]} to config.json"
    if isinstance(error, KeyError) and error.args:
        return _describe_missing_key(error.args[0], config)
    if _NEEDS_NUMBERS.search(text):
        return "its code does not run on shapes alone (it looks at the numbers of a tensor)", ""
    unfit = isinstance(error, (RuntimeError, IndexError)) and not isinstance(error, NotImplementedError)
    why = "; sizes in its config do not fit each other" if unfit else ""
    return f"its code stops{f' at {at}' if at else ''}{why}", ""


def _describe_missing_key(key: Any, config: Any) -> tuple[str, str]:
    """Name the key of the config whose value is the missing key, or say that the key is missing."""
    for name, value in _config_leaves(config.to_dict() if config is not None else {}, ""):
        if value == key and isinstance(key, str):
            known = _known_rope_types() if name.endswith(("rope_type", ".type")) else ""
            return f"{name} is {key!r}, which its code does not know", known or f"correct {name}"
    missing = re.search(r"Missing required keys in `(\w+)`.*?\{(.*?)\}", str(key))
    if missing:
        return f"{missing[1]} in the config lacks {missing[2]}", f"add {missing[2]} to {missing[1]}"
    return f"its code looks for {key!r}, which the config does not have", f"add {key!r} to config.json"


def _config_leaves(tree: Any, prefix: str) -> list[tuple[str, Any]]:
    """Return the leaves of a config with their dotted names; `rope_type` before other keys."""
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        found += _config_leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
        if isinstance(value, (list, tuple)):
            found += [(f"{prefix}{key}", item) for item in value]
    return sorted(found, key=lambda item: not item[0].endswith("rope_type"))


def _known_rope_types() -> str:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return f"known: {', '.join(sorted({'default', *ROPE_INIT_FUNCTIONS}))}"
