"""Tables on standard output, and rows of plain data as one. Imports little, so that lists come at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from inspect import cleandoc
from textwrap import indent
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 1000  # columns of a table that goes to a file or a pipe: a row stays on its line


def stdout_console() -> Console:
    """Return a console on the standard output of now (tests replace it); colours only on a terminal."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def make_table(columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table; a column is its title and whether it holds numbers."""
    titled = any(title for title, _ in columns)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, show_header=titled)
    for title, numeric in columns:
        table.add_column(Text(title), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: a type such as f32[B] is no markup
    return table


def print_parts(console: Console, *parts: Table | str) -> None:
    """Print tables and lines without the blanks that pad them to the width."""
    for part in parts:
        with console.capture() as captured:
            console.print(Text(part) if isinstance(part, str) else part)
        text = captured.get()
        click.echo(
            text if console.is_terminal else "\n".join(line.rstrip() for line in text.splitlines()) + "\n", nl=False
        )


def show_rows(rows: list[dict[str, Any]]) -> None:
    """Print rows of listing.py as a table; long texts (the sides of rules) stand in --json only."""
    if not rows:
        click.echo("none", err=True)
        return
    keys = [key for key in rows[0] if key not in ("before", "after", "runtime", "processor")]
    console, table = stdout_console(), _table_of(rows, keys)
    wanted = console.measure(table, options=console.options.update(width=10 * PIPE_WIDTH)).maximum
    if {"name", "doc"} < set(keys) and wanted > console.width:
        table = _table_of(rows, ["name", "doc"])  # on a terminal that is too narrow; NAME shows the rest of one
    print_parts(console, table)
    for runtime in (row["runtime"] for row in rows if "runtime" in row):
        click.echo(f"\nwhat lowering goes by, tried with {runtime['recorded_with']}:\n")
        show_rows(runtime["operators"])
        click.echo()
        show_rows(runtime["not_right"])
    for processor in (row["processor"] for row in rows if "processor" in row):
        click.echo("\nmoec's own kernels on this processor:\n")
        lines = [(key.replace("_", " "), _cell_text(value)) for key, value in processor.items()]
        print_parts(stdout_console(), make_table((("", False), ("", False)), lines))


def _table_of(rows: list[dict[str, Any]], keys: list[str]) -> Table:
    table = make_table(
        [(key.replace("_", " "), False) for key in keys], [[_cell_text(row[key]) for key in keys] for row in rows]
    )
    table.columns[0].no_wrap = True  # a name is found by its beginning
    return table


def show_row(row: dict[str, Any]) -> None:
    """Print all of one row, a line or a block for each of its columns."""
    lines = []
    for key, value in row.items():
        if text := _cell_text(value):
            block = "\n" in text.strip()
            lines.append(f"{key.replace('_', ' ')}:" + (f"\n{indent(cleandoc(text), '  ')}" if block else f" {text}"))
    click.echo("\n".join(lines))


def _cell_text(value: Any) -> str:
    match value:
        case None:
            return ""
        case dict():
            return ", ".join(f"{k}={v}" if v != "required" else k for k, v in value.items())
        case list() | tuple():
            return ", ".join(map(str, value))
    return str(value)
