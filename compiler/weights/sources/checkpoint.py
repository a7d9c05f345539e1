"""A checkpoint folder of safetensors shards: opened by its headers, read a box at a time.

Which files count is decided as transformers does it: `model.safetensors` if it is there, else the shards that
`model.safetensors.index.json` names, else (for folders that were put together by hand) every `*.safetensors` file.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import math
import os
import re
import stat
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch

from ...errors import MoecError
from ...ir.dtypes import DTYPES
from ...ir.types import TensorType
from ..unchanged import Opened, stamp_of
from .safetensors_header import TensorInfo, parse_json, read_header
from .source import Box, check_box, full_box

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")  # a whole part of a name
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The tensors of a folder. Make it with `open_checkpoint`; it is a context manager and a `WeightSource`.

    `unreadable` says of names why no tensor of `tensors` has them, though the folder speaks of them: a dtype that is not
    understood, or an entry of the index for what no shard holds. They stop nothing as long as nobody needs them.
    `fingerprint` is a sha256 over config.json, the index and every shard's header; it stands for names, types and
    layout, not for the numbers, so that it costs no reading of the data. `opened.check()` says whether the files are
    still the same.
    """

    folder: Path
    tensors: Mapping[str, TensorInfo]
    fingerprint: str
    opened: Opened = field(repr=False)
    _descriptors: dict[Path, int] = field(repr=False)
    unreadable: Mapping[str, str] = field(default_factory=dict)

    def read(self, name: str, box: Box | None = None, expected: TensorType | None = None) -> torch.Tensor:
        """Return a tensor, or the part of it in `box`, with the dtype that it has in the checkpoint.

        Only the bytes of the box are read. `expected` is the type that a recipe gives to the tensor. Thread-safe.
        Raises MoecError for an unknown name, another type than expected, and read errors.
        """
        info = self.tensors.get(name)
        if info is None:
            raise self.lacks(name)
        if expected is not None and expected.plain != info.type:
            what = f"tensor {name!r} is {info.type} in the checkpoint, {expected} is wanted"
            todo = "the program was made from another checkpoint, or config.json does not belong to the weights"
            raise MoecError(what, str(info.file), todo=todo)
        sizes = info.type.sizes
        # a descriptor belongs to its file for the life of the checkpoint: pread has no position that threads share
        assert info.file is not None
        return read_box(info, self._descriptors[info.file], full_box(sizes) if box is None else check_box(box, sizes))

    def __post_init__(self) -> None:
        """Register a finalizer that closes the files, as after an import that failed."""
        weakref.finalize(self, _close_files, self._descriptors)

    def close(self) -> None:
        """Close the files; reading is over."""
        _close_files(self._descriptors)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def lacks(self, name: str) -> MoecError:
        """Return the error that says why a tensor cannot be read, or that there is none, and which names are like it."""
        if name in self.unreadable:
            todo = "convert the tensor, or download the checkpoint again"
            return MoecError(f"the tensor {name} {self.unreadable[name]}", str(self.folder), todo=todo)
        return MoecError(f"the checkpoint has no tensor {name}", str(self.folder), todo=self.like(name))

    def like(self, name: str) -> str:
        """Return a text that names similar tensors, for an error about a missing one."""
        gone = _missing_part([file.name for file in self.opened.stamps])
        return f"{gone} is missing: finish the download" if gone else names_like(name, self.tensors)


def _missing_part(names: Iterable[str]) -> str | None:
    """Return the name of the first shard that is not among names such as model-00001-of-00002.safetensors."""
    known = set(names)
    for name in sorted(known):
        if found := re.fullmatch(r"(.*-)(\d+)(-of-)(\d+)(\..*)", name):
            start, digits, of, count, end = found.groups()
            for number in range(1, min(int(count), 10_000) + 1):
                part = f"{start}{number:0{len(digits)}}{of}{count}{end}"
                if part not in known:
                    return part
    return None


def names_like(name: str, names: Iterable[str]) -> str:
    """Return a text with names similar to a missing one, or with examples of the names that exist."""
    names = list(names)
    near = closest_names(name, names)
    if near:
        return f"the closest names that are there: {', '.join(near)}"
    return f"config.json and the weights do not belong together: the tensors have names such as {', '.join(names[:3])}"


def closest_names(name: str, names: Iterable[str]) -> list[str]:
    """Return the names that are most like a name: those that end alike, best first; none where nothing is like it."""
    parts, number = name.split("."), first_number(name)
    # difflib is slow; names of other layers cannot be closer than those of the layer itself
    own = [other for other in names if first_number(other) == number]
    ends = {parts[-1], parts[-2] if len(parts) > 1 else ""}
    found = [other for other in own if ends & set(other.split(".")[-2:])] or own
    return difflib.get_close_matches(name, found[:5000], n=3, cutoff=0.6)


def first_number(name: str) -> int | None:
    """Return the first number among the parts of a name: the layer."""
    found = _NUMBER.search(name)
    return int(found[0]) if found else None


def around_number(name: str) -> tuple[str, str]:
    """Return what stands before the first number among the parts of a name, and behind it; all before if there is none."""
    found = _NUMBER.search(name)
    return (name[: found.start()], name[found.end() :]) if found else (name, "")


def _close_files(descriptors: dict[Path, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint folder: find its shards, read and check their headers.

    Raises MoecError (exit code 2) for missing, truncated or lying files, and for formats that are never opened.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MoecError("there is no such folder", str(folder), todo="give a folder with config.json and *.safetensors")
    digest = hashlib.sha256()
    index = None if (folder / SINGLE).is_file() else _read_index(folder)
    names = _shard_names(folder, index)
    descriptors: dict[Path, int] = {}
    try:
        for name in ("config.json", INDEX):
            content = _read_small(folder / name)
            digest.update(f"{name} {-1 if content is None else len(content)}\n".encode() + (content or b""))
        shards: dict[str, Mapping[str, TensorInfo]] = {}
        unreadable: dict[str, str] = {}
        for name in names:
            descriptors[folder / name] = open_regular(folder / name)
            header = read_header(folder / name, descriptors[folder / name])
            shards[name] = header.tensors
            unreadable |= header.unreadable
            digest.update(os.fsencode(f"{name} {len(header.content)}\n") + header.content)
        tensors = _join_shards(folder, shards, index or {})
    except BaseException:
        _close_files(descriptors)
        raise
    for name, shard in (index or {}).items():
        if name not in tensors and name not in unreadable:
            unreadable[name] = f"is in {shard} by the index, and no shard holds it"
    found = digest.hexdigest()
    opened = Opened({f: stamp_of(d) for f, d in descriptors.items()}, found, partial(_fingerprint_again, folder))
    return Checkpoint(folder, MappingProxyType(tensors), found, opened, descriptors, MappingProxyType(unreadable))


def _fingerprint_again(folder: Path) -> str:
    with open_checkpoint(folder) as found:
        return found.fingerprint


def _read_small(file: Path) -> bytes | None:
    try:
        return file.read_bytes() if file.is_file() else None
    except OSError as error:
        raise MoecError(f"cannot read the file: {error.strerror}", str(file)) from error


def _read_index(folder: Path) -> dict[str, str] | None:
    """Return the index's map from tensor to shard name; None without an index."""
    file = folder / INDEX
    text = _read_small(file)
    if text is None:
        return None
    content = parse_json(text, file, "the index")
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shard_of, dict) or not all(isinstance(name, str) for name in shard_of.values()):
        what = "the index has no weight_map from tensor names to file names"
        raise MoecError(what, str(file), todo="download the file again")
    for tensor, name in shard_of.items():
        # Only the name is judged: the files of a Hugging Face cache are links out of the folder, made by the cache,
        # whereas a name comes with the download and must not reach other files of the machine.
        if name in ("", ".", "..") or any(c in name for c in "/\\\0") or Path(name).is_absolute():
            what = f"the index points outside the folder: {tensor!r} is said to be in {name!r}"
            raise MoecError(what, str(file), todo="shards must lie in the folder itself; do not trust this checkpoint")
    return shard_of


def _shard_names(folder: Path, index: Mapping[str, str] | None) -> list[str]:
    if index is not None:
        names = sorted(set(index.values()))
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            what = f"shard {missing[0]}{more} is missing: the index names {len(names)} shards"
            raise MoecError(what, str(folder / missing[0]), todo="finish the download")
        if names:
            return names
    if (folder / SINGLE).is_file():
        return [SINGLE]
    names = sorted(f.name for f in folder.glob("*.safetensors") if not f.name.startswith("."))
    if names:
        return names
    pickles = sorted(f.name for pattern in _PICKLES for f in folder.glob(pattern))
    if pickles:
        what = f"the folder has no safetensors files, only {pickles[0]}"
        todo = "pickle files can run code and are never opened: convert the model to safetensors"
        raise MoecError(what, str(folder), todo=f"{todo} (save_pretrained of transformers does)")
    raise MoecError("the folder has no safetensors files", str(folder), todo="give the folder that holds the weights")


def open_regular(file: Path) -> int:
    """Open a regular file for reading; MoecError says why it cannot be opened."""
    try:
        # looked at before it is opened: opening a pipe would wait for a writer
        if not stat.S_ISREG(file.stat().st_mode):
            raise MoecError("this is not a regular file", str(file), todo="shards must be files")
        return os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise MoecError(f"cannot open the shard: {error.strerror}", str(file)) from error


def _join_shards(
    folder: Path, shards: Mapping[str, Mapping[str, TensorInfo]], index: Mapping[str, str]
) -> dict[str, TensorInfo]:
    """Return all tensors by name. As in transformers, what the shards hold counts; the index decides between two of a name."""
    found: dict[str, TensorInfo] = {}
    for shard, tensors in shards.items():
        for tensor, info in tensors.items():
            said = index.get(tensor)
            if said is not None and said != shard and tensor in shards[said]:
                continue
            if tensor in found:
                other = found[tensor].file
                what = f"tensor {tensor!r} is in two files: {other.name if other else ''} and {shard}"
                raise MoecError(what, str(folder), todo=f"keep the files of one model, or add {INDEX}")
            found[tensor] = info
    return found


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of one safetensors file by name; MoecError for a file that is not whole."""
    descriptor = open_regular(file)
    try:
        header = read_header(file, descriptor)
        for name, reason in header.unreadable.items():
            raise MoecError(f"the tensor {name} {reason}", str(file))
        return {n: read_box(i, descriptor, full_box(i.type.sizes)) for n, i in header.tensors.items()}
    finally:
        os.close(descriptor)


def read_box(info: TensorInfo, descriptor: int, box: Box) -> torch.Tensor:
    """Return the part of a tensor that lies in a box, from its open file."""
    assert info.file is not None
    shape = tuple(stop - start for start, stop in box)
    item = info.type.bits // 8
    buffer = torch.empty(math.prod(shape) * item, dtype=torch.uint8)
    _read_into_buffer(info.file, descriptor, buffer, info.offset, item, info.type.sizes, box)
    if info.type.dtype == "bool":  # any byte may stand in a file; torch wants 0 and 1
        return buffer.ne(0).view(shape)
    return buffer.view(DTYPES[info.type.dtype].torch).view(shape)


def _read_into_buffer(
    file: Path, descriptor: int, buffer: torch.Tensor, offset: int, item: int, sizes: tuple[int, ...], box: Box
) -> None:
    """Read the bytes of a box (row-major) into a byte buffer; `item` is the size of one element in bytes."""
    view = buffer.numpy().data
    position = 0
    try:
        for start, length in _contiguous_runs(sizes, box):
            done = 0
            while done < length * item:
                part = view[position + done : position + length * item]
                got = os.preadv(descriptor, [part], offset + start * item + done)
                if got == 0:
                    todo = "do not change the checkpoint meanwhile"
                    raise MoecError("the file got shorter while it was read", str(file), todo=todo)
                done += got
            position += length * item
    except OSError as error:
        raise MoecError(f"cannot read the shard: {error.strerror}", str(file)) from error


def _contiguous_runs(sizes: tuple[int, ...], box: Box) -> Iterator[tuple[int, int]]:
    """Yield (start, length) in elements of each contiguous range of a box, in row-major order."""
    if any(start == stop for start, stop in box):
        return
    axis = len(sizes)  # the axes from here on are full, so that the range runs through them
    while axis and box[axis - 1] == (0, sizes[axis - 1]):
        axis -= 1
    if axis == 0:
        yield 0, math.prod(sizes)
        return
    axis -= 1  # the last axis that is cut: one range along it
    strides = [math.prod(sizes[k + 1 :]) for k in range(len(sizes))]
    start, stop = box[axis]
    for outer in itertools.product(*(range(low, high) for low, high in box[:axis])):
        base = sum(i * stride for i, stride in zip(outer, strides, strict=False))
        yield base + start * strides[axis], (stop - start) * strides[axis]
