"""What is already written of files in the making, so that a compile that was stopped goes on where it was.

A folder in the making has a folder `.journal`: its key says what is being made, and a file for each file of weights has a
line for each job that is done: where it wrote how many bytes, and their checksum. A job whose bytes are still there as they were
written is not done again.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import write_error

FOLDER, KEY = ".journal", "key"
_LINE = re.compile(r"(\d+)((?: \d+:\d+:\d+)*)\n")
_READ_AT_ONCE = 4 << 20

Write = tuple[int, int, int]  # offset, length, checksum


def journal_key(*parts: str) -> str:
    """Return what tells one compile from others, of texts that say all that its bytes depend on."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part.encode())
    return digest.hexdigest()


def start_journal(folder: Path, key: str) -> None:
    """Make the journal of a folder in the making, or go on with the one that is there."""
    try:
        (folder / FOLDER).mkdir(exist_ok=True)
        (folder / FOLDER / KEY).write_text(key)
    except OSError as error:
        raise write_error(error, folder) from error


def has_journal(folder: Path, key: str) -> bool:
    """Return whether a folder was begun by the same compile."""
    try:
        return (folder / FOLDER / KEY).read_text() == key
    except OSError:
        return False


def end_journal(folder: Path) -> None:
    """Remove the journal: the files are whole."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


class Journal:
    """The journal of one file, by the numbers of its jobs; without a journal nothing is known and nothing is kept."""

    def __init__(self, file: Path) -> None:
        """Read what is known of a file, below a folder with a journal."""
        self._local = threading.local()
        self._descriptor = -1
        self.done: dict[int, list[Write]] = {}
        root = next((p for p in file.parents if (p / FOLDER).is_dir()), None)
        if root is None:
            return
        path = root / FOLDER / file.relative_to(root).as_posix().replace("/", "+")
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            text = path.read_text() if file.exists() else ""
            kept = [m for line in text.splitlines(keepends=True) if (m := _LINE.fullmatch(line))]
            self.done = {int(m[1]): [_read_write(w) for w in m[2].split()] for m in kept}
            os.ftruncate(self._descriptor, 0)  # a line that was cut short is gone, the others are written again
            for number, writes in self.done.items():
                self._append(number, writes)
        except OSError as error:
            raise write_error(error, path) from error

    @property
    def begun(self) -> bool:
        """Whether something of the file is written already."""
        return bool(self.done)

    def run_job(self, number: int, job: Callable[[], None], descriptor: int) -> int:
        """Do a job unless its bytes are in the file already; return how many bytes were there."""
        if number in self.done and all(_is_there(descriptor, write) for write in self.done[number]):
            return sum(length for _, length, _ in self.done[number])
        self._local.writes = []
        job()
        if self._descriptor >= 0:
            self._append(number, self._local.writes)
        return 0

    def note_write(self, offset: int, chunk: memoryview) -> None:
        """Remember what the job of this thread has written."""
        if self._descriptor >= 0 and (writes := getattr(self._local, "writes", None)) is not None:
            writes.append((offset, chunk.nbytes, zlib.crc32(chunk)))

    def close(self) -> None:
        """Close the journal."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _append(self, number: int, writes: list[Write]) -> None:
        line = f"{number}{''.join(f' {a}:{b}:{c}' for a, b, c in writes)}\n"
        os.write(self._descriptor, line.encode())


def _read_write(text: str) -> Write:
    offset, length, checksum = map(int, text.split(":"))
    return offset, length, checksum


def _is_there(descriptor: int, write: Write) -> bool:
    """Return whether a file holds the bytes that were written."""
    offset, length, checksum = write
    found = 0
    for chunk in _chunks(descriptor, offset, length):
        found = zlib.crc32(chunk, found)
        length -= len(chunk)
    return length == 0 and found == checksum


def _chunks(descriptor: int, offset: int, length: int) -> Iterator[bytes]:
    while length > 0:
        chunk = os.pread(descriptor, min(_READ_AT_ONCE, length), offset)
        if not chunk:
            return
        yield chunk
        offset, length = offset + len(chunk), length - len(chunk)
