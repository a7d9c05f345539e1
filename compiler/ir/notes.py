"""What a pass reports of a place in a program, as `--why` prints it, and what a rewrite returns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..errors import Refuse

if TYPE_CHECKING:
    from .module import Function, Module, Op


@dataclass(frozen=True)
class Note:
    """A reason, and what it is about: a function, an op (its first result) and where that came from in the model.

    A refusal names what was `refused`, and the share of a rule's left side that `matched` (1: all of it, and the guard
    refused). A warning is printed unasked.
    """

    reason: str
    function: str = ""
    loc: tuple[str, ...] = ()
    op: str = ""
    refused: str = ""
    matched: float = 1.0
    warning: bool = False

    def __str__(self) -> str:
        kind, loc = "warning" if self.warning else "note", ", ".join(self.loc)
        if self.refused:
            return f"{kind}: {self.refused} at {self.op} ({loc or f'@{self.function}'}): {self.reason}"
        place = " ".join(part for part in (self.function and f"@{self.function}", loc) if part)
        return ": ".join(part for part in (kind, place, self.reason) if part)


def note_on(function: Function, op: Op, reason: str) -> Note:
    """Return a note on an op."""
    return Note(reason, function.name, op.loc, str(op.results[0]))


def refusal_note(owner: str, function: Function, op: Op, reason: str | Refuse, matched: float = 1.0) -> Note:
    """Return the note on a rule or pass that was not applied at an op; culprits that its reason does not name are appended."""
    if isinstance(reason, Refuse):
        culprits = ", ".join(str(c) for c in reason.culprits if str(c) not in reason.reason)
        reason = reason.reason + (f" ({culprits})" if culprits else "")
    return Note(reason, function.name, op.loc, str(op.results[0]), f"{owner} not applied", matched)


def distinct_notes(notes: Iterable[Note]) -> tuple[Note, ...]:
    """Return the notes, each text once for a function."""
    return tuple({(str(note), note.function): note for note in notes}.values())


class Rewritten(NamedTuple):
    """A module after a rewrite, the same object where nothing changed, and what there is to report."""

    module: Module
    notes: tuple[Note, ...] = ()
