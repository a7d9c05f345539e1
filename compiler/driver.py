"""The way through: source -> module -> passes -> kernels -> artifact. Read `compile` from top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..passes import PASSES
from ..targets import find_target
from . import frontends
from .artifact import Artifact, write_manifest
from .atomic import atomic_folder
from .compare import Comparison
from .errors import MoecError
from .frontends.load import Loaded
from .ir import STAGES, Module
from .fragments import parse_pipeline
from .pipeline import run_pipeline
from .printer import print_module
from .verify import verify as check_module

if TYPE_CHECKING:
    from ..targets.target import Target

Why = Callable[[str], None]
Progress = Callable[[int, int], None]  # bytes written, bytes in all

COPIED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def compile(
    source: Any,
    target: str = "cpu",
    out: Path | str | None = None,
    *,
    pipeline: str | None = None,
    dump: Path | str | None = None,
    check: bool = False,
    verify: bool = False,
    stop_after: str | None = None,
    options: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
    weights: Path | str | None = None,
    why: Why | None = None,
    progress: Progress | None = None,
) -> Artifact | Module:
    """Compile a source for a target into the folder `out`; return the artifact (with `stop_after`, the module).

    `source` is a checkpoint folder, a `.moir` file, an artifact, or a live transformers model; `weights` names the
    checkpoint folder of a `.moir` file. `stop_after` is a stage or a pass. `check` compares the numbers before and
    after every pass. Raises MoecError; the folder is then as it was before.
    """
    chosen = find_target(target, options or {})
    loaded = frontends.load(source, weights=weights, trust_remote_code=trust_remote_code)
    text = pipeline if pipeline is not None else chosen.pipeline
    module = _run_passes(loaded, text, chosen, dump, check, why, stop_after)
    if stop_after and stop_after != "kernel":
        return module
    if module.stage != "kernel":
        module = _lower(module, chosen, why)
    if stop_after:
        return module
    artifact = _emit(module, loaded, chosen, text, _output(source, loaded, chosen, out), progress)
    if verify:
        artifact.verify(against=None if isinstance(source, (str, Path)) else source)
    return artifact


def _run_passes(
    loaded: Loaded, text: str, target: Target, dump: Path | str | None, check: bool, why: Why | None, stop: str | None
) -> Module:
    """Run the pipeline from where the module stands: passes that read an earlier stage are behind it."""
    module = loaded.module
    passes = [
        (name, given)
        for name, given in parse_pipeline(text)
        if name not in PASSES
        or PASSES[name].reads == "any"
        or STAGES.index(PASSES[name].reads) >= STAGES.index(module.stage)
    ]
    if module.stage == "kernel":
        passes = []
    folder = Path(dump) if dump is not None else None
    result, _ = run_pipeline(module, passes, target=target, check=check, dump=folder, why=why, stop_after=stop)
    return result


def _lower(module: Module, target: Target, why: Why | None) -> Module:
    """Rewrite the module in the target's own ops and check that the target holds every one."""
    if module.stage != "moe":
        raise MoecError(f"the pipeline leaves stage {module.stage}; target {target.name} lowers stage moe")
    kernels = target.lower(module, why)
    check_module(kernels)
    for function in kernels.functions:
        for op in function.ops:
            reason = None if op.callee else target.unsupported(op)
            if reason:
                raise MoecError(f"target {target.name} has no kernel for {op.name}: {reason}", model=", ".join(op.loc))
    return kernels


def _emit(module: Module, loaded: Loaded, target: Target, text: str, out: Path, progress: Progress | None) -> Artifact:
    """Write the artifact beside its final name and put it in place when it is whole."""
    if loaded.weights is None:
        raise MoecError(
            "there are no weights to compile",
            where=str(loaded.folder or module.source or "the program"),
            todo="put the safetensors files beside config.json, name them with --weights DIR, or use --stop-after moe",
        )
    with atomic_folder(out) as partial:
        _copy_companions(loaded, partial)
        (partial / "program.moir").write_text(print_module(module), encoding="utf-8")
        facts = target.emit(module, loaded.weights, partial, progress)
        write_manifest(partial, module, source=_source_facts(module, loaded), target=target.name, pipeline=text,
                       moec=__version__, **facts)  # fmt: skip
    return Artifact.open(out)


def _copy_companions(loaded: Loaded, folder: Path) -> None:
    if loaded.folder is None:
        return
    for name in COPIED:
        if (loaded.folder / name).is_file():
            (folder / name).write_bytes((loaded.folder / name).read_bytes())


def _source_facts(module: Module, loaded: Loaded) -> dict[str, Any]:
    return {"name": module.source, "sha256": getattr(loaded.weights, "fingerprint", "")}


def _output(source: Any, loaded: Loaded, target: Target, out: Path | str | None) -> Path:
    if out is not None:
        return Path(out)
    if isinstance(source, (str, Path)) and loaded.folder is not None:
        return Path(f"{loaded.folder.resolve().name}-{target.name}")
    raise MoecError("the output folder is not named", todo="pass out=DIR (-o DIR)")


def load(source: Any, **options: Any) -> Module | Artifact:
    """Open an artifact folder, or import any other source as a module."""
    if isinstance(source, (str, Path)) and (Path(source) / "moec.json").is_file():
        return Artifact.open(Path(source))
    return frontends.load(source, **options).module


def opt(
    source: Any, passes: str, *, check: bool = False, dump: Path | str | None = None, why: Why | None = None
) -> Module:
    """Run passes on a module, a `.moir` file or any other source; return the module."""
    module = source if isinstance(source, Module) else frontends.load(source).module
    folder = Path(dump) if dump is not None else None
    return run_pipeline(module, parse_pipeline(passes), check=check, dump=folder, why=why)[0]


def verify(folder: Path | str, against: Any = None, **options: Any) -> Comparison:
    """Compare an artifact with its source model in transformers."""
    return Artifact.open(Path(folder)).verify(against=against, **options)
