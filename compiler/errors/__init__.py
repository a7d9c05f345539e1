"""The one exception: what, where in the IR, where in the model, what to do."""

import errno
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass
class MoecError(Exception):
    """A problem to show to the user as one message.

    `what` states the problem in one line. `where` is a place in a file or in the IR (`file:line:column` or
    a value), `excerpt` the offending line with a caret, `model` the place in the source model
    (`model.layers.3.mlp`), `todo` what would help. `exit_code` is 2 for wrong use or bad input and 1 for a
    check that failed.
    """

    what: str
    where: str = ""
    excerpt: str = ""
    model: str = ""
    todo: str = ""
    exit_code: int = 2

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  at {self.where}")
        lines += [f"  {line}" for line in self.excerpt.splitlines()]
        if self.model:
            lines.append(f"  from {self.model}")
        if self.todo:
            lines.append(f"  {self.todo}")
        return "\n".join(lines)


class Refuse(Exception):
    """Raised by a rule's guard: why the rule does not apply here, and the values that are in the way."""

    def __init__(self, reason: str, *culprits: object) -> None:
        super().__init__(reason)
        self.reason = reason
        self.culprits = culprits


def caret_line(line: str, column: int, width: int = 1) -> str:
    """Return `line` with a caret line under `column` (1-based), both behind a bar."""
    return f"|   {line}\n|   {' ' * (column - 1)}{'^' * max(1, width)}"


_FULL = {errno.ENOSPC, errno.EDQUOT}


def write_error(error: OSError, path: Path) -> MoecError:
    """Return the one message for a failed write to `path`."""
    if error.errno in _FULL:
        todo = f"free some space, or write to another disk (free there: {_free_space(path)})"
        return MoecError(f"no space left on the device while writing {path.name}", str(path), todo=todo)
    if error.errno == errno.EFBIG:
        todo = "raise the limit on file sizes (ulimit -f), or write to a file system that allows larger files"
        return MoecError(f"{path.name} grew larger than a file may be here", str(path), todo=todo)
    return MoecError(f"cannot write {path.name}: {error.strerror}", str(path), todo="choose another place to write to")


def _free_space(path: Path) -> str:
    with suppress(OSError):
        return f"{shutil.disk_usage(path.parent).free / 1e9:.1f} GB"
    return "unknown"
