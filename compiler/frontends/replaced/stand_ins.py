"""What stands in the place of transformers' code, and whether that code is what it was checked against.

A stand-in says in ops what a function of a modelling file says in loops. It is right for the source that its numbers
were compared with; checked_sources.py has the hashes of those. A source counts without its comments, docstrings and
layout, together with the functions of its file and the methods of its class that it calls.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from ...ir.notes import Note
from .checked_sources import CHECKED

UNREADABLE = "unreadable"  # in place of a hash, where Python has no source of a function


@dataclass(frozen=True)
class StandIn:
    """One function of moec in the place of code of transformers; `source` is the hash of that code."""

    name: str
    replaces: str
    source: str
    checked: bool
    known: bool  # whether any source of that name was ever checked

    def note(self) -> Note:
        """Return what stands for what, and a warning if it was not checked."""
        text = f"moec's {self.name} stands for {self.replaces} of transformers"
        if self.checked:
            return Note(f"import: {text}")
        return Note(
            f"{text}, whose source {'changed since it was' if self.known else 'was never'} checked", warning=True
        )

    def entry(self) -> dict[str, Any]:
        """Return what moec.json says."""
        return {"moec": self.name, "replaces": self.replaces, "source": self.source, "checked": self.checked}


def stand_in(replacement: Any, name: str, key: str, original: Any, owner: Any) -> StandIn:
    """Return what is known of a replacement; `owner` is the module or the class that holds `original`.

    `key` is its name in the table of checked sources: the function's alone where many modelling files have a copy of it.
    """
    return _compare_with_checked(replacement, name, key, source_fingerprint(original, owner))


def stand_in_for_file(replacement: Any, module: str) -> StandIn:
    """Return what is known of a function that stands for a whole modelling file."""
    found = find_spec(module)
    text = Path(found.origin).read_text(encoding="utf-8") if found and found.origin else ""
    name = module.rpartition(".")[2]
    return _compare_with_checked(replacement, name, name, _hash_texts([strip_comments(text)]) if text else UNREADABLE)


def _compare_with_checked(replacement: Any, name: str, key: str, source: str) -> StandIn:
    known = CHECKED.get(key, ())
    own = f"{replacement.__module__.partition('frontends.')[2]}.{replacement.__qualname__}"
    return StandIn(own, name, source, source in known, bool(known))


def source_fingerprint(original: Any, owner: Any) -> str:
    """Return the hash of the source of a function, or of a class."""
    try:
        return _hash_texts(
            [strip_comments(textwrap.dedent(inspect.getsource(part))) for part in _with_helpers(original, owner)]
        )
    except (OSError, TypeError, SyntaxError):
        return UNREADABLE


def _hash_texts(texts: list[str]) -> str:
    return hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()[:16]


def _with_helpers(original: Any, owner: Any) -> Iterator[Any]:
    """Yield a function and what it calls of its own file and its own class, each once; a class alone."""
    if inspect.isclass(original):
        yield original
        return
    waiting, seen = [inspect.unwrap(original)], set()
    while waiting:
        function = waiting.pop()
        if function in seen:
            continue
        seen.add(function)
        yield function
        for name in _names_in_code(function.__code__):
            for found in (function.__globals__.get(name), vars(owner).get(name)):
                helper = inspect.unwrap(found) if callable(found) else None
                if isinstance(helper, FunctionType) and helper.__module__ == function.__module__:
                    waiting.append(helper)


def _names_in_code(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _names_in_code(const)


def strip_comments(source: str) -> str:
    """Return a source without comments, docstrings and white space."""
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    cut = [
        (starts[row - 1] + column, starts[end - 1] + last) for row, column, end, last in _comment_spans(source, lines)
    ]
    kept, at = [], 0
    for begin, end in sorted(cut):
        kept.append(source[at:begin])
        at = max(at, end)
    return "".join("".join([*kept, source[at:]]).split())


def _comment_spans(source: str, lines: list[str]) -> Iterator[tuple[int, int, int, int]]:
    """Yield where comments and docstrings begin and end: line, column, line, column."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield (*token.start, *token.end)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(node) is not None:
            text = node.body[0]
            assert text.end_lineno is not None and text.end_col_offset is not None
            begin, end = (
                len(lines[row - 1].encode()[:column].decode())  # ast counts bytes
                for row, column in ((text.lineno, text.col_offset), (text.end_lineno, text.end_col_offset))
            )
            yield text.lineno, begin, text.end_lineno, end
