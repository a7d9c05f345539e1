"""The types of values (a dtype and a shape over named dims), and the attributes of ops and weight steps."""

from __future__ import annotations

import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, TypeAlias

import sympy

from ..errors import MoecError
from ..formats.table import find_format
from .activation import Activation
from .dims import Size, size, size_text
from .dtypes import DTYPES

Attr: TypeAlias = int | float | bool | str | Size | Activation | tuple["Attr", ...]


class Attrs(dict[str, Attr]):
    """Attributes by name, and each of them as what it has to be: KeyError if it is missing, ValueError if it is not that."""

    def integer(self, name: str, default: int | None = None) -> int:
        """Return an integer."""
        value = self[name] if default is None else self.get(name, default)
        if not isinstance(value, int):
            raise ValueError(f"{name} is an integer, not {value}")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """Return a list of integers."""
        value = self[name]
        found = tuple(v for v in value if isinstance(v, int)) if isinstance(value, tuple) else None
        if found is None or found != value:
            raise ValueError(f"{name} is a list of integers, not {value}")
        return found

    def number(self, name: str, default: float | None = None) -> int | float:
        """Return a number; an integer as one."""
        value = self[name] if default is None else self.get(name, default)
        if not isinstance(value, (int, float)):
            raise ValueError(f"{name} is a number, not {value}")
        return value

    def flag(self, name: str, default: bool | None = None) -> bool:
        """Return a truth value."""
        value = self[name] if default is None else self.get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{name} is true or false, not {value}")
        return value

    def size(self, name: str) -> Size:
        """Return a size: a number or an expression over dims."""
        value = self[name]
        if isinstance(value, (str, tuple, Activation)):
            raise ValueError(f"{name} is a size, not {value}")
        return size(value)

    def activation(self, name: str) -> Activation:
        """Return an activation."""
        value = self[name]
        if not isinstance(value, Activation):
            raise ValueError(f"{name} is an activation, not {value}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """Return a word."""
        value = self[name] if default is None else self.get(name, default)
        if not isinstance(value, str):
            raise ValueError(f"{name} is a word, not {value}")
        return value


def attr_key(value: Attr) -> Any:
    """Return what tells attributes apart in a program: 0.0 and -0.0, 1 and 1.0 and true, and NaNs bit by bit.

    Python has the first three equal in pairs, and a NaN equal to nothing.
    """
    match value:
        case bool() | float():  # as bytes, which no attribute is
            return struct.pack("?" if isinstance(value, bool) else ">d", value)
        case tuple():
            return tuple(map(attr_key, value))
        case Activation():
            return Activation, *map(attr_key, vars(value).values())
    return value


class Keyed(ABC):
    """Something whose equality and hash are those of its key."""

    @property
    @abstractmethod
    def key(self) -> Any:
        """The key of equality and hash; best a cached property."""

    def __eq__(self, other: object) -> bool:
        """Return whether the other one is of the same class and has the same key."""
        return self is other or (type(self) is type(other) and self.key == other.key)

    def __hash__(self) -> int:
        """Return the hash of the key."""
        return hash(self.key)


@dataclass(frozen=True)
class TensorType:
    """`dtype[sizes]`; `state` marks a KV cache or another tensor that lives from one step to the next."""

    dtype: str
    shape: tuple[Size, ...]
    state: bool = False

    @staticmethod
    def of(dtype: str, *shape: int | Size, state: bool = False) -> TensorType:
        """Return a type from ints and expressions."""
        return TensorType(dtype, tuple(size(s) for s in shape), state)

    def __str__(self) -> str:
        prefix = "state " if self.state else ""
        return f"{prefix}{self.dtype}[{', '.join(size_text(s) for s in self.shape)}]"

    @cached_property
    def elements(self) -> Size:
        """The number of elements."""
        return sympy.Mul(*self.shape)

    @property
    def bits(self) -> int | Fraction:
        """Bits of one element as stored; of a quantized one with its share of scales and zero points."""
        found = find_format(self.dtype)
        return found.bits_per_weight if found else DTYPES[self.dtype].bits

    @property
    def bytes(self) -> Size:
        """Bytes of the whole tensor as stored."""
        return self.elements * self.bits / 8

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape as ints; only for types without dims (weights)."""
        return tuple(int(s) for s in self.shape)

    @property
    def plain(self) -> TensorType:
        """The same type without the state mark."""
        return replace(self, state=False) if self.state else self


def make_attrs(attributes: Mapping[str, Attr]) -> tuple[tuple[str, Attr], ...]:
    """Return attributes in canonical form: sorted, sequences as tuples, integer expressions as ints."""
    return tuple(sorted((name, _canonical_attribute(value)) for name, value in attributes.items()))


def _canonical_attribute(value: Attr | list) -> Attr:
    if isinstance(value, (list, tuple)):
        return tuple(_canonical_attribute(v) for v in value)
    if isinstance(value, sympy.Expr):
        expanded = sympy.expand(value)
        return int(expanded) if expanded.is_Integer else expanded
    return value


LONGEST_RANGE = 65536  # a{0..65535}: more is a slip of the pen, or an attack
_DIGITS = 9  # of a number in a range of names
_HOLE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def expand_range(name: str) -> list[str]:
    """Return the names that `a.{0..3}.b` stands for; a name without a range stands for itself."""
    return [range_at(name, i) for i in range(range_size(name))]


def range_size(name: str) -> int:
    """Return how many names a name with a range stands for (1 without one); MoecError for more than LONGEST_RANGE."""
    found = _HOLE.search(name)
    if found is None:
        return 1
    if max(map(len, found.groups())) > _DIGITS or int(found[2]) - int(found[1]) >= LONGEST_RANGE:
        raise MoecError(f"the range {found[0]:.60} in a name is longer than {LONGEST_RANGE}", f"{name:.120}")
    return max(0, int(found[2]) - int(found[1]) + 1)


def range_at(name: str, index: int) -> str:
    """Return one of the names that a name with a range stands for; itself without one."""
    found = _HOLE.search(name)
    return f"{name[: found.start()]}{int(found[1]) + index}{name[found.end() :]}" if found else name
