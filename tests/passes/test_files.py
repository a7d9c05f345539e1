"""Runs the file tests in tests/files.

A file is a module under the command that it tests, and either `# ---- expect` with the module that must come out,
or comments behind the lines that they are about: `# error: TEXT` (the command fails with it, there) and
`# note: TEXT` (what `--why` says). Names of intermediate values may differ. Both modules are also run on random
inputs. `pytest --update` writes the expected module anew, but only if the numbers agree.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from moec.compiler.check.compare import compare_function
from moec.compiler.check.rounding import compare_rounded
from moec.compiler.driver import passes_for
from moec.compiler.errors import MoecError
from moec.compiler.ir.module import Const, Function, Module, Op, Value
from moec.compiler.ir.pipelines import Pipeline, parse_pipeline
from moec.compiler.rewrite.pipeline import TOLERANCE, run_pipeline
from moec.compiler.text.parser import parse_module
from moec.compiler.text.printer import print_module
from moec.passes import PASSES
from moec.targets import Target, declare_kernel_ops, open_target
from places import FILES

FILES = sorted(FILES.glob("*.moir"))
SEPARATOR = "# ---- expect\n"
COMMENT = re.compile(r"# (error|note): (.*)$")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file(path: Path, request: pytest.FixtureRequest):
    """Run the file's command and compare with what the file says."""
    text = path.read_text("utf-8")
    before, separator, expected = text.partition(SEPARATOR)
    comments = [(n, *m.groups()) for n, line in enumerate(before.splitlines(), 1) if (m := COMMENT.search(line))]
    assert separator or comments, f"{path.name} says neither what comes out nor what goes wrong"
    try:
        passes, target = command(before)
        if target is not None:
            declare_kernel_ops(target)
        table = PASSES if target is None else passes_for(target)
        module = parse_module(before, str(path))
        run = run_pipeline(module, passes, target=target, table=table, check=True)
    except MoecError as error:
        check_error(error, comments)
        return
    result, notes = run.module, [str(note) for note in run.notes]
    assert not [text for _, kind, text in comments if kind == "error"], "the command did not fail"
    for _, _, wanted in comments:
        assert f"note: {wanted}" in notes, "\n".join(notes)
    if separator:
        compare = compare_rounded if any(table[call.name].rounds for call in passes) else compare_programs
        compare(module, result, TOLERANCE)
        check_expected(path, before, expected, module, result, compare, request.config.getoption("--update"))


def command(text: str) -> tuple[Pipeline, Target | None]:
    """Return the passes of the first line, `# moec opt -p 'a,b{x=1}'`, and the target that `--target NAME` says."""
    words = shlex.split(text.splitlines()[0].removeprefix("#"))
    assert words[:3] == ["moec", "opt", "-p"] and len(words) in (4, 6), "the first line is `# moec opt -p PIPELINE`"
    if len(words) == 4:
        return parse_pipeline(words[3]), None
    assert words[4] == "--target"
    return parse_pipeline(words[3]), open_target(words[5], {})


def compare_programs(before: Module, after: Module, tolerance: float) -> None:
    """Hold the numbers of two programs against each other."""
    compare_function(before, after, "main", {}, tolerance)


def check_error(error: MoecError, comments: list) -> None:
    """Hold an error against the comments: its text, and its line where it names one."""
    wanted = [(line, text) for line, kind, text in comments if kind == "error"]
    if not wanted:
        raise error
    line, text = wanted[0]
    assert text in str(error)
    place = re.search(r"\.moir:(\d+):", error.where)
    assert place is None or int(place[1]) == line, f"the error is at {error.where}, not on line {line}"


def check_expected(
    path: Path, before: str, expected: str, module: Module, result: Module, compare: Callable, update: bool
) -> None:
    """Compare the structure and the numbers with the expected module, or write it."""
    actual = print_module(result)
    if update and actual != expected:
        path.write_text(before + SEPARATOR + actual, "utf-8")
        return
    wanted = parse_module(expected, f"{path} (expected)")
    compare(module, wanted, TOLERANCE)
    if canonical(wanted) != canonical(result):
        lines = difflib.unified_diff(expected.splitlines(), actual.splitlines(), "expected", "actual", lineterm="")
        pytest.fail("\n".join(lines), pytrace=False)


def canonical(module: Module) -> Module:
    """Return the module with weights and intermediate values numbered in order."""
    return replace(module, functions=tuple(map(_numbered, module.functions)))


def _numbered(function: Function) -> Function:
    values = [c.value for c in function.consts] + [v for op in function.ops for v in op.results]
    fixed = {v.name for v in function.results} if function.name == "main" else set()
    names = {v.name: f"numbered.{i}" for i, v in enumerate(values) if v.name not in fixed}

    def named(value: Value) -> Value:
        return replace(value, name=names.get(value.name, value.name))

    def renamed(op: Op) -> Op:
        return replace(op, operands=tuple(v and named(v) for v in op.operands), results=tuple(map(named, op.results)))

    return replace(
        function,
        consts=tuple(Const(named(c.value), c.recipe) for c in function.consts),
        ops=tuple(map(renamed, function.ops)),
        results=tuple(map(named, function.results)),
    )
