"""What the options of the pass `quantize` can be, known without a module."""

from __future__ import annotations

import re
from difflib import get_close_matches

from ..errors import MoecError
from ..formats.table import FORMAT_NAMES, GROUPS, NAMED, find_format
from .plan import parse_layers

METHODS = ("rtn", "gptq", "awq")
UNDERSAMPLED = ("rtn", "force")  # what the option `starved` does with experts that saw few tokens
KEEP = ("f32", "none")


def check_options(*, group: int | None, symmetric: bool, method: str, starved: str, layers: str, **policy: str) -> None:
    """Raise MoecError for options that mean nothing, whatever the module is."""
    for spec in policy.values():
        check_spec(spec)
    quantize_attributes(method, starved)
    if group is not None and group not in GROUPS:
        raise MoecError(f"{group} is no group size", todo=f"there are {', '.join(map(str, GROUPS))}")
    parse_layers(layers)


def quantize_attributes(method: str, starved: str) -> dict[str, str]:
    """Return the attributes of the step that quantizes; none for the plain way."""
    if method not in METHODS:
        raise MoecError(f"there is no method {method}", todo=f"there are {', '.join(METHODS)}")
    if starved not in UNDERSAMPLED:
        raise MoecError(f"starved is {starved}", todo=f"there are {', '.join(UNDERSAMPLED)}")
    options = {"method": (method, "rtn"), "starved": (starved, "rtn")}
    return {name: value for name, (value, plain) in options.items() if value != plain} if method != "rtn" else {}


def check_spec(spec: str) -> None:
    """Raise MoecError unless a text names a number of bits, a format, or f32."""
    if spec not in KEEP and not re.fullmatch(r"u?int[248]", spec) and find_format(spec) is None:
        near = [*get_close_matches(spec, FORMAT_NAMES, n=3), *_formats_of_bits(spec)]
        todo = (
            f"did you mean {' or '.join(near)}?"
            if near
            else f"there are f32, int8, int4, int2, {', '.join(f.name for f in NAMED)}, uint4_g64, grid4_g64 ..."
        )
        raise MoecError(f"there is no format {spec}", todo=f"{todo} (moec list formats)")


def _formats_of_bits(spec: str) -> tuple[str, ...]:
    """Return the formats of as many bits as a name has that other tools use: q4, q4_k_m, 4bit, w4a16."""
    found = re.match(r"(?:i?q|w|bnb|int|uint)?-?([2-8])(?:$|[-_ab])", spec.lower())
    by_bits = {"2": ("int2",), "3": ("grid3_g64",), "4": ("int4",), "8": ("int8",)}
    return by_bits.get(found[1], ("int4", "int8")) if found else ()
