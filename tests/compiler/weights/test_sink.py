"""The streamed data file: places, bytes, hashes, a full disk, memory."""

import errno
import hashlib
import os
import resource
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from moec.compiler.errors import MoecError
from moec.compiler.formats.table import format_of
from moec.compiler.ir.recipes import Literal, Recipe, Step, Tensor
from moec.compiler.ir.types import TensorType
from moec.compiler.weights.evaluate import evaluate_recipe
from moec.compiler.weights.kept_codes import pack_codes, take_apart
from moec.compiler.weights.sink import DataFile
from moec.compiler.weights.sources.checkpoint import open_checkpoint
from moec.compiler.weights.sources.source import RandomSource
from moec.compiler.weights.steps.table import step
from moec.compiler.weights.tiles import tile_boxes
from safetensors.torch import save_file


def leaf(name: str, dtype: str, *sizes: int) -> Tensor:
    return Tensor(name, TensorType.of(dtype, *sizes))


def test_data_file(tmp_path: Path) -> None:
    source, told = RandomSource(), []
    recipes: list[Recipe] = [
        leaf("small", "bf16", 3),
        step("cast", leaf("big", "bf16", 300, 70), to="f32"),
        leaf("e8m0", "f8e8m0", 5),
        leaf("page", "i8", 4096),
        leaf("small", "bf16", 3),
        leaf("flags", "bool", 7),
        leaf("none", "f32", 0, 3),
        Literal(TensorType.of("f32", 1), (0.0,)),
        Literal(TensorType.of("f32", 1), (-0.0,)),
    ]
    with DataFile(tmp_path / "data", tile_bytes=5000, progress=told.append) as file:
        places = [file.append(recipe, source) for recipe in recipes]
        assert file.append(recipes[0], RandomSource(7)) != places[0]  # another source, other numbers
    content = (tmp_path / "data").read_bytes()
    assert file.sha256 == hashlib.sha256(content).hexdigest() and file.size == len(content)
    used = bytearray(len(content))
    for recipe, (offset, length) in zip(recipes, places, strict=True):
        assert content[offset : offset + length] == bytes(evaluate_recipe(recipe, source).reshape(-1).view(torch.uint8))
        assert offset % (4096 if length >= 4096 else 64) == 0
        used[offset : offset + length] = b"\1" * length
    assert not any(byte for byte, taken in zip(content[: places[-1][0]], used, strict=False) if not taken)  # zeros
    assert places[0] == places[4] and places[7] != places[8]
    assert (
        told == sorted(told) and told[-1] == sum(dict(places).values()) + 6 and len(told) > 15
    )  # 6: of the other source


def test_data_file_is_the_same_every_time(tmp_path: Path) -> None:
    recipe = step("cast", step("stack", leaf("e.{0..9}", "bf16", 64, 48)), to="f32")
    digests = set()
    for i, tile in enumerate((1000, 30_000, 1 << 20)):
        with DataFile(tmp_path / str(i), tile) as file:
            file.append(recipe, RandomSource())
        digests.add(file.sha256)
    assert len(digests) == 1


def test_data_file_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = [100_000]
    write, one_at_a_time = os.pwrite, threading.Lock()

    def tight(descriptor: int, data: memoryview, offset: int) -> int:
        """A disk that writes less than it was given, and then nothing."""
        with one_at_a_time:
            if len(data) and not room[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            done = write(descriptor, data[: min(room[0], 1 + len(data) // 2)], offset)
            room[0] -= done
        return done

    monkeypatch.setattr(os, "pwrite", tight)
    with DataFile(tmp_path / "x.data", 16384) as file:
        assert file.append(leaf("fits", "f32", 100, 100), RandomSource()) == (0, 40_000)
        assert file.sha256 == hashlib.sha256((tmp_path / "x.data").read_bytes()).hexdigest()
        with pytest.raises(MoecError, match=r"no space left on the device while writing x\.data") as caught:
            file.append(leaf("does not", "f32", 200, 200), RandomSource())
    assert caught.value.where == str(tmp_path / "x.data") and "free some space" in caught.value.todo


def test_data_file_over_a_limit(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with DataFile(tmp_path / "x.data") as file, pytest.raises(MoecError, match="larger than a file may be here"):
            file.append(leaf("big", "f32", 300, 300), RandomSource())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(MoecError, match=r"cannot write x\.data: No such file or directory"):
        DataFile(tmp_path / "missing" / "x.data")


def test_errors_of_the_source_arrive(tmp_path: Path) -> None:
    """An error in the thread that prepares tiles is the one that the caller sees."""
    save_file({"a": torch.ones(1000, 100)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint, DataFile(tmp_path / "data", 10_000) as file:
        with pytest.raises(MoecError, match="no tensor b"):
            file.append(step("concat", leaf("a", "f32", 1000, 100), leaf("b", "f32", 10, 100), axis=0), checkpoint)
        os.truncate(tmp_path / "model.safetensors", 5000)
        with pytest.raises(MoecError, match="got shorter"):
            file.append(leaf("a", "f32", 1000, 100), checkpoint)


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    """Counted by torch's own allocations, which are where tiles live."""
    kind = TensorType.of("bf16", 512, 2048)
    shape = [step("cast", step("stack", Tensor(f"e.{{0..{n - 1}}}", kind)), to="f32") for n in (8, 24)]
    zeros = {f"e.{i}": torch.zeros(512, 2048, dtype=torch.bfloat16) for i in range(24)}
    save_file(zeros, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        for recipe in shape:
            assert max(_largest(recipe, box, checkpoint) for box in tile_boxes(recipe.type, 1 << 20)) <= 1 << 20


def _largest(recipe: Step, box: Any, source: Any) -> int:
    with torch.profiler.profile(profile_memory=True) as profile:
        evaluate_recipe(recipe, source, box)
    return max(event.self_cpu_memory_usage for event in profile.events())


def test_scales_of_one_column_have_the_strides_of_their_own(tmp_path: Path) -> None:
    """A transposed scale of one group a row keeps the stride of the axis that is gone, which torch cannot view as bytes."""
    codes = step("transpose", leaf("codes", "u8", 32, 48), perm=(1, 0))
    scales = step("transpose", leaf("scales", "f32", 1, 48), perm=(1, 0))
    weight = pack_codes(take_apart(step("dequantize", codes, scales, block=(1, 32), bits=4)), format_of("uint4_g32"))
    with DataFile(tmp_path / "data", tile_bytes=1 << 16) as file:
        file.append(step("codes", weight), RandomSource())
        offset, length = file.append(step("scales", weight), RandomSource())
    written = (tmp_path / "data").read_bytes()[offset : offset + length]
    assert written == bytes(RandomSource().read("scales", None, scales.items[0].type).reshape(-1).view(torch.uint8))
