"""`moec bisect` and `moec verify --layers`: which step of the way from the source to the artifact changed the numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import MoecError
from .base import CHECK_FAILED, examples_epilog, json_option, shared_options
from .progress import show_progress

if TYPE_CHECKING:
    from ..ir.module import Module
    from ..runtime.artifact import Artifact
    from ..weights.sources.source import WeightSource

PROMPTS = ((5, 9, 2, 11, 30, 7), (3, 8, 4))  # token ids; the second row is padded where the program takes padding
EXACT, RUN, RUN_LOSSY = (
    1e-4,
    1e-3,
    0.05,
)  # relative to the largest logit: of imports, of runtimes, with int8 activations


@dataclass(frozen=True)
class Finding:
    """A step on the way: what was compared, how far it is off, and what to look at where that is too far."""

    step: str
    passed: bool
    detail: str
    todo: str = ""

    def line(self) -> str:
        """Return the step as text."""
        more = f"\n      {self.todo}" if self.todo else ""
        return f"{'ok  ' if self.passed else 'FAIL'}  {self.step}: {self.detail}{more}"


@click.command(epilog=examples_epilog("moec bisect tiny", "moec bisect tiny --against checkpoint-folder --json"))
@click.argument("folder", metavar="DIR")
@click.option("--against", metavar="SOURCE", help="The checkpoint folder.  [default: the one it was compiled from]")
@json_option
@shared_options
def bisect(folder: str, against: str | None, as_json: bool) -> None:
    """Find the first step that changed an artifact's numbers beyond what it may.

    The import is compared with the source in transformers, every pass of the artifact's pipeline is run again and checked on its own, the program that comes out is compared with the artifact's, and the runtime's logits with those of the program. The exit code is 1 if a step fails, with the command that shows it.
    """
    from ..runtime.artifact import Artifact

    findings = []
    with show_progress():
        for finding in _find_steps(Artifact.open(Path(folder)), against):
            findings.append(finding)
            if not as_json:
                click.echo(finding.line())
    if as_json:
        click.echo(json.dumps([vars(finding) for finding in findings], indent=2))
    if not findings[-1].passed:
        click.get_current_context().exit(CHECK_FAILED)


def _find_steps(artifact: Artifact, against: str | None) -> Iterator[Finding]:
    """Yield the steps in their order, up to the first that fails: nothing after it has a meaning."""
    from ...targets import declare_kernel_ops, open_target
    from ..check.diff import diff_modules
    from ..driver import passes_for
    from ..frontends.load import load
    from ..ir.pipelines import parse_pipeline
    from ..rewrite.pipeline import run_pipeline

    target = open_target(artifact.target, {})
    declare_kernel_ops(target)
    source = _source_of(artifact, against)
    loaded = load(source)
    weights = loaded.need_weights()
    imported = _check_import(loaded.module, weights, source)
    yield imported
    if not imported.passed:
        return
    table = passes_for(target)
    try:
        made = run_pipeline(
            loaded.module, parse_pipeline(artifact.manifest["pipeline"]), target=target, check=True, table=table
        ).module
    except MoecError as error:
        yield Finding("passes", False, error.what, error.todo)
        return
    yield Finding("passes", True, f"each of {len(parse_pipeline(artifact.manifest['pipeline']))} keeps the numbers")
    program = load(artifact.folder, weights=source if loaded.folder else None).module
    if lines := [line for line in diff_modules(made, program) if not line.startswith("source:")]:
        detail = f"the artifact's program is not what these passes make today: {lines[0].strip()}"
        yield Finding("program", False, detail, "compile it again, and compare: moec diff OLD NEW")
        return
    yield Finding("program", True, "the artifact's is what the passes make")
    yield _check_runtime(artifact, program, weights)


def _source_of(artifact: Artifact, against: str | None) -> str:
    from ..runtime.subject import recorded_source

    source = against or recorded_source(artifact)
    if not source or source.startswith("python:"):
        todo = "name the checkpoint folder: --against SOURCE"
        raise MoecError("the artifact does not name a source folder", str(artifact.folder), todo=todo)
    return source


def _check_import(module: Module, weights: WeightSource, source: str) -> Finding:
    from ..runtime.compare import token_differences
    from ..runtime.generate import left_pad
    from ..runtime.layers import TOLERANCE, compare_places, run_program
    from ..runtime.reference import open_reference

    prompts = _prompts_for(module)
    ids, mask, positions = left_pad(prompts)
    with open_reference(source) as reference:
        wanted = reference.step(ids, mask, positions, None)[0]
        found = _logits(run_program(module, weights, ids, mask, positions))
        difference = float(token_differences(found[mask > 0], wanted[mask > 0]).max())
        if difference <= EXACT:
            return Finding("import", True, f"logits differ from transformers by {difference:.2g}")
        places = compare_places(module, weights, reference, prompts)
    first = next((place for place in places if not place.difference <= TOLERANCE), None)
    where = f"; first at {first.module} ({first.op} in @{first.function})" if first else ""
    detail = f"logits differ from transformers by {difference:.2g}{where}"
    return Finding("import", False, detail, f"moec compile {source} --stop-after graph shows the program as imported")


def _check_runtime(artifact: Artifact, program: Module, weights: WeightSource) -> Finding:
    from ..quantize.stored import needs_calibration
    from ..runtime.compare import token_differences
    from ..runtime.generate import left_pad
    from ..runtime.layers import run_program

    if needs_calibration(program):
        return Finding("runtime", True, "not compared: codes were chosen with a calibration text")
    ids, mask, positions = left_pad(_prompts_for(program))
    wanted = _logits(run_program(program, weights, ids, mask, positions))
    found = artifact.session(spinning=False).step(ids, mask, positions)[0]
    real = mask > 0
    difference = float(token_differences(found[real], wanted[real]).max())
    passed = difference <= (RUN_LOSSY if artifact.lossy else RUN)
    todo = "" if passed else "a stored weight, a kernel or the runtime: moec diff against an artifact that is right"
    return Finding("runtime", passed, f"logits differ from those of the program by {difference:.2g}", todo)


def _prompts_for(module: Module) -> list[list[int]]:
    padded = any(value.name == "position_ids" for value in module.main.params)
    return [list(prompt) for prompt in (PROMPTS if padded else PROMPTS[:1])]


def _logits(results: dict[str, Any]) -> Any:
    return results["logits"].float().numpy()


def verify_layers(folder: Path, against: str | None, as_json: bool) -> None:
    """Print how far an artifact's program is off at every module of the source, and which op is the first beyond what it may."""
    from ...targets import declare_kernel_ops
    from ..frontends.load import load
    from ..runtime.artifact import Artifact
    from ..runtime.layers import LOSSY, TOLERANCE, compare_places
    from ..runtime.reference import open_reference

    declare_kernel_ops()
    artifact = Artifact.open(folder, check=True)
    source = _source_of(artifact, against)
    loaded = load(folder, weights=against)
    with open_reference(source) as reference:
        places = compare_places(loaded.module, loaded.need_weights(), reference, _prompts_for(loaded.module))
    tolerance = LOSSY if artifact.lossy else TOLERANCE
    first = next((place for place in places if not place.difference <= tolerance), None)
    if as_json:
        click.echo(json.dumps({"tolerance": tolerance, "places": [vars(place) for place in places]}, indent=2))
    else:
        click.echo("\n".join(place.line() for place in places))
        if first is None:
            click.echo(f"every place is within {tolerance:g} of {source}")
        else:
            click.echo(f"the first beyond {tolerance:g}: {first.module} ({first.op} in @{first.function})")
    if first is not None:
        click.get_current_context().exit(CHECK_FAILED)
