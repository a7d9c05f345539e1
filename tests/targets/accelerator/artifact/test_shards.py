"""Packed weights: what stands in the safetensors files is what the interpreter computes with, by formulas of their own."""

import errno
import hashlib
import os

import pytest
import safetensors.torch
import torch
from moec.compiler.errors import MoecError
from moec.compiler.ir.module import Const, Function, Module, Op, Value
from moec.compiler.ir.recipes import Tensor
from moec.compiler.ir.types import TensorType
from moec.compiler.weights.evaluate import evaluate_recipe
from moec.compiler.weights.sources.source import ModuleSource, RandomSource
from moec.compiler.weights.steps.table import step
from moec.targets.accelerator.artifact.shards import find_shards, write_shards
from moec.targets.accelerator.tile.packing import Packing

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
FORMATS = [
    "int4_g32", "int4_g128", "uint4_g16", "uint4_g64", "int8_g128", "int8_g32", "uint8_g256", "uint8_g32", "mxfp4",
    "nvfp4", "fp8_b128",
]  # fmt: skip


def module_of(recipes):
    """Return a module whose @main returns weights, so that they are used."""
    consts = tuple(Const(Value(name, r.type), r) for name, r in recipes.items())
    main = Function("main", (), consts, (), tuple(c.value for c in consts))
    return Module("kernel", (), (main,))


def weight(sizes, name="w", dtype="f32"):
    return Tensor(name, TensorType.of(dtype, *sizes))


def written(tmp_path, recipes, packings, source, **options):
    found = find_shards(module_of(recipes), {("main", name): p for name, p in packings.items()})
    hashes = write_shards(found, source, tmp_path, **options)
    (file,) = hashes
    path = tmp_path / file
    assert hashes[file] == hashlib.sha256(path.read_bytes()).hexdigest()
    return safetensors.torch.load_file(path)


def numbers(tensors, name, format, sizes):
    """Return f32[..., N, K] of packed tensors, one code after the other in plain loops over columns."""
    *_, rows, width = sizes
    integers = format.split("_")[0]
    codes = tensors[f"{name}.codes"].reshape(-1, rows, tensors[f"{name}.codes"].shape[-1])
    scales = tensors[f"{name}.scales"]
    scales = scales.reshape(codes.shape[0], -1, scales.shape[-1])
    found = torch.empty(codes.shape[0], rows, width)
    group = {"mxfp4": 32, "nvfp4": 16, "fp8_b128": 128}.get(format) or int(format.split("_g")[1])
    for column in range(width):
        if format == "fp8_b128":
            code = codes[:, :, column].float()
            scale = scales[:, :, column // group].repeat_interleave(128, 1)[:, :rows]
        else:
            scale = scales[:, :, column // group]
            if integers in ("int8", "uint8"):
                code = codes[:, :, column].int()
            else:
                block, at = divmod(column, 128)
                code = (codes[:, :, block * 64 + at % 64].int() >> (4 if at >= 64 else 0)) & 15
        if format == "mxfp4":
            scale = torch.exp2(scale.float() - 127)
        if format == "nvfp4":
            scale = scale.float() * tensors[f"{name}.tensor_scale"][:, None]
        if format in ("mxfp4", "nvfp4"):
            code = torch.tensor(E2M1)[code]
        if integers == "int4":
            code = code - 8
        if format.startswith("u"):
            zeros = tensors[f"{name}.zeros"].reshape(codes.shape[0], rows, -1)[:, :, column // group].int()
            code = code - (zeros if integers == "uint4" else zeros - 128)
        found[:, :, column] = code * scale
    return found.reshape(sizes)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("sizes", [(3, 37, 256), (200, 256), (2, 130, 512)])
def test_quantized_weights_are_the_interpreters_numbers(format, sizes, tmp_path):
    if format == "uint4_g16":
        sizes = (*sizes[:-1], sizes[-1] + 16)  # columns that end within a block
    recipe = step("quantize", weight(sizes), to=format)
    packing = Packing(format, sizes[-2], sizes[-1], sizes[0] if len(sizes) == 3 else 0)
    source = RandomSource(3)
    tensors = written(tmp_path, {"w": recipe}, {"w": packing}, source, tile_bytes=40 * 1024)
    assert {f"main/w.{part}": tuple(shape) for part, (_, shape) in packing.parts.items()} == {
        name: tuple(t.shape) for name, t in tensors.items()
    }
    found, wanted = numbers(tensors, "main/w", format, sizes), evaluate_recipe(recipe, source)
    # nvfp4 multiplies by two scales, in another order than here
    assert torch.allclose(found, wanted, rtol=3e-7 if format == "nvfp4" else 0, atol=0)
    assert wanted.abs().max() > 0.1


@pytest.mark.parametrize("tile", [1 << 12, 1 << 16, 1 << 22])
def test_bytes_do_not_depend_on_tiles_and_threads(tile, tmp_path):
    recipes = {f: step("quantize", weight((2, 150, 256), f), to=f) for f in FORMATS}
    recipes["plain"] = step("cast", weight((2, 150, 256), "p"), to="bf16")
    packings = {f: Packing(f, 150, 256, 2) for f in FORMATS} | {"plain": Packing("bf16", 150, 256, 2, fractal=True)}
    hashes = [
        write_shards(
            find_shards(module_of(recipes), {("main", n): p for n, p in packings.items()}),
            RandomSource(1), tmp_path / str(n), tile_bytes=tile if n else 1 << 20, threads=n + 1,
        )
        for n in range(2)
    ]  # fmt: skip
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("sizes", [(5, 33, 50), (48, 64), (7, 16)])
def test_fractals(sizes, tmp_path):
    recipe = weight(sizes, dtype="bf16")
    packing = Packing("bf16", sizes[-2], sizes[-1], sizes[0] if len(sizes) == 3 else 0, fractal=True)
    tensors = written(tmp_path, {"w": recipe}, {"w": packing}, RandomSource(2), tile_bytes=4096)
    fractals = tensors["main/w"].reshape(-1, *tensors["main/w"].shape[-4:])
    wanted = evaluate_recipe(recipe, RandomSource(2)).reshape(-1, *sizes[-2:])
    found = torch.empty_like(wanted)
    for row in range(sizes[-2]):
        for column in range(sizes[-1]):
            found[:, row, column] = fractals[:, column // 16, row // 16, row % 16, column % 16]
    assert torch.equal(found, wanted)
    padded = fractals.float().abs().sum() - wanted.float().abs().sum()
    assert abs(float(padded)) < 1e-3 * float(wanted.float().abs().sum())


def test_plain_weights_of_every_dtype(tmp_path):
    source = ModuleSource({
        "a": torch.randn(3, 5), "b": torch.randn(7, 3).bfloat16(), "c": torch.tensor([True, False, True]),
        "d": torch.arange(4), "e": torch.tensor(2.5), "f": torch.randn(3).half(),
    })  # fmt: skip
    recipes = {n: Tensor(n, info.type) for n, info in source.tensors.items()}
    tensors = written(tmp_path, recipes, {}, source, tile_bytes=16)
    for name in recipes:
        assert torch.equal(tensors[f"main/{name}"], source.read(name))
    raw = next(tmp_path.rglob("*.safetensors")).read_bytes()
    assert (8 + int.from_bytes(raw[:8], "little")) % 64 == 0


def test_one_file_for_each_layer_and_equal_weights_once(tmp_path):
    inner = Function(
        "layer", (), tuple(Const(Value(n, t.type), t) for n, t in [("w", weight((4, 8), "w.{layer}")), ("all", weight((3,), "/all"))]),
        (), (Value("w", TensorType.of("f32", 4, 8)), Value("all", TensorType.of("f32", 3))), weights="model.",
    )  # fmt: skip
    calls = tuple(
        Op("call", (), (Value(f"w{i}", TensorType.of("f32", 4, 8)), Value(f"a{i}", TensorType.of("f32", 3))), (("layer", i),), "layer")
        for i in range(3)
    )  # fmt: skip
    own = Const(Value("all", TensorType.of("f32", 3)), weight((3,), "all"))
    main = Function("main", (), (own,), calls, (own.value, calls[0].results[0]))
    found = find_shards(Module("kernel", (), (inner, main)), {})
    hashes = write_shards(found, RandomSource(), tmp_path)
    assert list(hashes) == [f"weights/{n}.safetensors" for n in ("main", "layer.0", "layer.1", "layer.2")]
    assert found.same == {f"layer.{i}/all": "main/all" for i in range(3)}
    assert [(c.label, c.function, c.bindings) for c in found.calls][1:] == [
        (f"layer.{i}", "layer", {"layer": str(i)}) for i in range(3)
    ]
    read = safetensors.torch.load_file(tmp_path / "weights/layer.1.safetensors")
    assert torch.equal(read["layer.1/w"], RandomSource().read("model.w.1", None, TensorType.of("f32", 4, 8)))


def test_codes_of_an_fp8_checkpoint_are_kept(tmp_path):
    codes = torch.randn(2, 256, 384).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 2, 3)
    source = ModuleSource({"w": codes, "s": scales})
    viewed = step("view", Tensor("w", source.tensors["w"].type), to="u8")
    recipe = step("packed", viewed, Tensor("s", source.tensors["s"].type), to="fp8_b128")
    tensors = written(tmp_path, {"w": recipe}, {"w": Packing("fp8_b128", 256, 384, 2)}, source, tile_bytes=1 << 17)
    assert torch.equal(tensors["main/w.codes"].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(tensors["main/w.scales"], scales)
    wide = scales.repeat_interleave(128, 1).repeat_interleave(128, 2)
    assert torch.equal(evaluate_recipe(recipe, source), codes.float() * wide)


def test_progress_and_what_goes_wrong(tmp_path, monkeypatch):
    recipe, packing = step("quantize", weight((64, 256)), to="int4_g32"), Packing("int4_g32", 64, 256)
    told = []
    found = find_shards(module_of({"w": recipe}), {("main", "w"): packing})
    write_shards(found, RandomSource(), tmp_path, 1 << 14, told.append, threads=1)
    (path,) = tmp_path.rglob("*.safetensors")
    assert told == sorted(told) and told[-1] == path.stat().st_size and len(told) > 4
    with pytest.raises(MoecError, match="has no tensor"):
        write_shards(found, ModuleSource({}), tmp_path)
    with pytest.raises(MoecError, match="nothing says how %w in @main is packed"):
        find_shards(module_of({"w": recipe}), {})
    with pytest.raises(MoecError, match="its packing"):
        find_shards(module_of({"w": recipe}), {("main", "w"): Packing("int4_g32", 65, 256)})

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(MoecError, match="disk"):
        write_shards(found, RandomSource(), tmp_path)
