"""Short patterns for many modules: the numbers in names that do not matter become `\\d+`."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of a name


def module_patterns(modules: Mapping[str, Key]) -> dict[Key, list[str]]:
    """Return, for each key, regular expressions (`re:^...$`) that match the modules which have it, and no others of these.

    Modules that differ in numbers alone are one pattern where all have the same key, or one with the first numbers (the
    layers) of a key; where that does not tell them apart, each module is a pattern.
    """
    alike: dict[str, dict[str, Key]] = {}
    for name, key in modules.items():
        alike.setdefault(_NUMBER.sub("#", name), {})[name] = key
    found: dict[Key, list[str]] = {}
    for form, own in sorted(alike.items()):
        for key, pattern in _patterns_of_form(form, own):
            found.setdefault(key, []).append(f"re:^{pattern}$")
    return found


def _patterns_of_form(form: str, own: Mapping[str, Key]) -> list[tuple[Key, str]]:
    text = re.escape(form).replace(r"\#", "#")
    keys = list(dict.fromkeys(own.values()))
    if len(keys) == 1:
        return [(keys[0], text.replace("#", r"\d+"))]
    layers: dict[Key, set[int]] = {key: set() for key in keys}
    for name, key in own.items():
        first = _NUMBER.search(name)
        layers[key].add(int(first[0]) if first else -1)
    if sum(map(len, layers.values())) == len(set.union(*layers.values())):
        return [
            (key, text.replace("#", f"({'|'.join(map(str, sorted(numbers)))})", 1).replace("#", r"\d+"))
            for key, numbers in layers.items()
        ]
    return [(key, re.escape(name)) for name, key in own.items()]
