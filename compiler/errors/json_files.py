"""Reads JSON from outside: every problem becomes one MoecError that names the file, and values are checked by shape.

A shape is a type (`int`, `str`, ...: true and false are no numbers), a tuple of shapes one of which fits, `[shape]` for a list,
`{key: shape}` for an object whose keys may be followed by others (`"key?"` may be missing), or `{None: shape}` for an
object with any keys.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from . import MoecError

# half of a character beyond 16 bits: without the other half it is no text
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
DIGITS = 40  # of an integer at most: tokenizer_config.json's model_max_length has 31, and no 64-bit number more than 20
Shape = Any


def parse_json(text: str | bytes, file: Path | str, what: str, todo: str = "", **options: Any) -> Any:
    """Return the value of the JSON text of `file`; MoecError names it as `what`. `options` are json.loads'."""
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        found = json.loads(decoded, **{"parse_int": _bounded_integer, **options})
        if _HALF.search(decoded):
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except (ValueError, RecursionError) as error:
        raise MoecError(f"{what} is not JSON: {problem_of(error)}", where=str(file), todo=todo) from None


def no_constant(name: str) -> Any:
    """Refuse NaN and Infinity, which Python reads and JSON does not have: the option `parse_constant` of parse_json."""
    raise ValueError(f"{name} is not JSON")


def no_contradiction(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that stands twice in an object with other values: the option `object_pairs_hook` of parse_json."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise ValueError(f"{key!r} stands in it twice, with the values {found[key]!r:.40} and {value!r:.40}")
        found[key] = value
    return found


def _bounded_integer(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"a number of {len(text)} digits is too long")
    return int(text)


def problem_of(error: ValueError | RecursionError) -> str:
    """Return why a JSON or TOML text cannot be read, in words that need no Python."""
    match error:
        case RecursionError():
            return "it is nested too deeply"
        case UnicodeDecodeError():
            return f"byte {error.start} is not UTF-8"
        case UnicodeEncodeError():
            return "a text in it ends within a character"
        case json.JSONDecodeError():
            return f"{error.msg} (line {error.lineno}, column {error.colno})"
    return str(error)


def read_value(path: Path, what: str = "", **options: Any) -> Any:
    """Return the value of a JSON file; MoecError says what is wrong with it."""
    what = what or path.name
    try:
        text = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else "that is no path"
        raise MoecError(f"{what} cannot be read: {reason}", where=str(path)) from error
    return parse_json(text, path, what, **options)


def read_json(path: Path, **options: Any) -> dict[str, Any]:
    """Return the object that a JSON file holds; MoecError says what is wrong with it."""
    found = read_value(path, **options)
    if not isinstance(found, dict):
        raise MoecError(f"{path.name} is not a JSON object", where=str(path))
    return found


def find_misfit(value: Any, shape: Shape, place: str = "") -> str | None:
    """Return the first place where a value has not the shape, as a text such as `states[0].axis`; None if all fits."""
    match shape:
        case tuple():
            return None if any(find_misfit(value, s, place) is None for s in shape) else place
        case [item]:
            if not isinstance(value, list):
                return place
            return _first_place(find_misfit(v, item, f"{place}[{i}]") for i, v in enumerate(value))
        case dict():
            if not isinstance(value, dict):
                return place
            return _first_place(_misfit_at(value, key, item, place) for key, item in shape.items())
        case None:
            return None if value is None else place
    return None if isinstance(value, shape) and (shape is bool or not isinstance(value, bool)) else place


def _misfit_at(value: dict[str, Any], key: str | None, shape: Shape, place: str) -> str | None:
    if key is None:
        return _first_place(find_misfit(v, shape, _join_place(place, name)) for name, v in value.items())
    name = key.removesuffix("?")
    if name not in value:
        return None if key != name else _join_place(place, name)
    return find_misfit(value[name], shape, _join_place(place, name))


def _join_place(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _first_place(places: Any) -> str | None:
    return next((place for place in places if place is not None), None)
