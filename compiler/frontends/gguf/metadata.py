"""Typed access to the metadata of a GGUF file, and which of its keys can change a model's numbers.

A key under the architecture's prefix is read, or known to leave the numbers alone, or has the value that the
architecture computes with anyway, or is an error that names it. What llama.cpp does with each key, and the value that it
takes for one that is not there, is in its llama-model.cpp and src/models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import MoecError
from ...weights.sources.gguf import LongArray

MOST = 1 << 31  # no size of a model is larger

# keys that no model of the architectures here can follow -> the values that leave its numbers as they are
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "expert_weights_scale": (0.0, 1.0), "expert_gating_func": (0, 1), "expert_group_count": (0, 1),
    "leading_dense_block_count": (0,), "nextn_predict_layers": (0,), "interleave_moe_layer_step": (0, 1),
    "moe_every_n_layers": (0, 1), "attention.causal": (True,), "attention.max_alibi_bias": (0.0,),
    "attention.clamp_kqv": (0.0,), "attn_logit_softcapping": (0.0,), "router_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,), "logit_scale": (0.0, 1.0), "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0), "use_parallel_residual": (False,), "pooling_type": (0,),
    "rope.scaling.yarn_log_multiplier": (0.0,), "attention.scale": (0.0,),
    "tensor_data_layout": ("reference", "Meta AI original pth"),
}  # fmt: skip
_HARMLESS = frozenset({"rope.scaling.finetuned", "expert_group_used_count"})
_KINDS = {bool: "a truth value", int: "an integer", float: "a number", str: "a text", tuple: "a list"}


@dataclass(frozen=True)
class Keys:
    """The keys of one architecture: `values` without the prefix. `read` collects those that somebody asked for."""

    architecture: str
    values: Mapping[str, Any]
    file: Path
    read: set[str] = field(default_factory=set)

    @staticmethod
    def of(metadata: Mapping[str, Any], architecture: str, file: Path) -> Keys:
        """Return the keys under the architecture's prefix."""
        prefix = f"{architecture}."
        return Keys(
            architecture, {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}, file
        )

    def __contains__(self, key: object) -> bool:
        return key in self.values

    def count(self, key: str, least: int = 1, default: int | None = None) -> int | None:
        """Return an integer from `least` on. A list with one number for every block has to repeat one number."""
        value = self._value(key)
        if value is None:
            return default
        if isinstance(value, tuple) and value and all(_is_integer(v) for v in value):
            self.check(len(set(value)) == 1, key, "differs from block to block, which is not supported")
            value = value[0]
        if not _is_integer(value):
            self._wrong_kind(key, value, "an integer")
        self.check(least <= value < MOST, key, f"is {value}; it has to be {least} or more, and below {MOST}")
        return int(value)

    def real(self, key: str, default: float | None = None) -> float | None:
        """Return a positive number that is finite."""
        value = self._value(key)
        if value is None:
            return default
        if not (_is_integer(value) or isinstance(value, float)):
            self._wrong_kind(key, value, "a number")
        self.check(math.isfinite(value) and value > 0, key, f"is {value}; it has to be a finite number above 0")
        return float(value)

    def flag(self, key: str) -> bool | None:
        """Return a truth value."""
        value = self._value(key)
        if value is not None and not isinstance(value, bool):
            self._wrong_kind(key, value, "a truth value")
        return value

    def text(self, key: str, default: str) -> str:
        """Return a text."""
        value = self._value(key)
        if value is not None and not isinstance(value, str):
            self._wrong_kind(key, value, "a text")
        return default if value is None else str(value)

    def full(self, key: str) -> str:
        """Return a key with its prefix."""
        return f"{self.architecture}.{key}"

    def check(self, holds: bool, key: str, what: str) -> None:
        """Raise MoecError that names the key unless it holds."""
        if not holds:
            raise self.error(key, what)

    def error(self, key: str, what: str, todo: str = "") -> MoecError:
        """Return the error that says of a key what is wrong with it."""
        todo = todo or "convert the model again, or give the safetensors checkpoint"
        return MoecError(f"{self.full(key)} {what}", where=str(self.file), todo=todo)

    def require_neutral(self) -> None:
        """Raise MoecError for a key that asks for what models of this architecture do not compute."""
        for key, neutral in _NEUTRAL.items():
            value = self.values.get(key)
            self.read.add(key)
            if value is not None and not _equals_one_of(value, neutral):
                raise self.error(
                    key,
                    f"is {value!r:.60}, which models of this architecture do not compute: only {_join_with_or(neutral)}",
                )

    def require_known(self) -> None:
        """Raise MoecError for the first key that nothing has read and that is not known to be harmless."""
        unknown = sorted(self.values.keys() - self.read - _HARMLESS)
        if unknown:
            more = f", nor are {len(unknown) - 1} more" if unknown[1:] else ""
            raise self.error(
                unknown[0],
                f"is not understood{more}, and may change the model's numbers",
                todo="put config.json beside the file, which then says what the model computes, or give the "
                "safetensors checkpoint",
            )

    def _value(self, key: str) -> Any:
        self.read.add(key)
        return self.values.get(key)

    def _wrong_kind(self, key: str, value: Any, wanted: str) -> None:
        found = "a list" if isinstance(value, LongArray) else _KINDS.get(type(value), type(value).__name__)
        raise self.error(key, f"is {found}, not {wanted}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _equals_one_of(value: Any, neutral: tuple[Any, ...]) -> bool:
    if isinstance(value, tuple):
        return bool(value) and all(_equals_one_of(v, neutral) for v in value)
    return isinstance(value, bool) == isinstance(neutral[0], bool) and value in neutral


def _join_with_or(values: tuple[Any, ...]) -> str:
    return " or ".join(str(v) for v in values)
