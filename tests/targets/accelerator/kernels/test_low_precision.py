"""Products of codes: activations rounded in a kernel and multiplied with weights in a format equal the reference ops."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from chips_for_tests import CHIPS, bf16, close, named, run, weight
from moec.compiler.errors import MoecError
from moec.compiler.formats.table import format_of
from moec.compiler.ir.activation import SILU
from moec.compiler.ir.fragments import parse_activation
from moec.compiler.ops import OPS
from moec.compiler.text.parser import parse_module
from moec.passes.quantize_activations import quantize_activations
from moec.targets.accelerator import ops
from moec.targets.accelerator.artifact.spec import kernel_specs
from moec.targets.accelerator.chip.profile import find_profile
from moec.targets.accelerator.kernels.choices import RowTile, Tile
from moec.targets.accelerator.kernels.dense import Linear, linear_kernel, linear_sum
from moec.targets.accelerator.kernels.experts import Experts, grouped_down, grouped_up, sort_kernel
from moec.targets.accelerator.kernels.low_precision import Quantize, quantize_kernel
from moec.targets.accelerator.kernels.norm import Norm, norm_kernel
from moec.targets.accelerator.target import find_accelerator
from moec.targets.accelerator.tile.packing import Packing
from places import FILES

assert ops
GPUS = ("hopper", "blackwell", "amd")
MX = (*GPUS, "ascend-950")
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def random(rng, *shape):
    return bf16(torch.tensor(rng.standard_normal(shape), dtype=torch.float32))


def rounded(name, x, to="fp8_g128"):
    """Return codes and scales that the kernel makes of rows, and the numbers that they represent."""
    layout, chip = CHIPS[name]
    form, width = format_of(to), x.shape[-1]
    found = run(quantize_kernel(Quantize(width, to), RowTile(4, 256), layout), chip, {"T": len(x)}, x=x)
    codes, scales = found["y_codes"], np.repeat(found["y_scales"], form.group, 1)[:, :width].astype(np.float32)
    if form.element == "e2m1":
        codes = E2M1[np.stack((codes & 15, codes >> 4), -1).reshape(len(codes), -1)]
    scales = np.exp2(scales - 127) if form.scale == "f8e8m0" else scales
    whole = found["y_factors"][:, None] if form.tensor_scale else 1
    return found, torch.tensor(codes.astype(np.float32)[:, :width] * scales * whole)


@pytest.mark.parametrize("name", MX)
@pytest.mark.parametrize(("to", "error"), [("mxfp8", 0.03), ("mxfp4", 0.12), ("nvfp4", 0.11)])
def test_activations_are_rounded_under_scales_of_few_bits(name, to, error):
    x = bf16(random(np.random.default_rng(0), 7, 320) * torch.logspace(-6, 4, 7)[:, None])
    x[3], x[4, 128:256] = 0, 0
    numbers = rounded(name, x, to)[1]
    assert torch.equal(numbers, OPS["acc.quantize"].reference(x, to=to))
    alone = rounded(name, x[2:3], to)[1]
    assert torch.equal(numbers[2:3], alone)  # whatever the other tokens are
    groups = (numbers - x).unflatten(1, (-1, 32)).norm(dim=2), x.unflatten(1, (-1, 32)).norm(dim=2)
    assert (groups[0] <= 2 * error * groups[1]).all() and groups[0].sum() <= error * groups[1].sum()


@pytest.mark.parametrize("name", MX)
@pytest.mark.parametrize(
    ("given", "form"), [("mxfp8", "mxfp8"), ("mxfp8", "mxfp4"), ("mxfp4", "mxfp4"), ("nvfp4", "nvfp4")]
)
def test_linear_of_codes_under_scales_of_few_bits(name, given, form):
    layout, chip = CHIPS[name]
    rng = np.random.default_rng(1)
    for rows, depth, k in ((40, 320, 128), (70, 256, 256)):
        packing, group = Packing(form, rows, depth, pairs=form != "mxfp8"), format_of(form).group
        scales, whole = rng.integers(118, 126, (rows, depth // group)).astype(np.uint8), {}
        by = np.exp2(scales.astype(np.float32) - 127)
        if form == "nvfp4":
            scales, whole = (
                rng.uniform(1, 448, scales.shape).astype(ml_dtypes.float8_e4m3fn),
                {"tensor_scale": np.array([7e-4])},
            )
            by = scales.astype(np.float32) * np.float32(7e-4)
        codes = rng.integers(0, 16, (rows, depth)).astype(np.uint8)
        numbers = E2M1[codes] if packing.pairs else np.array(random(rng, rows, depth), ml_dtypes.float8_e4m3fn)
        w = torch.tensor(numbers.astype(np.float32) * np.repeat(by, group, 1))
        parts = packing.pack(codes=codes if packing.pairs else numbers, scales=scales, **whole)
        rows_in, x = rounded(name, random(rng, 19, depth), given)
        p = Linear(rows, depth, packing, dtype=given, out="f32")
        codes_in = {f"x{part.removeprefix('y')}": value for part, value in rows_in.items()}
        y = run(linear_kernel(p, Tile(16, 32, k, 1), layout), chip, {"T": 19}, **codes_in, **named(parts, "w"))["y"]
        close(y, x @ w.T, 1e-6)
        sums = run(linear_kernel(p, Tile(16, 32, k, 1), layout, 2), chip, {"T": 19}, **codes_in, **named(parts, "w"))[
            "parts"
        ]
        close(torch.tensor(sums).sum(0), x @ w.T, 1e-6)


@pytest.mark.parametrize("name", GPUS)
def test_activations_are_rounded_as_the_reference_does(name):
    x = bf16(random(np.random.default_rng(0), 7, 300) * torch.logspace(-6, 4, 7)[:, None])
    x[3], x[4, 128:256] = 0, 0
    wanted = OPS["acc.quantize"].reference(x, to="fp8_g128")
    assert torch.equal(rounded(name, x)[1], wanted)
    # by hand: a group's largest number is kept, the others are off by at most half of a step of 2^-3 of them
    groups = torch.nn.functional.pad(x, (0, 84)).unflatten(1, (-1, 128)).abs().amax(-1)
    off = (wanted - x).abs()
    assert (off <= x.abs() / 16 + groups.repeat_interleave(128, 1)[:, :300] / 448 / 1024 * 1.01).all()


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("form", ["fp8_b128", "fp8_g128"])
def test_linear_of_codes(name, form):
    layout, chip = CHIPS[name]
    rng = np.random.default_rng(1)
    for rows, depth, n in ((40, 300, 32), (300, 256, 256)):
        packing = Packing(form, rows, depth)
        parts, w = weight(packing, rng)
        codes, x = rounded(name, random(rng, 19, depth))
        given = {f"x{part.removeprefix('y')}": value for part, value in codes.items()} | named(parts, "w")
        p = Linear(rows, depth, packing, dtype="fp8_g128", out="f32")
        y = run(linear_kernel(p, Tile(16, n, 128, 1), layout), chip, {"T": 19}, **given)["y"]
        close(y, x @ w.T, 1e-6)
        sums = run(linear_kernel(p, Tile(16, n, 128, 1), layout, 2), chip, {"T": 19}, **given)["parts"]
        close(run(linear_sum(p, Tile(4, 32, 0), layout, 2), chip, {"T": 19}, parts=sums)["y"], x @ w.T, 1e-6)


def test_fnuz_bits_are_half_of_the_numbers():
    """gfx942 takes other numbers for the same bits, and has no -0: the result is that of E4M3."""
    layout, chip = CHIPS["amd"]
    rng = np.random.default_rng(3)
    packing = Packing("fp8_b128", 40, 256, bits="f8e4m3fnuz")
    parts, w = weight(packing, rng)
    assert (parts["codes"].view(np.uint8) != 128).all()
    x = random(rng, 19, 256)
    x[2], x[:, 5] = 0, -1e-6
    wanted = OPS["acc.quantize"].reference(x, to="fp8_g128")
    p = Quantize(256, "fp8_g128", bits="f8e4m3fnuz")
    codes = run(quantize_kernel(p, RowTile(4, 256), layout), chip, {"T": 19}, x=x)
    assert (codes["y_codes"].view(np.uint8) != 128).all()
    given = {f"x{part.removeprefix('y')}": value for part, value in codes.items()} | named(parts, "w")
    y = run(
        linear_kernel(Linear(40, 256, packing, dtype="fp8_g128", out="f32"), Tile(16, 32, 128, 1), layout),
        chip,
        {"T": 19},
        **given,
    )["y"]
    close(y, wanted @ w.T, 1e-6)


@pytest.mark.parametrize("act", ["gated(silu)", "gated(silu, layout=interleaved)", "plain(relu2)"])
def test_experts_of_codes(act):
    name, rng = "hopper", np.random.default_rng(2)
    layout, chip = CHIPS[name]
    act = parse_activation(act)
    count, experts, chosen, hidden, inner = 9, 4, 2, 256, 200
    up, down = (
        Packing("fp8_b128", inner * (1 + act.gated), hidden, experts),
        Packing("fp8_b128", hidden, inner, experts),
    )
    e = Experts(experts, chosen, hidden, inner, up, down, act=act, dtype="f32", given="fp8_g128")
    (up_parts, up_w), (down_parts, down_w) = weight(up, rng), weight(down, rng)
    ids = torch.tensor(np.stack([rng.permutation(experts)[:chosen] for _ in range(count)]))
    gates = torch.tensor(rng.random((count, chosen)), dtype=torch.float32)
    scalars, tile = {"T": count}, Tile(16, 64, 128)
    x_codes, x = rounded(name, random(rng, count, hidden))
    lists = run(sort_kernel(e, layout), chip, scalars, ids=ids)
    given = {"x_codes": x_codes["y_codes"], "x_scales": x_codes["y_scales"]}
    h = run(grouped_up(e, tile, layout), chip, scalars, **given, **lists, **named(up_parts, "up"))["h"]
    order, tiles = (torch.tensor(lists[n]).long() for n in ("order", "tiles"))
    wanted = OPS["acc.grouped_up"].reference(x, ids, order, tiles, up_w, None, act=act)
    close(h, wanted, 1e-6)
    h_codes, h = rounded(name, bf16(wanted))
    given = {"h_codes": h_codes["y_codes"], "h_scales": h_codes["y_scales"], "gates": gates}
    rows = run(grouped_down(e, tile, layout), chip, scalars, **given, **lists, **named(down_parts, "down"))["rows"]
    y = OPS["acc.grouped_down"].reference(h, ids, order, tiles, gates, down_w, None, None, None)
    close(rows.reshape(count, chosen, hidden).sum(1), y, 1e-6)


ROUNDING = [
    ("hopper", "fp8_g128", ""),
    ("amd", "fp8_g128", "f8e4m3fnuz"),
    ("blackwell", "mxfp8", ""),
    ("amd", "mxfp4", ""),
    ("ascend-950", "mxfp8", ""),
]


def same_as_in_two_kernels(name, found, rows, to, bits, of="y"):
    """Check codes and scales of a kernel that rounds its rows: those of the kernel that rounds rows in bf16."""
    layout, chip = CHIPS[name]
    p = Quantize(rows.shape[-1], to, bits=bits)
    wanted = run(quantize_kernel(p, RowTile(4, 256), layout), chip, {"T": len(rows)}, x=rows)
    for part in ("codes", "scales"):
        assert np.array_equal(found[f"{of}_{part}"].view(np.uint8), wanted[f"y_{part}"].view(np.uint8))


@pytest.mark.parametrize(("name", "to", "bits"), ROUNDING)
@pytest.mark.parametrize("tile", [RowTile(2, 256), RowTile(4, 512)])
def test_a_norm_hands_on_both_forms(name, to, bits, tile):
    """In a loop over columns and in one piece; the last group is not whole."""
    layout, chip = CHIPS[name]
    rng = np.random.default_rng(4)
    x, residual, w = random(rng, 7, 288), random(rng, 7, 288), random(rng, 288)
    x[3], residual[3] = 0, 0
    p = Norm(288, 1e-6, add=True, rounded=to, bits=bits)
    found = run(norm_kernel(p, tile, layout), chip, {"T": 7}, x=x, residual=residual, w=w)
    total = bf16(x + residual)
    assert torch.equal(torch.tensor(found["sum"].astype(np.float32)), total)
    close(found["y"], OPS["nn.rms_norm"].reference(total, w, eps=1e-6), 4e-3)
    same_as_in_two_kernels(name, found, found["y"], to, bits, "rounded")
    alone = run(norm_kernel(replace(p, plain=False), tile, layout), chip, {"T": 7}, x=x, residual=residual, w=w)
    assert set(alone) == {"rounded_codes", "rounded_scales", "sum"}
    assert np.array_equal(alone["rounded_codes"].view(np.uint8), found["rounded_codes"].view(np.uint8))


@pytest.mark.parametrize(("name", "to", "bits"), ROUNDING)
def test_an_activation_rounds_its_rows(name, to, bits):
    """Of a gated linear and of experts, sorted and pair by pair; the last group of 200 columns is not whole."""
    layout, chip = CHIPS[name]
    rng = np.random.default_rng(5)
    count, experts, chosen, hidden, inner = 9, 4, 2, 128, 200 - 8 * (to == "mxfp4")
    x, tile = random(rng, count, hidden), Tile(16, 128, 64, 1)
    packing = Packing("bf16", 2 * inner, hidden)
    parts, _ = weight(packing, rng)
    p = Linear(inner, hidden, packing, act=SILU)
    plain, found = (
        run(linear_kernel(q, tile, layout), chip, {"T": count}, x=x, **named(parts, "w"))
        for q in (p, replace(p, out=to, bits=bits))
    )
    same_as_in_two_kernels(name, found, plain["y"], to, bits)
    up = replace(packing, experts=experts)
    parts, _ = weight(up, rng)
    e = Experts(experts, chosen, hidden, inner, up, up)
    ids = torch.tensor(np.stack([rng.permutation(experts)[:chosen] for _ in range(count)]))
    lists = run(sort_kernel(e, layout), chip, {"T": count}, ids=ids)
    for direct, given in ((False, lists), (True, {"ids": ids})):
        plain, found = (
            run(grouped_up(q, tile, layout, direct), chip, {"T": count}, x=x, **given, **named(parts, "up"))
            for q in (e, replace(e, rounded=to, bits=bits))
        )
        same_as_in_two_kernels(name, found, plain["h"], to, bits, "h")


@pytest.mark.parametrize("chip", ["nvidia-h200", "amd-mi300x"])
def test_rounding_takes_no_kernel_of_its_own(chip):
    """Norms round what experts and linears multiply, and the first halves of experts and of an MLP their rows."""
    program = (FILES / "quantize_activations_where_made.moir").read_text("utf-8").partition("# ----")[0]
    module = quantize_activations(parse_module(program), None)
    found = kernel_specs(module, find_profile(chip, {}), (64,))
    made = {
        (k.kind, tuple(a.name for a in k.best.program.arguments if a.role == "output"))
        for k in found.kernels
        if k.kind in ("norm", "quantize", "grouped_up") or k.group.startswith("gated")
    }
    assert made == {
        ("norm", ("rounded_codes", "rounded_scales")), ("norm", ("y", "rounded_codes", "rounded_scales", "sum")),
        ("grouped_up", ("h_codes", "h_scales")), ("linear", ("y_codes", "y_scales")),
    }  # fmt: skip
    bound = next(k.binding.arguments for k in found.kernels if k.op == "acc.gated_up")
    assert (bound["y_codes"].result, bound["y_codes"].part) == ("h", "codes")


def test_rows_are_rounded_in_whole_groups():
    layout, _ = CHIPS["hopper"]
    p = Linear(256, 256, Packing("bf16", 512, 256), act=SILU, out="fp8_g128")
    with pytest.raises(MoecError, match="64 columns are no whole groups of 128 of fp8_g128"):
        linear_kernel(p, Tile(16, 64, 64), layout)


def test_codes_meet_weights_of_their_kind_only():
    layout, _ = CHIPS["hopper"]
    with pytest.raises(MoecError, match="codes of fp8_g128 are not multiplied with int8_g128"):
        linear_kernel(Linear(64, 256, Packing("int8_g128", 64, 256), dtype="fp8_g128"), Tile(16, 32, 128), layout)


def test_what_is_rounded_is_chosen_by_an_option_and_the_chip():
    def rounding(chip, **options):
        return [c.options["pairs"] for c in find_accelerator(chip, options).pipeline if "activations" in c.name]

    fp8, mxfp8 = "fp8_b128:fp8_g128, fp8_g128:fp8_g128", "mxfp8:mxfp8"
    assert rounding("nvidia-h200") == rounding("nvidia-h200", activations="fp8") == [fp8]
    assert rounding("amd-mi300x") == [fp8]
    assert rounding("nvidia-h200", activations="bf16") == rounding("ascend-910b") == []
    assert rounding("ascend-950dt") == rounding("ascend-950pr", activations="fp8") == [mxfp8]
    assert rounding("ascend-950dt", activations="fp4") == [f"{mxfp8}, mxfp4:mxfp4"]
    assert rounding("nvidia-b200") == rounding("nvidia-rtx5090", activations="fp8") == [f"{fp8}, {mxfp8}"]
    assert rounding("amd-mi355x", activations="fp8") == [f"{fp8}, {mxfp8}, mxfp4:mxfp8"]
    assert rounding("nvidia-rtx5090", activations="fp4") == [f"{fp8}, {mxfp8}, mxfp4:mxfp4, nvfp4:nvfp4"]
    assert rounding("amd-mi355x", activations="fp4") == [f"{fp8}, {mxfp8}, mxfp4:mxfp4"]
    with pytest.raises(MoecError, match="nvidia-h200 does not multiply activations in fp4"):
        rounding("nvidia-h200", activations="fp4")
    with pytest.raises(MoecError, match="ascend-910b does not multiply activations in fp8"):
        rounding("ascend-910b", activations="fp8")
