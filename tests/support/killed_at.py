"""Run the moec command and kill it at its N-th change to the files of a folder: python killed_at.py N FOLDER COMMAND...

Prints the number of changes when the command ends before that. Python announces each change before it is made, so that "at the
N-th" means: the first N - 1 are made. Bytes that lie in a buffer when the process is killed are lost, as they are in life.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def changed_paths(event: str, arguments: tuple) -> list[object]:
    """Return the paths that an event of sys.audit is about to change."""
    if event == "open":
        return [arguments[0]] if (arguments[2] or 0) & WRITES else []
    if event == "ctypes.call_function":  # renameat2, which exchanges two folders
        return [x for x in arguments[1] if isinstance(x, bytes)]
    if event in ("os.remove", "os.rmdir") and arguments[1] >= 0:  # in a folder that is open, as shutil.rmtree does it
        return [Path(f"/proc/self/fd/{arguments[1]}").readlink() / os.fsdecode(arguments[0])]
    return (
        [arguments[0]] if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate") else []
    )


def main() -> None:
    """Count the changes below FOLDER, and kill this process at the N-th."""
    at, folder = int(sys.argv[1]), os.path.realpath(sys.argv[2])
    count = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal count
        for path in changed_paths(event, arguments):
            if isinstance(path, (str, bytes, os.PathLike)) and os.path.realpath(os.fsdecode(path)).startswith(folder):
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    from moec.compiler.cli import main as moec

    try:
        code = moec(sys.argv[3:])
    finally:
        print(count)
    sys.exit(code)


main()
