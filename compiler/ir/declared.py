"""The declared ops by name. The IR asks them for the names of operands; `compiler/ops` declares them.

A dialect that a package outside of moec brings is imported when the first op of it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any, Protocol, TypeVar

from ..errors.plugins import OPS as BROUGHT
from ..errors.plugins import broken_package, entry_points_of, load_brought, refuse_names
from .types import Attr


class Declared(Protocol):
    """What the IR asks of a declaration."""

    @property
    def places(self) -> Mapping[str, int]:
        """The place of each operand by its name."""

    def complete(self, attributes: Mapping[str, Attr]) -> Mapping[str, Attr]:
        """Return the attributes with defaults for those that are left out."""

    def operand_name(self, place: int) -> str:
        """Return the name of the operand at a place."""


D = TypeVar("D", bound=Declared)


class Ops(dict[str, D]):
    """Declarations of ops by name."""

    def __init__(self) -> None:
        """Start with none."""
        super().__init__()
        self.imported: set[str] = set()

    def __missing__(self, name: str) -> D:
        """Return an op of a package; KeyError if none brings it."""
        if not self.bring(name.partition(".")[0]) or not super().__contains__(name):
            raise KeyError(name)
        return self[name]

    def __contains__(self, name: object) -> bool:
        """Return whether there is an op of this name, in a package too."""
        there = super().__contains__
        return there(name) or (self.bring(str(name).partition(".")[0]) and there(name))

    def bring(self, dialect: str) -> bool:
        """Import a dialect from the package that brings it, if one does and it is not here yet; return whether it was."""
        if dialect in self.imported or dialect not in entry_points_of(BROUGHT):
            return False
        refuse_names(BROUGHT, {known.partition(".")[0] for known in self} - self.imported)
        load_brought(BROUGHT, dialect, ModuleType, "a module")
        self.imported.add(dialect)
        if not any(known.startswith(f"{dialect}.") for known in self):
            raise broken_package(entry_points_of(BROUGHT)[dialect], f"declares no op {dialect}.*")
        return True

    def bring_all(self) -> None:
        """Import every dialect that a package brings."""
        for dialect in entry_points_of(BROUGHT):
            self.bring(dialect)


DECLARED: Ops[Any] = Ops()
