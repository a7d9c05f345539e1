"""Fills the pages of the documentation with what the sources say: `<!-- NAME -->` in a page is replaced by that reference.

MkDocs runs `on_page_markdown` (`hooks` in mkdocs.yml); nothing of a reference is written a second time here.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import moec
from moec.compiler.cli import listing
from moec.compiler.formats import table

METHODS = ("run", "chat", "verify", "bench", "session", "__call__")  # of an artifact


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marks of a page by the references that they name."""
    return re.sub(r"^<!-- (\w+) -->$", lambda mark: REFERENCES[mark[1]](), markdown, flags=re.MULTILINE)


def api_reference() -> str:
    """Return what `import moec` offers: signatures and docstrings."""
    offered = [(f"moec.{name}", getattr(moec, name)) for name in moec.__all__ if name.islower() and name[0] != "_"]
    functions = [_entry(name, thing) if inspect.isroutine(thing) else _text_of(name, thing) for name, thing in offered]
    options = _entry("compile_source", _compile_source(), "The options of moec.compile")
    methods = [
        _entry(f"artifact.{name}", getattr(moec.Artifact, name)) for name in METHODS if hasattr(moec.Artifact, name)
    ]
    return "\n\n".join(
        [
            *functions,
            options,
            _text_of("moec.Artifact", moec.Artifact),
            *methods,
            _text_of("moec.MoecError", moec.MoecError),
        ]
    )


def _compile_source() -> Any:
    from moec.compiler.driver import compile_source

    return compile_source


def _entry(name: str, function: Any, title: str = "") -> str:
    """Return a function as a section: heading, signature, docstring."""
    signature = str(inspect.signature(function)).replace("(self, ", "(").replace("(self)", "()")
    signature = re.sub(r"(: |-> )'([^']*)'", r"\1\2", signature)  # annotations are texts in the sources
    parameters = re.sub(r", (?=\*{0,2}\w+[:=,)]|\*,)", ",\n    ", signature[1:])
    head = f"## {title or name}\n\n```text\n{name}({parameters}\n```\n"
    return f"{head}\n{_markdown(inspect.getdoc(function) or '')}"


def _text_of(name: str, thing: Any) -> str:
    return f"## {name}\n\n{_markdown(inspect.getdoc(thing) or '')}"


def _markdown(doc: str) -> str:
    """Return a docstring as Markdown: what is typed at a prompt becomes a block, a list is set off."""
    doc = re.sub(r"^>>> .*(?:\n(?!\n).*)*", lambda block: f"```text\n{block[0]}\n```", doc, flags=re.MULTILINE)
    doc = re.sub(r"(?<=\n)  (?=\S)", "    ", doc)  # a list's next lines, as Markdown wants them
    return re.sub(r"(?<!\n)\n(?=- )", "\n\n", doc, count=1)


def op_reference() -> str:
    """Return every op by dialect: signature, attributes, meaning."""
    parts: list[str] = []
    dialect = ""
    for row in listing.list_ops():
        if row["name"].partition(".")[0] != dialect:
            dialect = row["name"].partition(".")[0]
            parts.append(f"## Dialect {dialect}")
        attributes = ", ".join(f"`{name}` ({default})" for name, default in row["attributes"].items())
        more = f"\n\nAttributes, with their defaults: {attributes}." if attributes else ""
        parts.append(f"### {row['name']}\n\n```text\n{row['signature']}\n```\n\n{_plain(row['doc'])}{more}")
    return "\n\n".join(parts)


def pass_reference() -> str:
    """Return the passes as a table."""
    lines = ["| pass | reads | options | what it does |", "| --- | --- | --- | --- |"]
    for row in listing.list_passes():
        options = "<br>".join(f"`{_cell(option)}`" for option in row["options"])
        lines.append(f"| {row['name']} | {row['reads']} | {options} | {_cell(_plain(row['doc']))} |")
    return "\n".join(lines)


def format_reference() -> str:
    """Return the stored formats as a table."""
    lines = ["| format | bits a weight | groups | what it is |", "| --- | --- | --- | --- |"]
    for row in listing.list_formats():
        groups = ", ".join(map(str, row["other_groups"])) or str(table.format_of(row["name"]).group)
        lines.append(f"| {row['name']} | {row['bits_a_weight']} | {groups} | {_cell(_plain(row['doc']))} |")
    return "\n".join(lines)


def grammar_reference() -> str:
    """Return the grammar of programs as it is read."""
    from importlib.resources import files

    return f"```text\n{files('moec.compiler.ir').joinpath('grammar.lark').read_text('utf-8').rstrip()}\n```"


def _plain(text: str) -> str:
    """Return text in which nothing is taken for a link or for HTML."""
    return re.sub(r"([\[\]<>*_])", r"\\\1", text) if "`" not in text else text.replace("<", "&lt;")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


REFERENCES = {
    "api": api_reference, "ops": op_reference, "passes": pass_reference, "formats": format_reference,
    "grammar": grammar_reference,
}  # fmt: skip
