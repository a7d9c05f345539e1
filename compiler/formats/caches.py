"""In what the keys and values of past tokens can be stored: what `--kv` can be beside auto."""

from __future__ import annotations

BITS = {"f32": 32, "f16": 16, "bf16": 16, "fp8": 8, "int8": 8}  # of a number


def nearest_type(kv: str, known: tuple[str, ...]) -> str:
    """Return which of the types that are known has about as many bits, rather more than fewer."""
    return min(known, key=lambda name: (abs(BITS[name] - BITS[kv]), -BITS[name]))
