"""Compiles many kernels in processes of their own: one in which the compiler dies takes only its own kernel with it."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

from ....compiler.errors import MoecError
from .compile import Compiled, Request, compile_request, triton_module
from .kept import keep_kernel, recall_kernel


def compile_all(wanted: Sequence[Request], jobs: int = 1) -> list[Compiled | MoecError]:
    """Compile each request in one of `jobs` processes and return, in order, what it gave.

    Equal ones are compiled once, those that the user's cache has not at all. MoecError where Triton is not installed; what does not compile is returned as one.
    """
    triton_module()
    waiting = list(dict.fromkeys(wanted))[::-1]
    found: dict[Request, Compiled | MoecError] = {}

    def work(_: int) -> None:
        worker = _Worker()
        try:
            while waiting:
                try:
                    one = waiting.pop()
                except IndexError:  # another took the last
                    return
                found[one] = recall_kernel(one) or worker.compile_and_keep(one)
        finally:
            worker.stop()

    with ThreadPoolExecutor(max(1, min(jobs, len(waiting)))) as pool:
        list(pool.map(work, range(jobs)))
    return [found[one] for one in wanted]


class _Worker:
    """A process that compiles what it is sent; a new one is started when it died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._messages: Any = None

    def compile_and_keep(self, wanted: Request) -> Compiled | MoecError:
        made = self.compile(wanted)
        if isinstance(made, Compiled):
            keep_kernel(wanted, made)
        return made

    def compile(self, wanted: Request) -> Compiled | MoecError:
        if self._process is None:
            self._messages = tempfile.TemporaryFile()  # noqa: SIM115 (stop closes it)
            code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve_requests; serve_requests()"
            self._process = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._messages
            )
        assert self._process.stdin and self._process.stdout
        try:
            pickle.dump(wanted, self._process.stdin)
            self._process.stdin.flush()
            return pickle.load(self._process.stdout)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError):
            self._messages.seek(0)
            said = self._messages.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
            self.stop()
            return MoecError(f"the compiler died over {wanted.name} for {wanted.arch}: {said[-1]}", exit_code=1)

    def stop(self) -> None:
        if self._process is not None:
            assert self._process.stdin
            self._process.stdin.close()
            self._process.wait()
            self._messages.close()
            self._process = None


def serve_requests() -> None:
    """Compile what comes in on stdin until it ends; what the compiler itself prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while (wanted := _next_request(sys.stdin.buffer)) is not None:
        try:
            answer: Compiled | MoecError = compile_request(wanted)
        except MoecError as error:
            answer = error
        pickle.dump(answer, answers)
        answers.flush()


def _next_request(stream: BinaryIO) -> Request | None:
    try:
        return pickle.load(stream)
    except EOFError:
        return None
