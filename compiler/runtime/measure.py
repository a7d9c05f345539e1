"""Compares an artifact with its source model, and keeps the figures in moec.json."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MoecError
from ..ir.notes import Note
from .artifact import Artifact, record_figures

if TYPE_CHECKING:
    from .compare import Comparison
    from .compare_calls import CallComparison


def verify(folder: Path | str, against: Any = None, **options: Any) -> Comparison | CallComparison:
    """Compare an artifact with its source model in transformers; options as in `measure`."""
    return measure(folder, against, **options)[0]


def measure(
    folder: Path | str, against: Any = None, accuracy: str | None = None, **options: Any
) -> tuple[Comparison | CallComparison, tuple[Note, ...]]:
    """Compare an artifact with its source model in transformers, and keep what is found in moec.json.

    Options as in runtime.compare.verify; `accuracy` is that of the session (None: as compiled). Where moec.json cannot be
    written that is a note: the figures are found all the same.
    """
    artifact = Artifact.open(Path(folder))
    found = artifact.verify(against=against, accuracy=accuracy, **options)
    measured = {**found.to_dict(), **({"accuracy": accuracy} if accuracy else {})}
    try:
        record_figures(artifact.folder, {"measured": measured})
    except MoecError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        return found, (Note(f"the figures are not kept: {error.what}"),)
    return found, ()
