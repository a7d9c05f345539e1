"""Compile a model: source -> module -> passes -> kernels -> artifact. Read `compile` from top to bottom."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..passes import PASSES
from ..targets import declare_kernel_ops, open_target
from .artifact.ahead import check_dump, check_folder, check_output, check_room, least_bytes
from .artifact.atomic import atomic_folder
from .artifact.manifest import write_manifest
from .errors import MoecError
from .errors.paths import check_source
from .ir.pipelines import LOWER, Pipeline, parse_pipeline, print_pipeline, with_options
from .quantize.plan import PLAN, Budget
from .quantize.request import NOTHING, PASS, UNASKED, read_request, with_quantization
from .rewrite.declare import Option, PassDef, PassTable, check_stop, resolve
from .version import __version__
from .weights.memory import MEMORY_LIMIT, tile_bytes

if TYPE_CHECKING:
    from ..targets import Target
    from .frontends import Loaded
    from .ir.module import Module
    from .quantize.plan import Plan
    from .rewrite.pipeline import PassTiming
    from .rewrite.rules import Why
    from .runtime.artifact import Artifact
    from .runtime.compare import Comparison

# What computes (torch, sympy) takes seconds to import: the functions below import it when a request has been judged, so
# that wrong use is answered at once.

Progress: TypeAlias = Callable[[int, int], None]  # bytes of weights written, bytes in all

IMPORTING = ("torch", "transformers")  # packages that models are read with, whose versions moec.json records
ACCURACIES = ("fast", "exact")


def compile(
    source: Any,
    target: str = "cpu",
    out: Path | str | None = None,
    *,
    pipeline: str | None = None,
    quantize: str | None = None,
    budget: str | None = None,
    calibration: Path | str | None = None,
    accuracy: str = "fast",
    memory_limit: int | None = None,
    dump: Path | str | None = None,
    check: bool = False,
    verify: bool = False,
    stop_after: str | None = None,
    options: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
    weights: Path | str | None = None,
    tokenizer: Any = None,
    why: Why = None,
    progress: Progress | None = None,
    timings: list[PassTiming] | None = None,
) -> Artifact | Module:
    """Compile a source for a target into the folder `out`; return the artifact (with `stop_after`, the module).

    `source` is a checkpoint folder, a `.moir` file, an artifact, or a live transformers model; `weights` names the
    checkpoint folder of a `.moir` file, `tokenizer` is that of a live model (a folder, or one of transformers; by default
    that of the folder which it was loaded from). `quantize` is a format or options of the pass (see quantize/request.py), or
    `auto` with a `budget` (4.5bpw, 6GB), or the file of a plan, or `keep`, the default for a checkpoint that is quantized:
    its codes where the target holds them, else what is nearest; `calibration` is the text that gptq and auto look at;
    `accuracy` is `fast` (int8 activations beside quantized weights) or `exact` (f32), `memory_limit` the bytes that
    tiles of weights may use beside the imports. `stop_after` is a stage or a pass. `check` compares the numbers before and
    after every pass, `why` collects why rules did not apply, `timings` how long each pass took, `progress` is told the
    bytes written and those in all. Raises MoecError; the folder is then as it was before.
    """
    chosen = open_target(target, options or {})
    table = passes_for(chosen)
    asked = chosen.pipeline if pipeline is None else parse_pipeline(pipeline)
    request = read_request(quantize, budget, calibration, UNASKED if pipeline is None else NOTHING)
    resolve((*asked, *request.calls), table)
    _judge(source, chosen, out, quantize is not None, accuracy, memory_limit, dump, stop_after)
    from . import frontends
    from .cost.count import module_costs
    from .quantize.planning import calibrated, plan_under_budget
    from .quantize.stored import needs_calibration
    from .rewrite.pipeline import remaining, run_pipeline
    from .runtime.artifact import record_figures
    from .weights.heap import returning_freed_memory

    declare_kernel_ops()
    limit = MEMORY_LIMIT if memory_limit is None else memory_limit
    loaded = frontends.load(source, weights=weights, tokenizer=tokenizer, trust_remote_code=trust_remote_code)
    _say_replaced(loaded, why)

    def make_plan(budget: Budget, method: str) -> Plan:
        loaded.need_weights()
        steps = remaining(loaded.module, asked, table)
        before, _ = run_pipeline(loaded.module, steps, target=chosen, stop_after="moe", table=table)
        return plan_under_budget(budget, method, loaded, before, table[PASS], chosen, calibration, limit)

    whole, plan = with_quantization(asked, request, loaded.module, make_plan)
    if accuracy != "fast":
        whole = with_options(whole, LOWER, accuracy=accuracy)
    steps = remaining(loaded.module, whole, table)
    given: dict[str, Module] = {}
    notes: list[str] = []
    module, taken = run_pipeline(
        loaded.module, steps, target=chosen, check=check, dump=Path(dump) if dump else None, why=_keeping(notes, why),
        stop_after=stop_after, table=table, given=given,
    )  # fmt: skip
    if timings is not None:
        timings += taken
    if stop_after:
        return module
    folder = _output(source, loaded, chosen, out)
    loaded.need_weights()
    check_room(folder, int(module_costs(module).total.compiled_bytes))
    figures: dict[str, Any] = {}
    with returning_freed_memory(memory_limit is not None or needs_calibration(module)):
        if needs_calibration(module):
            loaded, figures["calibration"] = calibrated(loaded, given.get(LOWER), calibration, folder, limit)
        artifact = _emit(module, loaded, chosen, whole, folder, limit, progress, notes, figures, plan)
    if verify:
        against = loaded.folder if isinstance(source, (str, Path)) else source
        artifact = record_figures(folder, {"measured": artifact.verify(against=against).to_dict()})
    return artifact


def _say_replaced(loaded: Loaded, why: Why) -> None:
    """Report what replaces code of transformers; without a collector of notes, warn of code that was not checked."""
    from .rewrite.rules import tell

    tell(why, [stand_in.note() for stand_in in loaded.replaced])
    if why is None:
        for stand_in in loaded.replaced:
            if not stand_in.checked:
                warnings.warn(stand_in.note(), stacklevel=3)


def _judge(
    source: Any, target: Target, out: Path | str | None, quantized: bool, accuracy: str, memory_limit: int | None,
    dump: Path | str | None, stop_after: str | None,
) -> None:  # fmt: skip
    """Raise MoecError for what is wrong with a request whatever the source holds: all that the first second shows."""
    if accuracy not in ACCURACIES:
        raise MoecError(f"there is no accuracy {accuracy}", todo=f"there are {', '.join(ACCURACIES)}")
    tile_bytes(MEMORY_LIMIT if memory_limit is None else memory_limit)
    if stop_after is not None:
        check_stop(stop_after, passes_for(target))
    if dump is not None:
        check_dump(Path(dump))
    if not isinstance(source, (str, Path)):
        return
    folder = check_source(source)
    if folder.is_dir():
        check_folder(folder)
    final = (
        Path(out) if out is not None else Path(f"{folder.resolve().name}-{target.name}") if folder.is_dir() else None
    )
    if stop_after is None and final is not None:
        check_output(final)
        check_room(final, least_bytes(folder, quantized))


def _keeping(notes: list[str], why: Why) -> Callable[[str], None]:
    """Return a function that takes notes for the report and hands them on."""

    from .rewrite.rules import tell

    def take(note: str) -> None:
        notes.append(note)
        tell(why, [note])

    return take


def passes_for(target: Target) -> PassTable:
    """Return the table of passes together with the target's lowering and those that packages bring."""

    def lower(module: Module, target: Target, why: Why, accuracy: str = "fast") -> Module:
        from .rewrite.rules import tell

        notes: list[str] = []
        lowered = target.lower(module, notes, accuracy)
        tell(why, notes)
        return lowered

    doc = f"Rewrite the module in the ops that target {target.name} runs."
    options = {"accuracy": Option("accuracy", str, False, "fast")}
    return PassTable({**PASSES, LOWER: PassDef(LOWER, doc, lower, "moe", "kernel", False, options, notes=True)})


def _emit(
    module: Module, loaded: Loaded, target: Target, pipeline: Pipeline, out: Path, limit: int,
    progress: Progress | None, notes: list[str], figures: Mapping[str, Any], plan: Plan | None,
) -> Artifact:  # fmt: skip
    """Write the artifact beside its final name and put it in place when it is whole; `notes` say what was not fused."""
    from .cost.count import module_costs
    from .cost.report import left_out_of, per_token
    from .quantize.stored import is_lossy, kept_codes, precision
    from .rewrite.unfused import unfused
    from .runtime.artifact import Artifact
    from .text.printer import print_module

    weights = loaded.need_weights()
    tile = tile_bytes(limit)
    source: dict[str, Any] = {"name": module.source, "sha256": getattr(weights, "fingerprint", "")}
    if loaded.left_out:
        source["left_out"] = left_out_of(loaded.left_out)
    with atomic_folder(out) as folder:
        for name, content in loaded.companions().items():
            (folder / name).write_bytes(content)
        (folder / "program.moir").write_text(print_module(module), encoding="utf-8")
        if plan is not None:
            plan.write(folder / PLAN)
        costs = module_costs(module)
        said: list[str] = []
        files = target.emit(module, weights, folder, tile, _with_total(progress, costs.total.compiled_bytes), said)
        if (opened := getattr(weights, "opened", None)) is not None:
            opened.check()
        kept = kept_codes(module)
        figures = {
            "counted": per_token(costs),
            **figures,
            **({"kept": kept} if kept else {}),
            **({"notes": said} if said else {}),
        }
        write_manifest(
            folder, module, source=source, target=target.name, pipeline=print_pipeline(pipeline), moec=__version__, files=files,
            precision=precision(module), lossy=is_lossy(module), figures=figures,
            unfused=unfused(module, notes), replaced=[stand_in.entry() for stand_in in loaded.replaced],
            packages={name: metadata.version(name) for name in (*IMPORTING, *target.packages)},
        )  # fmt: skip
    return Artifact.open(out)


def _with_total(progress: Progress | None, total: int) -> Callable[[int], None] | None:
    return progress and (lambda done: progress(done, total))


def _output(source: Any, loaded: Loaded, target: Target, out: Path | str | None) -> Path:
    if out is not None:
        return Path(out)
    if isinstance(source, (str, Path)) and loaded.folder is not None:
        return Path(f"{loaded.folder.resolve().name}-{target.name}")
    raise MoecError("the output folder is not named", todo="pass out=DIR (-o DIR)")


def load(source: Any, **options: Any) -> Module | Artifact:
    """Open an artifact folder, or import any other source as a module."""
    from . import frontends
    from .runtime.artifact import Artifact

    declare_kernel_ops()
    if isinstance(source, (str, Path)) and (Path(source) / "moec.json").is_file():
        return Artifact.open(Path(source))
    return frontends.load(source, **options).module


def opt(
    source: Any,
    passes: str,
    *,
    target: str = "cpu",
    check: bool = False,
    dump: Path | str | None = None,
    why: Why = None,
    timings: list[PassTiming] | None = None,
) -> Module:
    """Run passes on a module, a `.moir` file or any other source; return the module."""
    chosen = open_target(target, {})
    table = passes_for(chosen)
    steps = parse_pipeline(passes)
    resolve(steps, table)
    if isinstance(source, (str, Path)):
        check_source(source)
    from . import frontends
    from .ir.module import Module
    from .rewrite.pipeline import run_pipeline

    declare_kernel_ops()
    module = source if isinstance(source, Module) else frontends.load(source).module
    module, taken = run_pipeline(
        module, steps, target=chosen, check=check, dump=Path(dump) if dump else None, why=why, table=table
    )  # fmt: skip
    if timings is not None:
        timings += taken
    return module


def predict(
    module: Module, target: str, options: Mapping[str, str] | None = None, *,
    batch: int = 1, new: int = 1, past: int = 0, devices: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """Return how long a step of a module is predicted to take on an accelerator, lowered as `compile` does unasked.

    For the step see targets.target.Predict. MoecError for a target that is no accelerator, for a program that was
    compiled for another one, and for a figure of the chip that is unknown.
    """
    chosen = open_target(target, options or {})
    from .rewrite.pipeline import remaining, run_pipeline

    declare_kernel_ops()
    if chosen.predict is None:
        raise MoecError(f"target {target} is not known by figures", todo="name an accelerator; moec targets lists them")
    if module.stage == "kernel":
        for function in module.functions:
            for reason in filter(None, map(chosen.supported, function.ops)):
                raise MoecError(reason, f"@{function.name}", todo="inspect the checkpoint that it was compiled from")
    table = passes_for(chosen)
    whole, _ = with_quantization(chosen.pipeline, UNASKED, module)
    lowered, _ = run_pipeline(module, remaining(module, whole, table), target=chosen, table=table)
    return chosen.predict(lowered, batch=batch, new=new, past=past, devices=devices)


def verify(
    folder: Path | str,
    against: Any = None,
    accuracy: str | None = None,
    notes: list[str] | None = None,
    **options: Any,
) -> Comparison:
    """Compare an artifact with its source model in transformers, and keep what is found in moec.json.

    Options as in `parity.verify`; `accuracy` is that of the session (None: as compiled). Where moec.json cannot be
    written that is a note: the figures are found all the same.
    """
    from .runtime.artifact import Artifact, record_figures

    artifact = Artifact.open(Path(folder))
    found = artifact.verify(against=against, accuracy=accuracy, **options)
    measured = {**found.to_dict(), **({"accuracy": accuracy} if accuracy else {})}
    try:
        record_figures(artifact.folder, {"measured": measured})
    except MoecError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        if notes is not None:
            notes.append(f"note: the figures are not kept: {error.what}")
    return found
