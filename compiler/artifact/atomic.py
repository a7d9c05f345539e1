"""Write a folder beside its final name and put it in place when it is whole.

A killed compile leaves the old artifact: at no moment does a reader find a part of the new one, or nothing, at the
final name. On Linux the two folders are exchanged by one system call (renameat2 with RENAME_EXCHANGE). Where the
system or the file system cannot do that, the old folder is first moved to `.<name>.old-<pid>-<random>`; a process
killed between the two renames leaves no folder at the final name, and `clean_up_after_killed`, which the next `atomic_folder` calls
and a loader may call, moves the old one back.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import _FULL, MoecError, write_error
from ..weights.journal import has_journal, start_journal

MARK = "moec.json"  # the file that makes a folder an artifact

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def atomic_folder(final: Path, key: str = "", resume: bool = False) -> Iterator[Path]:
    """Yield a new folder beside `final`, which replaces `final` when the block ends without an exception.

    With a `key` it has a journal (weights/journal.py), which ends before the block does. With `resume` the folder of a killed
    run with the same key is yielded instead of a new one, and what an exception leaves is kept for the next run.

    Raises MoecError if `final` is a file or a folder that is neither empty nor an artifact (it is never replaced),
    if the place cannot be written, or if the disk fills up. On any exception the new folder is removed and the old
    one is left as it is. A link at `final` is followed. Files of killed runs at the same name are removed first.
    """
    final = Path(os.path.realpath(final))
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        begun = _begun_folder(final, key) if resume else None
        clean_up_after_killed(final, begun)
        check_replaceable(final)
        partial = _temporary_name(final, "partial")
        if begun is None:
            partial.mkdir()
        else:
            begun.rename(partial)
        if key:
            start_journal(partial, key)
    except OSError as error:
        raise write_error(error, final) from error
    lock = None
    try:
        with suppress(OSError):  # a file system without locks: process ids alone say what is left over
            lock = _lock_folder(partial)
        try:
            yield partial
        except OSError as error:
            if error.errno in (*_FULL, errno.EFBIG):  # other errors may be about files that were read
                raise write_error(error, final) from error
            raise
        _put_in_place_whole(partial, final)
    finally:
        # The new folder after a failure, the old one after an exchange. What cannot be removed (a file in it was
        # made undeletable) must not fail a compile that is done; the next run tries again.
        if not (resume and has_journal(partial, key)):
            shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _begun_folder(final: Path, key: str) -> Path | None:
    """Return the folder that a stopped run with the same key left; None where there is none."""
    return next((path for path in _abandoned_folders(final, "partial") if has_journal(path, key)), None)


def clean_up_after_killed(final: Path, kept: Path | None = None) -> None:
    """Clean up after killed runs: put an old folder back whose replacing was cut short, remove what is left over but for `kept`."""
    final = Path(os.path.realpath(final))
    for kind in ("old", "partial"):
        for path in _abandoned_folders(final, kind):
            if kind == "old" and not os.path.lexists(final):
                path.rename(final)
            elif path != kept:
                shutil.rmtree(path, ignore_errors=True)


def _temporary_name(final: Path, kind: str) -> Path:
    return final.with_name(f".{final.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


def check_replaceable(final: Path) -> None:
    """Raise MoecError for a file, and for a folder that is neither empty nor an artifact."""
    if not os.path.lexists(final):
        return
    if not final.is_dir():
        raise MoecError(f"{final.name} is a file, not a folder", str(final), todo="choose another output folder")
    if not (final / MARK).exists() and any(final.iterdir()):
        what = f"{final.name} is not empty and was not written by moec (it has no {MARK})"
        raise MoecError(what, str(final), todo="choose another output folder, or empty it yourself")


def _abandoned_folders(final: Path, kind: str) -> list[Path]:
    """Return the folders of this name that a process left which does not run any more."""
    pattern = re.compile(re.escape(f".{final.name}.{kind}-") + r"(\d{1,9})-[0-9a-f]{8}")
    found = []
    for path in final.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink() and _is_abandoned(path, int(match[1])):
            found.append(path)
    return sorted(found)


def _is_abandoned(path: Path, pid: int) -> bool:
    """Return whether a folder has no living owner: its process is gone and its lock is free.

    Process ids alone do not say it: in containers they start over, so that an owner may have our own id, or be alive
    in another container that shares the disk.
    """
    if pid != os.getpid():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            pass
        except OSError:
            return False  # another user's process
        else:
            return False
    try:
        lock = _lock_folder(path)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks; a folder of our own id may then be our own
        return pid != os.getpid()
    os.close(lock)
    return True


def _lock_folder(folder: Path) -> int:
    """Return a descriptor that holds the lock of a folder until it is closed; BlockingIOError if it is taken."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _sync_folder(folder: Path) -> None:
    """Flush everything in a folder to the disk: a crash of the machine must not leave a name without its bytes."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in [*files, "."]:
            path = Path(root, name)
            if not path.is_symlink():
                _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _put_in_place_whole(partial: Path, final: Path) -> None:
    try:
        _sync_folder(partial)
        check_replaceable(final)  # again: a long time has gone by
        _put_in_place(partial, final)
        _sync_one(final.parent)
    except OSError as error:
        raise write_error(error, final) from error


def _put_in_place(partial: Path, final: Path) -> None:
    if not os.path.lexists(final):
        partial.rename(final)
    elif not _exchange_folders(partial, final):
        old = _temporary_name(final, "old")
        final.rename(old)
        try:
            partial.rename(final)
        except OSError:
            old.rename(final)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange_folders(first: Path, second: Path) -> bool:
    """Exchange two folders in one step; False where the system or the file system has no such call."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(first))
