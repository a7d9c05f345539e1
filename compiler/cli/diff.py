"""`moec diff`: what differs between two programs or two artifacts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import click

from ..errors.paths import check_source
from .base import CHECK_FAILED, examples_epilog, json_option, shared_options

COMPARED = ("target", "lossy")
SHOWN_WEIGHTS = 10


@click.command(
    epilog=examples_epilog(
        "moec diff tiny-int4 tiny-int8",
        "moec diff dumps/03.lift-moe.moir dumps/04.fuse-norms.moir",
        "moec diff a b --json",
    )
)
@click.argument("old", metavar="A")
@click.argument("new", metavar="B")
@json_option
@shared_options
def diff(old: str, new: str, as_json: bool) -> None:
    """Show what differs between two programs, dumps or artifacts.

    A line with - is in A only, one with + in B only, one with ~ in both, changed. Values may have other names. Of artifacts the target, the pipeline and the stored weights are compared too. The exit code is 1 if anything differs.
    """
    for source in (old, new):
        check_source(source)
    from ...targets import declare_kernel_ops
    from ..check.diff import diff_modules
    from ..frontends.load import load

    declare_kernel_ops()
    lines = diff_modules(load(old).module, load(new).module)
    if all((Path(source) / "moec.json").is_file() for source in (old, new)):
        lines = [*_artifact_lines(Path(old), Path(new), same_program=not lines), *lines]
    if as_json:
        click.echo(json.dumps({"equal": not lines, "differences": lines}, indent=2))
    else:
        click.echo("\n".join(lines) if lines else "no difference")
    if lines:
        click.get_current_context().exit(CHECK_FAILED)


def _artifact_lines(old: Path, new: Path, same_program: bool) -> list[str]:
    from ..artifact.stored_weights import differing_weights
    from ..runtime.artifact import Artifact

    left, right = Artifact.open(old).manifest, Artifact.open(new).manifest
    lines = [f"{key}: {left[key]} -> {right[key]}" for key in COMPARED if left[key] != right[key]]
    lines += _pipeline_lines(left["pipeline"], right["pipeline"])
    lines += _source_lines(left["source"], right["source"])
    if not same_program:  # its weights differ as the program says
        return lines
    names = differing_weights(old, new)
    more = f" and {len(names) - SHOWN_WEIGHTS} more" if len(names) > SHOWN_WEIGHTS else ""
    if names:
        lines.append(f"~ weights of other numbers: {', '.join(names[:SHOWN_WEIGHTS])}{more}")
    return lines


def _pipeline_lines(old: str, new: str) -> list[str]:
    """Return the passes that differ."""
    from ..ir.pipelines import parse_pipeline, print_pipeline

    left, right = ([print_pipeline((call,)) for call in parse_pipeline(text)] for text in (old, new))
    matcher = SequenceMatcher(None, left, right, autojunk=False)
    changes = [code for code in matcher.get_opcodes() if code[0] != "equal"]
    return [
        f"pipeline: {', '.join(left[a:b]) or 'nothing'} -> {', '.join(right[c:d]) or 'nothing'}"
        for _, a, b, c, d in changes
    ]


def _source_lines(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    if old.get("sha256") == new.get("sha256"):
        return []
    return [f"source: the checkpoints differ: sha256 {old.get('sha256', '')[:12]} -> {new.get('sha256', '')[:12]}"]
