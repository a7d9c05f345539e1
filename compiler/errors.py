"""The one exception: what, where in the IR, where in the model, what to do."""

from dataclasses import dataclass


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


def caret(line: str, column: int, width: int = 1) -> str:
    """Return `line` with a caret line under `column` (1-based), both behind a bar."""
    return f"|   {line}\n|   {' ' * (column - 1)}{'^' * max(1, width)}"
