"""The `moec` command as the tests run it: in this process, or as a process of its own."""

from __future__ import annotations

import subprocess
import sys

from click.testing import CliRunner, Result
from moec.compiler.cli import commands as cli

MOEC = [sys.executable, "-m", "moec.compiler.cli"]


def invoke(*arguments: object, input: str | None = None) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(cli.main, [str(a) for a in arguments], input=input)


def shell(*arguments: object, **options) -> subprocess.CompletedProcess:
    """Run the command as its own process."""
    return subprocess.run([*MOEC, *map(str, arguments)], capture_output=True, text=True, timeout=120, **options)
