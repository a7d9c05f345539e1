"""Puts moec's own kernels into an artifact: the nodes that they compute, the libraries beside the model, what is said of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from onnx import FunctionProto, NodeProto, TensorProto

from ....compiler.errors import MoecError
from ....compiler.ir.notes import Note
from ..options import OwnKernels
from .library import find_compiler, made_libraries, this_platform, write_libraries
from .nodes import divide_nodes, use_kernels


class Placed(NamedTuple):
    """The model's functions, the sha256 of each library by its file, what moec.json says of them, and notes for the user.

    `library` is the file for this platform, or the first one.
    """

    functions: Sequence[FunctionProto] = ()
    files: Mapping[str, str] = MappingProxyType({})
    entry: Mapping[str, Any] = MappingProxyType({})
    notes: tuple[Note, ...] = ()
    library: str | None = None


def place_kernels(
    asked: OwnKernels, nodes: Sequence[NodeProto], initializers: Mapping[str, TensorProto], folder: Path
) -> Placed:
    """Move the nodes that the kernels compute to them, and write the libraries into the folder.

    Where no node is one of theirs, or no library can be compiled, the nodes stay ONNX Runtime's.
    """
    division = divide_nodes(nodes, initializers)
    left = {"onnxruntime": dict(sorted(division.left.items()))} if division.left else {}
    if not division.taken:
        return Placed(entry=left)
    try:
        compiler = asked.compiler or find_compiler()
        if compiler is None:
            raise MoecError("the package ziglang is not installed", todo="run `pip install ziglang`")
        made = made_libraries(asked.platforms, compiler)
    except MoecError as error:
        if asked.required:
            raise
        note = Note(f"ONNX Runtime's operators compute, without moec's kernels, which are faster: {error.what}")
        return Placed(entry={"onnxruntime": {error.what: len(division.taken)}}, notes=(note,))
    files = write_libraries(folder, made)
    entry = {
        "operators": dict(sorted(Counter(node.op_type for node in division.taken).items())),
        "libraries": {place.name: {"file": place.file, "sha256": files[place.file]} for place in made},
        "compiler": compiler.version,
        **left,
    }
    own = this_platform()
    library = own if own in made else next(iter(made))
    return Placed(use_kernels(division.taken), files, entry, library=library.file)
