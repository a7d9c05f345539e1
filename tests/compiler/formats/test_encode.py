"""Quantized formats: packing, numbers to codes and back, the parts of a weight in tiles and in the data file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moec.compiler.errors import MoecError
from moec.compiler.formats.format import PART_NAMES, Format
from moec.compiler.formats.packing import pack_bits, unpack_bits
from moec.compiler.formats.table import ELEMENTS, GROUPS, format_of
from moec.compiler.ir.recipes import Step, Tensor
from moec.compiler.ir.types import TensorType
from moec.compiler.weights.evaluate import evaluate_recipe
from moec.compiler.weights.sink import DataFile
from moec.compiler.weights.sources.source import ModuleSource
from moec.compiler.weights.steps.table import step
from moec.compiler.weights.tiles import tile_boxes

INTEGERS = [f"{sign}int{bits}_g{group}" for bits in (2, 4, 8) for group in GROUPS for sign in ("", "u")]
FORMATS = [*INTEGERS, "mxfp4", "nvfp4", "fp8_b128"]
E2M1 = torch.tensor(ELEMENTS["e2m1"])
QUICK = settings(max_examples=60, deadline=None)

# relative error (root of mean square) on normal numbers that a format must stay below: 10 % above what it has
NORMAL = {
    "int8_g32": 0.0058, "int8_g128": 0.0071, "uint8_g128": 0.0065, "int4_g32": 0.092, "uint4_g32": 0.087,
    "uint4_g128": 0.106, "uint2_g32": 0.37, "mxfp4": 0.123, "nvfp4": 0.105, "fp8_b128": 0.0292,
}  # fmt: skip


def normal(*sizes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def coded(x: torch.Tensor, format: Format) -> torch.Tensor:
    return format.decode(format.encode(x), x.shape[-1])


# --- packing ---------------------------------------------------------------------------------------------------


@QUICK
@given(st.data())
def test_packed_codes_come_back(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([2, 4, 8]))
    rows, width = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 19))
    codes = torch.tensor(
        data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=rows * width, max_size=rows * width)),
        dtype=torch.uint8,
    ).reshape(rows, width)
    packed = pack_bits(codes, bits)
    assert packed.shape == (rows, -(-width * bits // 8))
    assert torch.equal(unpack_bits(packed, bits, width), codes)


def test_the_first_code_is_in_the_lowest_bits() -> None:
    assert pack_bits(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist() == [0x21, 0x03]
    assert pack_bits(torch.tensor([3, 0, 1, 2, 1], dtype=torch.uint8), 2).tolist() == [0b10_01_00_11, 0b01]


# --- numbers to codes and back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_parts_have_the_types_that_recipes_say(name: str) -> None:
    format = format_of(name)
    x = normal(3, 130, 2 * format.group)
    parts = format.encode(x)
    weight = step("quantize", Tensor("w", TensorType.of("f32", *x.shape)), to=name)
    for part in format_of(weight.type.dtype).part_names:
        wanted = step(part, weight).type
        stored = parts[part].view(torch.uint8) if wanted.dtype == "u8" else parts[part]
        assert tuple(stored.shape) == wanted.sizes
    assert set(parts) - {"tensor_scale"} == set(format_of(weight.type.dtype).part_names)


def bound(x: torch.Tensor, format: Format) -> torch.Tensor:
    """Return the largest root of mean square error that groups of x may have."""
    groups = x.unflatten(-1, (-1, format.group))
    largest = groups.abs().amax(-1)
    if format.element == "e2m1":
        return largest / 3  # a step between 4 and 6 is 2, rounded by half of it, where 6 is at least half the scale
    if format.zeros:  # half a step for the number, half a step for the zero point
        return (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / (2**format.bits - 1)
    return largest / 2 ** (format.bits - 1)  # a step: the side with one code less may be cut by one


@QUICK
@given(
    st.sampled_from([f for f in FORMATS if f != "fp8_b128"]), st.integers(0, 10**6), st.floats(-4, 4), st.floats(-3, 3)
)
def test_error_stays_below_a_step(name: str, seed: int, power: float, shift: float) -> None:
    format = format_of(name)
    x = (normal(4, 2 * format.group, seed=seed) + shift) * 10**power
    error = (coded(x, format) - x).unflatten(-1, (-1, format.group)).square().mean(-1).sqrt()
    assert (error <= bound(x, format) * 1.001).all()


@QUICK
@given(st.integers(0, 10**6), st.integers(1, 150), st.integers(1, 3))
def test_fp8_blocks_are_right_to_a_sixteenth(seed: int, rows: int, blocks: int) -> None:
    format = format_of("fp8_b128")
    x = normal(rows, 128 * blocks, seed=seed) * 10 ** normal(rows, 1, seed=seed + 1)
    parts = format.encode(x)
    scales = parts["scales"].repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)
    assert ((format.decode(parts, x.shape[1]) - x).abs() <= x.abs() / 16 + scales * 2**-10 + 1e-30).all()


@pytest.mark.parametrize("name", NORMAL)
def test_error_on_normal_numbers(name: str) -> None:
    x = normal(512, 1024)
    error = (coded(x, format_of(name)) - x).norm() / x.norm()
    assert error < NORMAL[name]


@pytest.mark.parametrize("name", FORMATS)
def test_groups_of_zeros_and_of_one_number(name: str) -> None:
    format = format_of(name)
    x = torch.zeros(130, 2 * format.group)
    assert torch.equal(coded(x, format), x)
    for value in (0.37, -2.5):
        x[:, : format.group] = value
        got = coded(x, format)
        assert torch.equal(got[:, format.group :], x[:, format.group :])
        # a number alone in its group is hit by integers (its code gives the scale); floats round the scale too
        assert (got[:, : format.group] / value - 1).abs().max() <= (1e-6 if format.element == "int" else 0.2)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [1e30, 1e-20])
def test_huge_and_tiny_numbers(name: str, size: float) -> None:
    format = format_of(name)
    x = normal(128, 2 * format.group)
    got = coded(x * size, format)
    assert torch.isfinite(got).all()
    assert (got / size - x).norm() / x.norm() < 0.6


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_refused(name: str, value: float) -> None:
    x = normal(128, 2 * format_of(name).group)
    x[3, 5] = value
    with pytest.raises(ValueError, match="infinite"):
        format_of(name).encode(x)


@pytest.mark.parametrize("name", ["int4_g32", "mxfp4"])
def test_the_refusal_names_the_weight(name: str) -> None:
    source = ModuleSource({"layers.3.w": torch.full((2, 64), torch.inf)})
    weight = step("quantize", Tensor("layers.3.w", TensorType.of("f32", 2, 64)), to=name)
    with pytest.raises(MoecError, match=r"cannot be quantized(.|\n)*layers\.3\.w"):
        evaluate_recipe(step("codes", weight), source)


# --- codes of floating-point formats ---------------------------------------------------------------------------


def test_e2m1_has_the_numbers_of_ml_dtypes() -> None:
    codes = np.arange(16, dtype=np.uint8)
    assert E2M1.tolist() == codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32).tolist()


def test_e2m1_rounds_as_ml_dtypes() -> None:
    steps = torch.arange(-6 * 64, 6 * 64 + 1) / 64  # all ties, and what lies between
    x = torch.cat((steps, torch.tensor([6.0] * (-len(steps) % 16))))
    # a scale of 1 in each group, whatever stands in it
    groups = x.reshape(-1, 16)
    widest = torch.cat((groups, torch.full((len(groups), 16), 6.0)), 1)
    parts = replace(format_of("nvfp4"), group=32).encode(widest, tensor_scale=1.0)
    assert (parts["scales"].float() == 1).all()
    codes = unpack_bits(parts["codes"], 4, 32)[:, :16]
    wanted = groups.numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(E2M1[codes.long()].numpy(), wanted)


def test_scales_of_mxfp4_are_powers_of_two_as_ml_dtypes_has_them() -> None:
    x = normal(64, 32) * torch.arange(-30, 34)[:, None].float().exp2()
    parts = format_of("mxfp4").encode(x)
    scales = parts["scales"].numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    numbers = E2M1[unpack_bits(parts["codes"], 4, 32).long()]
    assert torch.equal(format_of("mxfp4").decode(parts, 32), numbers * torch.from_numpy(scales))
    # six times the scale reaches the largest number, or half of it does
    ratio = x.abs().amax(1) / (6 * torch.from_numpy(scales[:, 0]))
    assert (ratio <= 2).all() and (ratio > 0.5).all()


def test_e4m3_codes_are_those_of_ml_dtypes() -> None:
    x = normal(128, 128)
    parts = format_of("fp8_b128").encode(x)
    wanted = (x / parts["scales"]).numpy().astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(parts["codes"].numpy(), wanted.view(np.uint8))
    assert parts["codes"].view(torch.float8_e4m3fn).float().abs().max() == 448


def test_scales_of_nvfp4_are_e4m3_under_one_for_the_tensor() -> None:
    x = normal(32, 64)
    parts = format_of("nvfp4").encode(x)
    whole = float(parts["tensor_scale"])
    assert whole == pytest.approx(float(x.abs().max()) / (6 * 448))
    wanted = (x.unflatten(1, (4, 16)).abs().amax(-1) / (6 * whole)).numpy().astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(parts["scales"].view(torch.uint8).numpy(), wanted.view(np.uint8))


# --- parts of weights --------------------------------------------------------------------------------------------


def parts_of(name: str) -> tuple[Step, ModuleSource]:
    """Return a quantized stack of two weights, and its source."""
    format = format_of(name)
    width = 3 * format.group
    source = ModuleSource({f"{i}.w": normal(70, width, seed=i) for i in range(2)})
    return step("quantize", step("stack", Tensor("{0..1}.w", TensorType.of("f32", 70, width))), to=name), source


@pytest.mark.parametrize("name", ["int4_g16", "uint4_g32", "uint2_g64", "int8_g128", "uint8_g16", "mxfp4", "fp8_b128"])
def test_parts_pulled_in_tiles_are_the_whole_ones(name: str) -> None:
    weight, source = parts_of(name)
    for part in [*(step(n, weight) for n in format_of(weight.type.dtype).part_names), weight]:
        whole = evaluate_recipe(part, source)
        for limit in (1000, 5000):
            boxes = list(tile_boxes(part.type if part is not weight else TensorType("f32", weight.type.shape), limit))
            assert len(boxes) > 1 or part.name in ("scales", "zeros") or limit > 1000
            for box in boxes:
                cut = whole[tuple(slice(*span) for span in box)]
                assert torch.equal(evaluate_recipe(part, source, box), cut), (part.name, box)


@pytest.mark.parametrize("name", ["int4_g16", "uint4_g32", "uint2_g64", "int8_g128", "uint8_g256", "mxfp4", "fp8_b128"])
@pytest.mark.parametrize("tile_bytes", [3000, 1 << 20])
def test_the_data_file_holds_what_pull_gives(name: str, tile_bytes: int, tmp_path: Path) -> None:
    weight, source = parts_of(name)
    wanted = {part: step(part, weight) for part in format_of(weight.type.dtype).part_names}
    with DataFile(tmp_path / "data", tile_bytes) as data:
        places = {part: data.append(recipe, source) for part, recipe in reversed(wanted.items())}
    raw = (tmp_path / "data").read_bytes()
    for part, (offset, length) in places.items():
        whole = evaluate_recipe(wanted[part], source).reshape(-1).view(torch.uint8).numpy().tobytes()
        assert raw[offset : offset + length] == whole
    assert data.size == len(raw)


def test_the_parts_are_what_a_weight_is_made_of() -> None:
    weight, source = parts_of("uint4_g32")
    parts = {part: evaluate_recipe(step(part, weight), source) for part in format_of(weight.type.dtype).part_names}
    assert list(parts) == list(PART_NAMES)
    assert torch.equal(format_of("uint4_g32").decode(parts, 96), evaluate_recipe(weight, source))
