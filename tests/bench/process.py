"""Processes of the benchmark: a command that is timed with its peak memory, and a contender's process that stays alive.

Import nothing large here: a process counts in its peak memory what the one that started it held at that moment.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cost:
    """What a command took, as a whole process: wall-clock seconds, the largest resident memory in bytes, and the
    seconds that its threads computed."""

    seconds: float
    peak_bytes: int
    cpu_seconds: float | None = None


def moec_compile(source: Path, out: Path, options: str) -> list[str | Path]:
    """Return the command `moec compile` of the moec that this python imports."""
    call = "from moec.compiler.cli.commands import main; main(prog_name='moec')"
    return [sys.executable, "-c", call, "compile", source, "-o", out, *options.split()]


def measured(command: Sequence[str | Path], log: Path) -> Cost:
    """Run a command, its output into `log`; SystemExit with the end of the log if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        start = time.perf_counter()
        process = subprocess.Popen([str(c) for c in command], stdout=file, stderr=file, stdin=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)  # the usage of this child alone
        seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\nfailed ({process.returncode}):\n{_tail(log)}")
    return Cost(seconds, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime)


def remembered(command: Sequence[str | Path], log: Path, made: Path) -> Cost:
    """Run a command that makes `made`, unless an earlier run made it; its cost is then the one of that run."""
    note = log.with_suffix(".json")
    if made.exists() and note.is_file():
        return Cost(**json.loads(note.read_text()))
    cost = measured(command, log)
    note.write_text(json.dumps(asdict(cost)))
    return cost


def busy(seconds: float) -> float:
    """Sleep, and return the cores that other processes used meanwhile. Linux only."""
    before, start = _busy_seconds(), time.perf_counter()
    time.sleep(seconds)
    return (_busy_seconds() - before) / (time.perf_counter() - start)


def _busy_seconds() -> float:
    names = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
    ticks = dict(zip(names, map(int, Path("/proc/stat").read_text().split()[1:]), strict=False))
    return sum(ticks[name] for name in names if name not in ("idle", "iowait")) / os.sysconf("SC_CLK_TCK")


class Contender:
    """A process with a loaded model (see worker.serve). It is stopped whenever it is not asked."""

    def __init__(self, command: Sequence[str | Path], log: Path, environment: Mapping[str, str]) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [str(c) for c in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
                env={**os.environ, **environment},
            )  # fmt: skip
        self.facts = self._answer()
        self._stop()

    def ask(self, **request: Any) -> float:
        """Return the seconds that a request took."""
        self.process.send_signal(signal.SIGCONT)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        seconds = self._answer()["seconds"]
        self._stop()
        return float(seconds)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()

    def _stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a contender ended ({self.process.wait()}):\n{_tail(self.log)}")
        return json.loads(line)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])
