"""Compile a model: source -> module -> passes -> kernels -> artifact. Read `compile_source` from top to bottom."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from ..passes import PASSES
from ..targets import OWN, Target, declare_kernel_ops, open_target
from .artifact.ahead import check_dump, check_places, check_room, check_workers, output_folder
from .artifact.atomic import atomic_folder
from .artifact.manifest import write_manifest
from .artifact.remote import check_remote, is_url, near_folder, near_place, publish_folder
from .errors import MoecError
from .errors.hub import download_model
from .errors.paths import check_source
from .errors.plugins import PASSES as BROUGHT_PASSES
from .errors.plugins import TARGETS as BROUGHT_TARGETS
from .errors.plugins import register_brought
from .errors.progress import begin_phase
from .ir.notes import Note
from .ir.pipelines import LOWER, Pipeline, parse_pipeline, print_pipeline, with_lowering, with_options
from .quantize.plan import PLAN, Budget, Plan
from .quantize.request import NOTHING, PASS, UNASKED, read_request, with_quantization
from .rewrite.declare import PassDef, PassTable, check_stop, pass_, resolve_passes
from .version import __version__
from .weights.journal import end_journal, journal_key
from .weights.memory import MEMORY_LIMIT, parse_bytes, tile_bytes

if TYPE_CHECKING:
    from ..targets.serving.workload import Workload
    from .frontends.load import Loaded
    from .ir.module import Module
    from .rewrite.pipeline import PassTiming, Run
    from .rewrite.rules import Rule
    from .runtime.artifact import Artifact

# What computes (torch, sympy) takes seconds to import: the functions below import it when a request has been judged, so
# that wrong use is answered at once.

_WORKLOADS: dict[tuple[str, int, int, bool], Workload] = {}  # of configs that were planned with


@dataclass(frozen=True)
class Compiled:
    """The result of a compilation: the artifact (with `stop_after` None), its module, what was reported, how long passes took."""

    artifact: Artifact | None
    module: Module
    notes: tuple[Note, ...]
    timings: tuple[PassTiming, ...]


@overload
def compile(
    source: Any, target: str = "cpu", out: Path | str | None = None, *, stop_after: None = None, **options: Any
) -> Artifact: ...


@overload
def compile(
    source: Any, target: str = "cpu", out: Path | str | None = None, *, stop_after: str, **options: Any
) -> Module: ...


def compile(source: Any, target: str = "cpu", out: Path | str | None = None, **options: Any) -> Artifact | Module:
    """Compile a source for a target into the folder `out`; return the artifact (with `stop_after`, the module).

    The options are those of `compile_source`, which returns what is reported as well. Code of transformers that moec
    replaces and that nobody compared with what replaces it is a warning.

    >>> moec.compile("examples/tiny-moe", out="tiny", quantize="int4").run("import", max_new_tokens=8)  # doctest: +SKIP
    Generation(tokens=[[...]], ...)
    """
    compiled = compile_source(source, target, out, **options)
    for note in compiled.notes:
        if note.warning:
            warnings.warn(str(note), stacklevel=2)
    return compiled.module if compiled.artifact is None else compiled.artifact


def compile_source(
    source: Any,
    target: str = "cpu",
    out: Path | str | None = None,
    *,
    pipeline: str | None = None,
    quantize: str | None = None,
    budget: str | None = None,
    calibration: Path | str | None = None,
    accuracy: str | None = None,
    kv: str | None = None,
    memory_limit: int | str | None = None,
    dump: Path | str | None = None,
    check: bool = False,
    verify: bool = False,
    stop_after: str | None = None,
    options: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
    weights: Path | str | None = None,
    tokenizer: Any = None,
    example_inputs: Any = None,
    plan: Path | str | None = None,
    download: bool = False,
    resume: bool = False,
    workers: str | int | None = None,
) -> Compiled:
    """Compile a source for a target into the folder `out`.

    - `source`: a checkpoint folder; a model on the Hugging Face Hub by its name (`org/name@revision`, from the local cache, or
      fetched into it with `download`); an fsspec URL of a folder (`s3://...`; so may be `out`); a `.moir` file, whose checkpoint
      `weights` names; an artifact; an ONNX file or model; an exported program of torch; a live transformers model, whose
      `tokenizer` (a folder, or one of transformers) is by default that of the folder which it was loaded from; any other
      torch module with the `example_inputs` that it is called with: a tensor, a tuple, or a dict by name.
    - `quantize`: a format or options of the pass (see quantize/request.py); `auto` with a `budget` (4.5bpw, 6GB); the file of
      a plan of formats; or `keep`, the default for a checkpoint that is quantized: its codes where the target holds them,
      else what is nearest. `calibration` is the text that gptq and auto look at.
    - `accuracy`: on the CPU `fast` (int8 activations beside quantized weights, the default) or `exact` (f32).
    - `kv`: how caches are stored, of what the target has of `f32`, `f16`, `bf16`, `fp8`, `int8`; by default (`auto`) as a model
      of moec's own has them, on the CPU f16 beside int8 activations where moec has kernels, else f32, on accelerators bf16.
    - `plan`: the file of a plan (`moec plan -o`), whose devices' shards are written instead of an artifact of a target.
    - `memory_limit`: what tiles of weights may use beside the imports, in bytes or as 500MB. `stop_after` is a stage or a pass, `check`
      compares the numbers before and after every pass, `resume` goes on with the files of a run of the same that was stopped,
      and keeps them where this one is stopped.
    - `workers`: a Dask scheduler (`tcp://HOST:PORT`), or a number of local processes, that compute tiles of weights: the same bytes.

    Raises MoecError; the folder is then as it was before.
    """
    if plan is not None:
        from ..targets.ranks.layout import target_of_plan

        target, options, quantize = target_of_plan(Path(plan), options, quantize)
    chosen = open_target(target, options or {})
    table = passes_for(chosen)
    asked = chosen.store_caches(with_lowering(chosen.pipeline if pipeline is None else parse_pipeline(pipeline)), kv)
    if accuracy is not None:
        asked = with_options(asked, LOWER, accuracy=accuracy)
    request = read_request(quantize, budget, calibration, UNASKED if pipeline is None else NOTHING)
    resolve_passes((*asked, *request.calls), table)
    if stop_after is not None:
        check_stop(stop_after, table)
    limit = MEMORY_LIMIT if memory_limit is None else parse_bytes(memory_limit)
    tile = tile_bytes(limit)
    check_workers(workers)
    dumps = check_dump(Path(dump)) if dump is not None else None
    if download:
        download_model(source)
    published, near = (out if is_url(out) else None), (near_folder(source) if is_url(source) else source)
    if published is not None:
        check_remote(published)
        out = near_place(published)
    if isinstance(near, (str, Path)):
        out = output_folder(out, near, chosen.name, quantize, budget)
        check_places(check_source(near), out, writes=stop_after is None, quantized=quantize is not None)
    from .cost.count import module_costs
    from .frontends.load import load
    from .quantize.planning import calibrate_weights, plan_under_budget
    from .quantize.stored import needs_calibration
    from .rewrite.pipeline import remaining_passes, run_pipeline
    from .runtime.artifact import record_figures
    from .weights.heap import returning_freed_memory
    from .weights.workers import divided_source

    declare_kernel_ops(chosen)
    with begin_phase("importing"):
        loaded = load(near, weights=weights, tokenizer=tokenizer, example_inputs=example_inputs,
                      trust_remote_code=trust_remote_code)  # fmt: skip
    if near is not source:
        loaded = replace(loaded, module=replace(loaded.module, source=str(source)))

    def make_plan(budget: Budget, method: str) -> Plan:
        loaded.need_weights()
        passes = remaining_passes(loaded.module, asked, table)
        before = run_pipeline(loaded.module, passes, target=chosen, stop_after="moe", table=table).module
        return plan_under_budget(budget, method, loaded, before, table[PASS], chosen, calibration, limit)

    given = chosen.keep_caches(asked, loaded.caches)
    whole, chosen_formats = with_quantization(given, request, loaded.module, make_plan)
    passes = remaining_passes(loaded.module, whole, table)
    run = run_pipeline(
        loaded.module, passes, target=chosen, check=check, dump=dumps, stop_after=stop_after, table=table
    )
    notes = (*(stand_in.note() for stand_in in loaded.replaced), *loaded.notes, *run.notes)
    if stop_after:
        return Compiled(None, run.module, notes, run.timings)
    stored = isinstance(source, (str, Path))
    if out is None:
        raise MoecError("the output folder is not named", todo="pass out=DIR (-o DIR)")
    folder = Path(out)
    loaded.need_weights()
    check_room(folder, int(module_costs(run.module).total.compiled_bytes))
    calibrating = needs_calibration(run.module)
    if calibration is not None and not calibrating and request.budget is None:
        todo = "add method=gptq or method=awq to --quantize, or leave the text out"
        raise MoecError("nothing reads the calibration text", str(calibration), todo=todo)
    figures: dict[str, Any] = {}
    given_key = journal_key(*map(str, sorted((options or {}).items())), Path(plan).read_text() if plan else "")
    freed = returning_freed_memory(memory_limit is not None or calibrating)
    with freed, divided_source(loaded.need_weights(), workers) as divided:
        if calibrating:
            calibrated = calibrate_weights(loaded, run.given.get(LOWER), calibration, folder, limit, divided)
            loaded, figures["calibration"] = calibrated
        loaded = loaded if divided is None else replace(loaded, weights=divided.divide(loaded.need_weights()))
        artifact = _emit_artifact(run, loaded, chosen, whole, folder, tile, figures, chosen_formats, given_key, resume)
    if verify:
        against = loaded.folder if stored else source
        artifact = record_figures(folder, {"measured": artifact.verify(against=against).to_dict()})
    if published is not None:
        publish_folder(folder, published)
    return Compiled(artifact, run.module, notes, run.timings)


def passes_for(target: Target) -> PassTable:
    """Return the table of passes together with the target's lowering and those that packages bring."""
    return PassTable({**PASSES, LOWER: pass_(reads="moe", leaves="kernel")(target.lower)})


def _emit_artifact(
    run: Run, loaded: Loaded, target: Target, pipeline: Pipeline, out: Path, tile: int,
    figures: Mapping[str, Any], plan: Plan | None, asked: str, resume: bool,
) -> Artifact:  # fmt: skip
    """Write the artifact beside its final name and put it in place when it is whole."""
    from .cost.count import module_costs
    from .cost.report import left_out_of, per_token
    from .quantize.stored import is_lossy, kept_codes, stored_formats
    from .rewrite.fusion_report import fusion_report
    from .runtime.artifact import Artifact
    from .text.printer import print_module

    module, weights = run.module, loaded.need_weights()
    source: dict[str, Any] = {"name": module.source, "sha256": getattr(weights, "fingerprint", "")}
    if loaded.left_out:
        source["left_out"] = left_out_of(loaded.left_out)
    costs = module_costs(module)
    total = costs.total.compiled_bytes
    opened = getattr(weights, "opened", None)
    key = journal_key(print_module(module), target.name, asked, str(tile), __version__, str(opened and opened.stamps))
    with atomic_folder(out, key, resume and opened is not None) as folder:
        for name, content in loaded.companions().items():
            (folder / name).write_bytes(content)
        if not target.checkpoint:
            (folder / "program.moir").write_text(print_module(module), encoding="utf-8")
        if plan is not None:
            plan.write(folder / PLAN)
        with begin_phase("writing", int(total), "bytes") as phase:
            written = target.emit(module, weights, folder, tile, phase.advance)
        if opened is not None:
            opened.check()
        end_journal(folder)
        kept, notes = kept_codes(module), [note.reason for note in written.notes]
        figures = {
            "counted": per_token(costs), **figures,
            **({"kept": kept} if kept else {}), **({"notes": notes} if notes else {}),
        }  # fmt: skip
        write_manifest(
            folder, module, source=source, target=target.name, pipeline=print_pipeline(pipeline), moec=__version__,
            files=written.files, precision=stored_formats(module), lossy=is_lossy(module), figures=figures,
            unfused=[] if target.keeps_experts else fusion_report(module, run.notes), replaced=[stand_in.entry() for stand_in in loaded.replaced],
            kernels=written.kernels,
            packages={name: metadata.version(name) for name in ("torch", "transformers", *target.packages)},
        )  # fmt: skip
    return Artifact.open(out)


def load(source: Any, **options: Any) -> Module | Artifact:
    """Open an artifact folder, or import any other source as a module."""
    from .frontends.load import load
    from .runtime.artifact import Artifact

    declare_kernel_ops()
    if isinstance(source, (str, Path)) and (Path(source) / "moec.json").is_file():
        return Artifact.open(Path(source))
    return load(source, **options).module


def parse(text: str) -> Module:
    """Return the program that a text (a dump, a .moir file, `str(module)`) holds; MoecError points into it.

    >>> moec.parse(str(module)) == module  # doctest: +SKIP
    True
    """
    from .text.parser import parse_module

    declare_kernel_ops()
    return parse_module(text)


def opt(source: Any, passes: str, **options: Any) -> Module:
    """Run passes on a module, a `.moir` file or any other source; return the module. Options as in `run_passes`."""
    return run_passes(source, passes, **options).module


def run_passes(
    source: Any, passes: str, *, target: str = "cpu", check: bool = False, dump: Path | str | None = None
) -> Run:
    """Run passes on a module, a `.moir` file or any other source; return the module, notes and timings."""
    chosen = open_target(target, {})
    table = passes_for(chosen)
    pipeline = parse_pipeline(passes)
    resolve_passes(pipeline, table)
    if isinstance(source, (str, Path)):
        check_source(source)
    from .frontends.load import load
    from .ir.module import Module
    from .rewrite.pipeline import run_pipeline

    declare_kernel_ops(chosen)
    module = source if isinstance(source, Module) else load(source).module
    return run_pipeline(module, pipeline, target=chosen, check=check, dump=Path(dump) if dump else None, table=table)


def plan(source: Any, on: str, *, trust_remote_code: bool = False, **asked: Any) -> dict[str, Any]:
    """Return whether and how a model runs on a system, and how fast: what `moec plan --json` prints.

    `source` is a checkpoint folder (a config.json is enough), a .moir file or an artifact; `on` a system's name,
    `nvidia-h200:8`, a TOML file, or `here`. The rest is as in targets.serving.plan.Request: engine, weights, tp, attention_dp, ep, pp,
    batch, input, output ... A config is imported once in a process. MoecError for what cannot be, with what can.
    """
    from ..targets.serving.plan import Request, make_plan

    request = Request.of(on, asked)
    return make_plan(import_workload(source, trust_remote_code=trust_remote_code), request)


def import_workload(source: Path | str, *, trust_remote_code: bool = False) -> Workload:
    """Return what a model asks of a system, imported from its config once in a process while the file is the same."""
    path = check_source(source)
    config = path / "config.json" if path.is_dir() else path
    stamp = config.stat() if config.is_file() else path.stat()
    key = (str(path.resolve()), stamp.st_mtime_ns, stamp.st_size, trust_remote_code)
    if key not in _WORKLOADS:
        from ..targets.serving.workload import read_workload
        from .frontends.load import load

        declare_kernel_ops()
        _WORKLOADS[key] = read_workload(fused_module(load(path, trust_remote_code=trust_remote_code).module))
    return _WORKLOADS[key]


def fused_module(module: Module) -> Module:
    """Return a program of stage moe as any target takes it; later stages stay as they are."""
    if module.stage != "graph":
        return module
    from ..targets.target import FUSED
    from .rewrite.pipeline import run_pipeline

    return run_pipeline(module, FUSED, table=PASSES).module


def predict(
    module: Module, target: str, options: Mapping[str, str] | None = None, *,
    quantize: str | None = None, kv: str | None = None, batch: int = 1, new: int = 1, past: int = 0, devices: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """Return how long a step of a module is predicted to take on an accelerator, lowered as `compile` does with `quantize` and `kv`.

    For the step see targets.target.Predict. MoecError for a target that is no accelerator, for a program that was
    compiled for another one, and for a figure of the chip that is unknown.
    """
    chosen = open_target(target, options or {})
    declare_kernel_ops(chosen)
    if chosen.predict is None:
        raise MoecError(f"target {target} is not known by figures", todo="name an accelerator; moec targets lists them")
    if module.stage == "kernel":
        for function in module.functions:
            for reason in filter(None, map(chosen.ops.supported, function.ops)):
                raise MoecError(reason, f"@{function.name}", todo="inspect the checkpoint that it was compiled from")
    return chosen.predict(lower_for(module, chosen, quantize, kv), batch=batch, new=new, past=past, devices=devices)


def lower_for(module: Module, target: Target, quantize: str | None = None, kv: str | None = None) -> Module:
    """Return a module as `compile` lowers it for a target; formats that ask for a text are not known without one."""
    from .rewrite.pipeline import remaining_passes, run_pipeline

    declare_kernel_ops(target)
    table = passes_for(target)
    whole, _ = with_quantization(target.store_caches(target.pipeline, kv), read_request(quantize), module)
    return run_pipeline(module, remaining_passes(module, whole, table), target=target, table=table).module


def register(*brought: Target | PassDef | Rule) -> None:
    """Take a program's own passes, rules and targets, so that they are found by name; ops are there once `@op` declared them.

    A rule becomes a pass of its name that applies it. MoecError for a name that moec has itself:
    >>> moec.register(leave_out_two_signs); moec.opt(module, "leave-out-two-signs")  # doctest: +SKIP
    """
    from .rewrite.rules import Rule, pass_of_rule

    for thing in brought:
        made = pass_of_rule(thing) if isinstance(thing, Rule) else thing
        if not isinstance(made, (Target, PassDef)):
            raise MoecError(f"a {type(thing).__name__} cannot be registered", todo="give a pass, a rule or a Target")
        group = BROUGHT_TARGETS if isinstance(made, Target) else BROUGHT_PASSES
        own = {*OWN} if isinstance(made, Target) else {*PASSES, LOWER}
        if made.name in own:
            raise MoecError(f"moec has {made.name} itself", todo="choose another name")
        register_brought(group, made.name, made)
