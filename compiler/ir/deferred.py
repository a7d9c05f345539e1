"""Packages that take seconds to import, imported when a name of theirs is first looked up.

The functions that declare ops compute with torch, but what ops there are, and their types, is asked for without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any


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
