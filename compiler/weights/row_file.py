"""Rows that are kept on disk while a calibration runs: appended, and read again a piece at a time.

Nothing is mapped into memory: what is mapped counts as memory of the process, and a disk that is full then ends it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ..errors import MoecError, write_error
from ..ir.deferred import torch

NAME = "calibration inputs"


class RowFile:
    """Rows bf16[N, K] in a file without a name, which is gone with the object."""

    def __init__(self, folder: Path | None, width: int) -> None:
        """Open a file in a folder (that of temporary files for None); MoecError if that does not work."""
        self.width, self._count = width, 0
        self._place = Path(folder or tempfile.gettempdir()) / NAME
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - as long as the object
        except OSError as error:
            raise write_error(error, self._place) from error

    def __len__(self) -> int:
        return self._count

    def append(self, rows: torch.Tensor) -> None:
        """Write rows f32[N, K] behind those that are there; MoecError when the disk is full or writing fails."""
        left = memoryview(rows.to(torch.bfloat16).contiguous().view(torch.uint8).reshape(-1).numpy().data)
        position = 2 * self.width * self._count
        try:
            while left:
                done = os.pwrite(self._file.fileno(), left, position)
                left, position = left[done:], position + done
        except OSError as error:
            raise write_error(error, self._place) from error
        self._count += len(rows)

    def __getitem__(self, span: slice) -> torch.Tensor:
        """Return the rows bf16[N, K] of a slice without a step."""
        low, high, _ = span.indices(self._count)
        raw = bytearray(2 * self.width * max(0, high - low))
        room, position = memoryview(raw), 2 * self.width * low
        try:
            while room:
                done = os.preadv(self._file.fileno(), [room], position)
                if not done:
                    raise MoecError(f"the {NAME} end early", str(self._place.parent), exit_code=1)
                room, position = room[done:], position + done
        except OSError as error:
            raise MoecError(f"cannot read the {NAME} again: {error.strerror}", str(self._place.parent)) from error
        if not raw:
            return torch.empty(0, self.width, dtype=torch.bfloat16)
        return torch.frombuffer(raw, dtype=torch.bfloat16).reshape(-1, self.width)
