"""Puts a fault into the product for the length of a test: some text of a function's source is replaced by other text."""

import __future__

import inspect
import textwrap


def plant_fault(monkeypatch, function, *changes):
    """Give a function or property of the product the code of its source with changes (before, after).

    What is replaced has to be there once, so that a fault is planted or the test fails.
    """
    function = inspect.unwrap(function.fget if isinstance(function, property) else function)
    source = textwrap.dedent(inspect.getsource(function))
    for before, after in changes:
        assert source.count(before) == 1, f"{function.__qualname__} does not have {before!r} once"
        source = source.replace(before, after)
    changed = compile(source, inspect.getfile(function), "exec", __future__.annotations.compiler_flag)
    made = {}
    exec(changed, function.__globals__, made)
    (other,) = made.values()
    other = inspect.unwrap(other.fget if isinstance(other, property) else other)
    monkeypatch.setattr(function, "__code__", other.__code__)
