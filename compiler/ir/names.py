"""Free names for what is added to a program."""

from __future__ import annotations

from collections.abc import Iterable


class Names:
    """The names that are taken; free ones are `base`, `base.1`, `base.2`, ... (or with another mark than the dot)."""

    def __init__(self, taken: Iterable[str] = (), mark: str = ".") -> None:
        """Start with the names that are taken."""
        self._next = dict.fromkeys(taken, 1)
        self._mark = mark

    def fresh(self, base: str) -> str:
        """Return a free name and take it."""
        name = base
        while name in self._next:
            name = f"{base}{self._mark}{self._next[base]}"
            self._next[base] += 1
        self._next[name] = 1
        return name
