"""Any source to a module and the weights that its recipes read."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MoecError
from ..errors.hub import find_cached
from ..errors.json_files import problem_of
from ..errors.paths import check_path, check_source, find_source
from ..ir.module import Module
from ..ir.notes import Note
from ..ir.types import TensorType
from ..weights.sources.source import WeightSource
from .companions import gguf_companions, live_companions, read_companions
from .replaced.stand_ins import StandIn
from .transformers.merge import merge_functions

if TYPE_CHECKING:
    from .onnx.model import Imported

LIVE = "python:"  # how the source of a live module starts


@dataclass(frozen=True)
class Loaded:
    """A module, where its weights are read (None: there are none) and the checkpoint's folder, if any.

    `left_out` are tensors of the checkpoint that the program does not read, on purpose: what drafts tokens, say.
    `brought` are files that come with a live model or out of a GGUF file's metadata (see companions.py). `replaced` says in
    the place of what code of transformers functions of moec stand (see replace.py). `notes` say what was not understood and
    is carried through as it is. `caches` is what an artifact of moec that is read again stores keys and values as, if not as f32.
    """

    module: Module
    weights: WeightSource | None
    folder: Path | None
    left_out: Mapping[str, TensorType] = field(default_factory=dict)
    replaced: tuple[StandIn, ...] = ()
    brought: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()
    caches: str | None = None

    def need_weights(self) -> WeightSource:
        """Return where the weights are read; MoecError if there are none."""
        if self.weights is None:
            raise MoecError(
                "there are no weights to compile",
                where=str(self.folder or self.module.source or "the program"),
                todo="put the safetensors files beside config.json, name them with --weights DIR, or use --stop-after moe",
            )
        return self.weights

    def companions(self) -> dict[str, bytes]:
        """Return the files that travel with the weights, by name: those of the folder, or what a live model brings."""
        return {**(read_companions(self.folder) if self.folder else {}), **self.brought}


def load(
    source: Any,
    *,
    weights: Path | str | None = None,
    tokenizer: Any = None,
    example_inputs: Any = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load a checkpoint folder, a `.moir` file, an artifact folder, a torch module, a torch program or an ONNX model.

    `weights` names the checkpoint folder of a `.moir` file, in place of the one that stands in it. `tokenizer` is that of
    a live model: one of transformers, or a folder; by default that of the folder which the model was loaded from.
    `example_inputs` are what any other torch module is called with: a tensor, a tuple of tensors, or a dict by name.
    """
    if example_inputs is not None and isinstance(source, (str, Path)):
        raise MoecError("example inputs belong to a torch module", todo="leave them out, or give the module itself")
    if tokenizer is not None and isinstance(source, (str, Path)):
        raise MoecError("a tokenizer belongs to a live model", todo="put its files into the folder")
    if weights is not None:
        check_path(weights, "the weights")
    if isinstance(source, (str, Path)):
        return _load_path(check_source(source), str(source), weights, trust_remote_code)
    import torch

    if isinstance(source, torch.export.ExportedProgram):
        return _load_program(source, f"{LIVE}{type(source).__name__}")
    if isinstance(source, torch.nn.Module):
        return _load_live(source, tokenizer, example_inputs)
    if type(source).__name__ == "ModelProto":
        from .onnx.model import import_model, source_of

        return _imported(import_model(source, source_of(source), f"{LIVE}ModelProto"))
    raise MoecError(
        f"a source cannot be a {type(source).__name__}",
        todo="give a checkpoint folder, a .moir file, an artifact, a torch module, an exported program or an ONNX model",
    )


@contextmanager
def _silence_output() -> Iterator[None]:
    """Discard what a model's code prints while it is built and traced: standard output is for results."""
    from transformers.utils import logging

    logging.get_logger()  # makes its handler, which keeps the stream that it begins with
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def _load_path(path: Path, name: str, weights: Path | str | None, trust_remote_code: bool) -> Loaded:
    if path.is_dir() and (path / "program.moir").is_file():
        path = path / "program.moir"
    if path.suffix == ".moir":
        return _load_text(path, weights)
    if weights is not None:
        todo = "leave them out: this source brings its own"
        raise MoecError("weights are named for a .moir source only", str(weights), todo=todo)
    if path.suffix == ".pt2" and path.is_file():
        from .programs.archive import open_archive

        return _load_program(open_archive(path), name)
    if is_onnx(path):
        from .onnx.model import import_file

        loaded = _imported(import_file(path, name))
        generates = any(value.name == "input_ids" for value in loaded.module.main.params)  # then a tokenizer is of use
        return replace(loaded, brought=read_companions(path.parent)) if generates else loaded
    if (file := gguf_file(path)) is not None:
        from .gguf.model import import_gguf
        from .transformers.huggingface import check_weights

        found: list[StandIn] = []
        with _silence_output():
            module, opened = import_gguf(file, name.rstrip("/"), found)
        check_weights(module, opened.checkpoint)
        rows = opened.checkpoint.tensors["token_embd.weight"].type.sizes[0]
        brought = gguf_companions(opened.metadata, int(rows), file)
        return Loaded(merge_functions(module), opened.checkpoint, file.parent, replaced=tuple(found), brought=brought)
    from .transformers.huggingface import import_folder

    replaced: list[StandIn] = []
    with _silence_output():
        module, checkpoint, left_out = import_folder(
            path, name.rstrip("/"), trust_remote_code=trust_remote_code, replaced=replaced
        )
    return Loaded(merge_functions(module), checkpoint, path, left_out, tuple(replaced))


def _imported(found: Imported) -> Loaded:
    from .onnx.interface import stored_type

    return Loaded(found.module, found.weights, None, notes=found.notes, caches=stored_type(found.states))


def gguf_file(path: Path) -> Path | None:
    """Return the GGUF file (the first of several parts) that a path names, or that a folder holds in place of shards."""
    if path.suffix == ".gguf" and path.is_file():
        return path
    found = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if not found or any(path.glob("*.safetensors")):
        return None
    first = [file for file in found if not re.search(r"-of-\d{5}\.gguf$", file.name) or "-00001-of-" in file.name]
    if len(first) != 1:
        raise MoecError(f"the folder has {len(first)} GGUF models", where=str(path), todo="name one of the files")
    return first[0]


def _load_text(path: Path, weights: Path | str | None) -> Loaded:
    from ..text.parser import parse_module

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else problem_of(error)
        raise MoecError(f"cannot read the file: {reason}", where=str(path)) from None
    module = parse_module(text, str(path))
    folder = find_weights(module, path, weights)
    if folder is None:
        return Loaded(module, None, None)
    from ..weights.sources.checkpoint import open_checkpoint
    from .text_weights import check_text_weights
    from .transformers.huggingface import has_weights

    if is_onnx(folder):
        from .onnx.model import import_file

        found = import_file(folder, str(folder)).weights  # the names of its constants are made while it is read
        check_text_weights(module, found, text, path)
        return Loaded(module, found, None)
    if (file := gguf_file(folder)) is not None:
        from ..weights.sources.gguf import open_gguf

        opened = open_gguf(file)
        check_text_weights(module, opened.checkpoint, text, path)
        return Loaded(module, opened.checkpoint, file.parent)
    if not has_weights(folder):
        return Loaded(module, None, folder)
    checkpoint = open_checkpoint(folder)
    check_text_weights(module, checkpoint, text, path)
    return Loaded(module, checkpoint, folder)


def find_weights(module: Module, path: Path, weights: Path | str | None) -> Path | None:
    """Return the checkpoint folder of a program: `weights`, or its source as paths.find_source finds it."""
    if weights is not None:
        folder = Path(weights) if Path(weights).exists() else find_cached(weights) or Path(weights)
        if not folder.is_dir() and gguf_file(folder) is None and not is_onnx(folder):
            raise MoecError("the weights are neither a folder nor a GGUF or ONNX file", where=str(weights))
        return folder
    if not module.source or module.source.startswith(LIVE):
        return None
    found = find_source(module.source, path.parent)
    holds = found is not None and (found.is_dir() or gguf_file(found) is not None or is_onnx(found))
    return found if holds else None


def is_onnx(path: Path) -> bool:
    """Return whether a path is an ONNX file, by its name."""
    return path.suffix == ".onnx" and path.is_file()


def _load_program(program: Any, name: str) -> Loaded:
    from ..weights.sources.source import ModuleSource
    from .programs.exported import import_program

    module, tensors = import_program(program, name)
    return Loaded(module, ModuleSource(tensors), None)


def _load_live(model: Any, tokenizer: Any, example_inputs: Any) -> Loaded:
    from transformers import PreTrainedModel

    if example_inputs is not None:
        from .programs.live import export_module

        return _load_program(export_module(model, example_inputs), f"{LIVE}{type(model).__name__}")
    if not isinstance(model, PreTrainedModel):
        raise MoecError(
            f"a live {type(model).__name__} is called with inputs that are not known",
            todo="give example_inputs=, or a causal LM of transformers",
        )
    from ..weights.sources.source import ModuleSource
    from .transformers.huggingface import import_live

    replaced: list[StandIn] = []
    with _silence_output():
        module, tensors = import_live(model, replaced)
    brought = live_companions(model, tokenizer)
    return Loaded(merge_functions(module), ModuleSource(tensors), None, replaced=tuple(replaced), brought=brought)
