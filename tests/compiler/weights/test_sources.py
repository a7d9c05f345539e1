"""Checkpoints and other sources of weights: every dtype, boxes, shards, hostile files."""

import gc
import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from boxes import boxes_of, same
from hypothesis import given, settings
from hypothesis import strategies as st
from moec.compiler.errors import MoecError
from moec.compiler.ir.dtypes import DTYPES, dtype_name
from moec.compiler.ir.recipes import Tensor
from moec.compiler.ir.types import TensorType
from moec.compiler.weights.evaluate import evaluate_recipe
from moec.compiler.weights.sources.checkpoint import INDEX, open_checkpoint, read_tensors
from moec.compiler.weights.sources.safetensors_header import SAFETENSORS_DTYPES
from moec.compiler.weights.sources.source import ModuleSource, RandomSource, slice_box
from safetensors.torch import save_file


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """Return the bytes of a safetensors file with any header, valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def every_dtype() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found = {name: (torch.randn(3, 5, 4) * 3).to(dtype.torch) for name, dtype in DTYPES.items() if name != "f8e8m0"}
    found["f8e8m0"] = torch.randint(0, 256, (3, 5, 4), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    return {**found, "scalar": torch.tensor(2.5), "none": torch.zeros(0, 4)}


# --- the checkpoint ---------------------------------------------------------------------------------------------


def test_every_dtype_and_box(tmp_path: Path) -> None:
    tensors = every_dtype()
    save_file(tensors, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == set(tensors) and set(SAFETENSORS_DTYPES.values()) == set(DTYPES)
        for name, tensor in tensors.items():
            assert checkpoint.tensors[name].type == TensorType.of(dtype_name(tensor.dtype), *tensor.shape)
            assert same(checkpoint.read(name), tensor)
        full = (0, 4)
        for box in (((1, 2), (0, 5), full), ((0, 3), (2, 4), full), ((1, 3), (0, 5), (1, 3)), ((1, 1), (0, 5), full)):
            for name in DTYPES:
                assert same(checkpoint.read(name, box), slice_box(tensors[name], box))
        with pytest.raises(ValueError, match="does not lie in"):
            checkpoint.read("f32", ((0, 4), (0, 5), (0, 4)))
        with pytest.raises(MoecError, match="no tensor scaler") as caught:
            checkpoint.read("scaler")
        assert "scalar" in caught.value.todo
        with pytest.raises(MoecError, match=r"'f32' is f32\[3, 5, 4\] in the checkpoint, bf16\[3, 5, 4\] is wanted"):
            checkpoint.read("f32", None, TensorType.of("bf16", 3, 5, 4))


def test_all_tensors_of_one_file(tmp_path: Path) -> None:
    tensors, file = every_dtype(), tmp_path / "layer.safetensors"
    save_file(tensors, file)
    found = read_tensors(file)
    assert set(found) == set(tensors) and all(same(found[name], tensor) for name, tensor in tensors.items())
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(MoecError, match="the file"):
        read_tensors(file)


def test_bool_bytes_are_normalised(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw({"b": entry(0, 3, [3], "BOOL")}, b"\x00\x02\x01"))
    with open_checkpoint(tmp_path) as checkpoint:
        assert same(checkpoint.read("b"), torch.tensor([False, True, True]))


def test_reads_from_many_threads(tmp_path: Path) -> None:
    tensor = torch.arange(64 * 1000, dtype=torch.int32).reshape(64, 1000)
    save_file({"x": tensor}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint, ThreadPoolExecutor(8) as pool:
        boxes = [((i % 64, i % 64 + 1), (i % 7, 900)) for i in range(400)]
        parts = pool.map(lambda box: checkpoint.read("x", box), boxes)
        assert all(same(part, slice_box(tensor, box)) for part, box in zip(parts, boxes, strict=True))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_random_boxes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 5), max_size=4))
    folder = tmp_path_factory.mktemp("boxes")
    tensor = torch.arange(torch.Size(sizes).numel(), dtype=torch.int16).reshape(sizes)
    save_file({"before": torch.ones(3), "x": tensor}, folder / "model.safetensors")
    with open_checkpoint(folder) as checkpoint:
        box = data.draw(boxes_of(sizes, allow_empty=True))
        assert same(checkpoint.read("x", box), slice_box(tensor, box))


def shards(folder: Path, parts: dict[str, dict[str, torch.Tensor]], index: dict[str, str] | None = None) -> Path:
    for name, tensors in parts.items():
        save_file(tensors, folder / name)
    if index is not None:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def test_shards_with_and_without_an_index(tmp_path: Path) -> None:
    parts = {"one.safetensors": {"a": torch.ones(2)}, "two.safetensors": {"b": torch.zeros(3), "a": torch.ones(1)}}
    with pytest.raises(MoecError, match=r"'a' is in two files: one\.safetensors and two\.safetensors"):
        open_checkpoint(shards(tmp_path, parts))
    shards(tmp_path, {}, {"a": "one.safetensors", "b": "two.safetensors"})
    (tmp_path / "adapter.safetensors").write_bytes(b"not named by the index")
    with open_checkpoint(tmp_path) as checkpoint:
        assert same(checkpoint.read("a"), torch.ones(2)) and set(checkpoint.tensors) == {"a", "b"}


def test_model_safetensors_wins_over_an_index(tmp_path: Path) -> None:
    """As in transformers: a folder saved again may hold a stale index."""
    shards(tmp_path, {"model.safetensors": {"a": torch.ones(2)}}, {"a": "missing.safetensors"})
    with open_checkpoint(tmp_path) as checkpoint:
        assert same(checkpoint.read("a"), torch.ones(2))


def test_the_links_of_a_hugging_face_cache(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, tmp_path / "blobs" / "cafe")
    (snapshot / "model-00001-of-00001.safetensors").symlink_to("../../blobs/cafe")
    shards(snapshot, {}, {"a": "model-00001-of-00001.safetensors"})
    with open_checkpoint(snapshot) as checkpoint:
        assert same(checkpoint.read("a"), torch.ones(2))


def test_fingerprint(tmp_path: Path) -> None:
    def fingerprint(tensors: dict[str, torch.Tensor], config: str | None = None) -> str:
        save_file(tensors, tmp_path / "model.safetensors")
        if config is not None:
            (tmp_path / "config.json").write_text(config)
        with open_checkpoint(tmp_path) as checkpoint:
            return checkpoint.fingerprint

    first = fingerprint({"a": torch.ones(2)})
    assert first == fingerprint({"a": torch.zeros(2)}) and len(first) == 64  # the data is not read
    renamed = fingerprint({"b": torch.ones(2)})
    configured = [fingerprint({"a": torch.ones(2)}, config) for config in ("{}", "{ }")]
    assert len({first, renamed, *configured}) == 4


TWO = {"a": entry(0, 8, [2]), "b": entry(8, 16, [2])}
BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated: 0 bytes"),
    "header cut": (raw({"a": entry(0, 8, [2])})[:20], "truncated: its header claims to be"),
    "data cut": (raw(TWO, bytes(15)), "truncated: the header announces 16 bytes of data, there are 15"),
    "huge header": (b"\xff" * 64, "the safetensors format allows 100000000"),
    "long header": (raw(b"{}", length=90_000_000), "truncated: its header"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
    "not json": (raw(b"{nonsense}"), "the header is not JSON"),
    "not utf-8": (raw(b'{"\xff": 1}'), "the header is not JSON"),
    "nested": (raw(b'{"a":' + b"[" * 200_000), "the header is not JSON"),
    "nan": (raw(b'{"a": NaN}'), "NaN is not JSON"),
    "huge number": (raw(b'{"a": ' + b"9" * 5000 + b"}"), "the header is not JSON"),
    "list": (raw([]), "not a JSON object"),
    "spaces first": (raw(b"  {}"), "not a JSON object"),
    "twice": (raw(b'{"a": 1, "a": 2}'), "the header names 'a' twice"),
    "metadata": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "no shape": (raw({"a": {"dtype": "F32", "data_offsets": [0, 0]}}), "dtype, shape or data_offsets is missing"),
    "not a table": (raw({"a": 3}), "dtype, shape or data_offsets is missing"),
    "dtype list": (raw({"a": {**entry(0, 8, [2]), "dtype": ["F32"]}}, bytes(8)), "unknown dtype"),
    "negative shape": (raw({"a": entry(0, 8, [-2])}, bytes(8)), "no valid shape"),
    "float shape": (raw({"a": {**entry(0, 8, []), "shape": [2.0]}}, bytes(8)), "no valid shape"),
    "bool shape": (raw({"a": {**entry(0, 4, []), "shape": [True]}}, bytes(4)), "no valid shape"),
    "huge shape": (raw({"a": entry(0, 0, [2**62, 2**62, 0])}), "no valid shape"),
    "negative offset": (raw({"a": entry(-8, 0, [2])}, bytes(8)), "no valid data_offsets"),
    "backwards": (raw({"a": entry(8, 0, [2])}, bytes(8)), "no valid data_offsets"),
    "three offsets": (raw({"a": {**entry(0, 8, [2]), "data_offsets": [0, 8, 8]}}, bytes(8)), "no valid data_offsets"),
    "size": (raw({"a": entry(0, 8, [3])}, bytes(8)), r"lies about sizes: tensor 'a' F32\[3\] takes 12 bytes, not 8"),
    "overlap": (raw({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)), "'a' and 'b' overlap"),
    "same place": (raw({"a": entry(0, 8, [2]), "b": entry(0, 8, [2])}, bytes(8)), "'a' and 'b' overlap"),
    "hole": (raw({"a": entry(0, 8, [2]), "b": entry(12, 20, [2])}, bytes(20)), "4 bytes before tensor 'b'"),
    "hole at the start": (raw({"a": entry(4, 12, [2])}, bytes(12)), "4 bytes before tensor 'a'"),
    "rest": (raw(TWO, bytes(20)), "4 bytes at the end belong to no tensor"),
}


def open_files() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path: Path, case: str) -> None:
    content, message = BAD_FILES[case]
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    before = open_files()
    with pytest.raises(MoecError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.where == str(file) and caught.value.todo and caught.value.exit_code == 2
    assert "\n" not in caught.value.what and len(caught.value.what) < 400
    assert open_files() == before


def test_a_checkpoint_that_nobody_holds_closes_its_files(tmp_path: Path) -> None:
    """An import that fails has no place to close what it opened: its caller never sees it."""
    (tmp_path / "model.safetensors").write_bytes(raw(TWO, bytes(16)))
    before = open_files()
    opened = open_checkpoint(tmp_path)
    assert open_files() == before + (1 if before else 0)
    del opened
    gc.collect()
    assert open_files() == before


@given(st.binary(max_size=40), st.integers(0, 200), st.integers(0, 255))
@settings(max_examples=200, deadline=None)
def test_damaged_bytes(tmp_path_factory: pytest.TempPathFactory, tail: bytes, position: int, byte: int) -> None:
    """One changed byte and a changed end give a clear error or a checkpoint that can be read, never anything else."""
    folder = tmp_path_factory.mktemp("damaged")
    content = bytearray(raw(TWO, bytes(16)) + tail)
    content[position % len(content)] = byte
    (folder / "model.safetensors").write_bytes(content)
    try:
        with open_checkpoint(folder) as checkpoint:
            for name in checkpoint.tensors:
                checkpoint.read(name)
    except MoecError as error:
        assert error.exit_code == 2


INSIDE = "model-00001.safetensors"


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"{", "the index is not JSON"),
        (b"[]", "no weight_map"),
        (b'{"weight_map": {"a": 1}}', "no weight_map"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "the index names 'a' twice"),
        ({"a": "../x.safetensors"}, "outside the folder: 'a' is said to be in '../x.safetensors'"),
        ({"a": "/etc/passwd"}, "outside the folder"),
        ({"a": "sub/x.safetensors"}, "outside the folder"),
        ({"a": "..\\x.safetensors"}, "outside the folder"),
        ({"a": ".."}, "outside the folder"),
        ({"a": ""}, "outside the folder"),
        ({"a": "x\0y"}, "outside the folder"),
        (
            {"a": INSIDE, "b": "2.safetensors", "c": "3.safetensors"},
            "shard 2.* and 1 more is missing: the index",
        ),
        ({"a": "folder"}, "not a regular file"),
    ],
)
def test_bad_indexes(tmp_path: Path, index: bytes | dict[str, str], message: str) -> None:
    folder = tmp_path / "inside"
    (folder / "folder").mkdir(parents=True)
    save_file({"a": torch.ones(2)}, folder / INSIDE)
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    (folder / INDEX).write_bytes(index if isinstance(index, bytes) else json.dumps({"weight_map": index}).encode())
    with pytest.raises(MoecError, match=message) as caught:
        open_checkpoint(folder)
    assert caught.value.where.startswith(str(folder)) and caught.value.todo and caught.value.exit_code == 2


def test_what_nobody_asks_for_stops_nothing(tmp_path: Path) -> None:
    """A dtype without a meaning here, and an index that names too much and too little: said when it is asked for."""
    data = {"a": entry(0, 8, [2]), "odd": entry(8, 12, [6], "F6_E2M3"), "b": entry(12, 20, [2])}
    (tmp_path / INSIDE).write_bytes(raw(data, bytes(12) + struct.pack("<2f", 1, 2)))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": INSIDE, "gone": INSIDE}}))
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == {"a", "b"}
        assert same(checkpoint.read("b"), torch.tensor([1.0, 2.0]))
        with pytest.raises(MoecError, match=f"the tensor odd has the dtype F6_E2M3 in {INSIDE}"):
            checkpoint.read("odd")
        with pytest.raises(MoecError, match=f"the tensor gone is in {INSIDE} by the index, and no shard holds it"):
            checkpoint.read("gone")


def test_the_index_decides_between_two_tensors_of_a_name(tmp_path: Path) -> None:
    parts = {"1.safetensors": {"a": torch.ones(2), "b": torch.ones(1)}, "2.safetensors": {"a": torch.zeros(2)}}
    with open_checkpoint(shards(tmp_path, parts, {"a": "2.safetensors", "b": "1.safetensors"})) as checkpoint:
        assert same(checkpoint.read("a"), torch.zeros(2))
    shards(tmp_path, {}, {"b": "1.safetensors", "c": "2.safetensors"})
    with pytest.raises(MoecError, match=r"'a' is in two files: 1\.safetensors and 2\.safetensors"):
        open_checkpoint(tmp_path)


def test_folders_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(MoecError, match="no such folder"):
        open_checkpoint(tmp_path / "missing")
    with pytest.raises(MoecError, match="the folder has no safetensors files"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(MoecError, match=r"only pytorch_model\.bin") as caught:
        open_checkpoint(tmp_path)
    assert "never opened: convert the model to safetensors" in caught.value.todo
    (tmp_path / "model.safetensors").symlink_to("nowhere")
    with pytest.raises(MoecError, match="cannot open the shard: No such file"):
        open_checkpoint(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(MoecError, match="not a regular file"):
        open_checkpoint(tmp_path)


def test_a_file_that_shrinks(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        os.truncate(tmp_path / "model.safetensors", 200)
        with pytest.raises(MoecError, match="got shorter while it was read"):
            checkpoint.read("a")


# --- other sources ----------------------------------------------------------------------------------------------


def test_module_source() -> None:
    module = torch.nn.Linear(4, 3)
    source = ModuleSource(module)
    assert source.tensors["weight"].type == TensorType.of("f32", 3, 4)
    part = source.read("weight", ((1, 3), (0, 4)))
    assert part.data_ptr() == module.weight[1].data_ptr() and not part.requires_grad  # not copied
    assert same(evaluate_recipe(Tensor("weight", TensorType.of("f32", 3, 4)), source), module.weight.detach())
    with pytest.raises(MoecError, match="no tensor 'gate'"):
        source.read("gate")
    with pytest.raises(MoecError, match="is wanted"):
        source.read("bias", None, TensorType.of("bf16", 3))
    with pytest.raises(MoecError, match=r"unknown dtype torch.complex64"):
        ModuleSource({"x": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(MoecError, match="no data"):
        ModuleSource({"x": torch.zeros(2, device="meta")})


def test_random_source() -> None:
    kinds = {name: TensorType.of(name, 40, 64) for name in DTYPES}
    first, second = RandomSource(1), RandomSource(1, kinds)
    for name, kind in kinds.items():
        whole = first.read(name, None, kind)
        assert whole.dtype == DTYPES[name].torch and same(whole, second.read(name))
        assert same(first.read(name, ((3, 9), (0, 10)), kind), whole[3:9, :10])
        assert torch.isfinite(whole.float()).all()
    assert not same(first.read("a", None, kinds["f32"]), first.read("b", None, kinds["f32"]))
    assert not same(first.read("a", None, kinds["f32"]), RandomSource(2).read("a", None, kinds["f32"]))
    assert abs(float(first.read("a", None, TensorType.of("f32", 100, 400)).std()) - 1 / 20) < 2e-3
    assert abs(float(first.read("a", None, TensorType.of("f32", 400)).mean()) - 1) < 0.02
    with pytest.raises(ValueError, match="not known"):
        first.read("a")
