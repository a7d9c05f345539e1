"""What the schema of profiles says against a file, as one message for the user."""

from __future__ import annotations

import json
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from .families import FAMILIES, family_names

SCHEMA = Path(__file__).parent / "profile.schema.json"
_TYPES = {
    "number": "a number", "integer": "a whole number", "string": "a text", "object": "a table", "array": "a list",
}  # fmt: skip


@cache
def _schema_validator(families: tuple[str, ...]) -> Any:
    from jsonschema import Draft202012Validator

    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    schema["properties"]["family"]["enum"] = families
    return Draft202012Validator(schema)


def problem_of(tables: dict[str, Any]) -> tuple[str, str] | None:
    """Return what is wrong with a profile's tables, with the key in front, and what to do; None if nothing is.

    Of several problems a misspelt key comes first: it is often why another one is missing.
    """
    own = tables.get("family") in FAMILIES  # looking for those of packages takes time
    families = tuple(FAMILIES if own else family_names())
    errors = sorted(
        _schema_validator(families).iter_errors(tables), key=lambda e: (not _is_misspelt(e), len(e.absolute_path))
    )
    return _error_message(errors[0]) if errors else None


def _is_misspelt(error: Any) -> bool:
    return error.validator == "additionalProperties" or "propertyNames" in error.absolute_schema_path


def _error_message(error: Any) -> tuple[str, str]:
    key = ".".join(map(str, error.absolute_path)).removesuffix(".value")
    inside = f"{key}." if key else ""
    given, wanted = error.instance, error.validator_value
    match error.validator:
        case "additionalProperties":
            known = list(error.schema["properties"])
            name = next(name for name in given if name not in known)
            return f"{inside}{name} is no key of a profile", _similar_names(name, known)
        case "required":
            return f"{inside}{next(name for name in wanted if name not in given)} is missing", ""
        case "dependentRequired":
            missing = next(name for key, names in wanted.items() if key in given for name in names if name not in given)
            return f"{inside}{missing} is missing", ""
        case "enum":
            if "propertyNames" in error.absolute_schema_path:
                return f"{inside}{given} is no key of a profile", _similar_names(str(given), wanted)
            return f"{key} cannot be {_json_text(given)}", _similar_names(str(given), wanted)
        case "type":
            types = [wanted] if isinstance(wanted, str) else wanted
            return f"{key} must be {' or '.join(_TYPES[name] for name in types)}, not {_json_text(given)}", ""
        case "minimum" | "exclusiveMinimum":
            least = "at least" if error.validator == "minimum" else "greater than"
            return f"{key} must be {least} {wanted}, not {_json_text(given)}", ""
    return f"{key}: {error.message}", ""


def _json_text(value: Any) -> str:
    return json.dumps(value, default=str)


def _similar_names(name: str, known: list[str]) -> str:
    found = get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(found)}?" if found else f"there are {', '.join(known)}"
