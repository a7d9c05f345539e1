"""Modules that take seconds to import: a package imported when a name of its is first looked up, a function when it is called.

The functions that declare ops compute with torch, but what ops there are, and their types, is asked for without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from operator import attrgetter
from typing import TYPE_CHECKING, Any


@dataclass(frozen=True)
class DeferredFunction:
    """A function of a module that is imported at the first call."""

    module: str
    name: str

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Call it."""
        return attrgetter(self.name)(import_module(self.module))(*args, **options)


class _Deferred:
    """Stands for a package that is not yet imported."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        """Return what the package has under a name."""
        return getattr(import_module(self._name), name)


if TYPE_CHECKING:
    import torch as torch
else:
    torch = _Deferred("torch")
