"""Products of codes: activations rounded in a kernel and multiplied with weights in a format equal the reference ops."""

import numpy as np
import pytest
import torch
from chips_for_tests import CHIPS, bf16, close, named, needs_triton, run, weight
from moec.compiler.errors import MoecError
from moec.compiler.formats.table import format_of
from moec.compiler.ir.fragments import parse_activation
from moec.compiler.ops import OPS
from moec.targets.accelerator import ops
from moec.targets.accelerator.chip.profile import find_profile
from moec.targets.accelerator.kernels.choices import RowTile, Tile
from moec.targets.accelerator.kernels.dense import Linear, linear, linear_sum
from moec.targets.accelerator.kernels.experts import Experts, grouped_down, grouped_up, sort
from moec.targets.accelerator.kernels.low_precision import Quantize, quantize
from moec.targets.accelerator.target import find_accelerator
from moec.targets.accelerator.tile.machine import layout_of
from moec.targets.accelerator.tile.packing import Packing
from moec.targets.accelerator.triton.compile import compile_kernel

assert ops
GPUS = ("hopper", "blackwell", "amd")


def random(rng, *shape):
    return bf16(torch.tensor(rng.standard_normal(shape), dtype=torch.float32))


def rounded(name, x, to="fp8_g128"):
    """Return codes and scales that the kernel makes of rows, and the numbers that they represent."""
    layout, chip = CHIPS[name]
    form, width = format_of(to), x.shape[-1]
    found = run(quantize(Quantize(width, to), RowTile(4, 256), layout), chip, {"T": len(x)}, x=x)
    scales = np.repeat(found["y_scales"], form.group, 1)[:, :width]
    return found, torch.tensor(found["y_codes"].astype(np.float32) * scales)


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
        y = run(linear(p, Tile(16, n, 128, 1), layout), chip, {"T": 19}, **given)["y"]
        close(y, x @ w.T, 1e-6)
        sums = run(linear(p, Tile(16, n, 128, 1), layout, 2), chip, {"T": 19}, **given)["parts"]
        close(run(linear_sum(p, Tile(4, 32, 0), layout, 2), chip, {"T": 19}, parts=sums)["y"], x @ w.T, 1e-6)


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
    lists = run(sort(e, layout), chip, scalars, ids=ids)
    given = {"x_codes": x_codes["y_codes"], "x_scales": x_codes["y_scales"]}
    h = run(grouped_up(e, tile, layout), chip, scalars, **given, **lists, **named(up_parts, "up"))["h"]
    order, offsets = (torch.tensor(lists[n]).long() for n in ("order", "offsets"))
    wanted = OPS["acc.grouped_up"].reference(x, ids, order, offsets, up_w, None, act=act)
    close(h, wanted, 1e-6)
    h_codes, h = rounded(name, bf16(wanted))
    given = {"h_codes": h_codes["y_codes"], "h_scales": h_codes["y_scales"], "gates": gates}
    rows = run(grouped_down(e, tile, layout), chip, scalars, **given, **lists, **named(down_parts, "down"))["rows"]
    y = OPS["acc.grouped_down"].reference(h, ids, order, offsets, gates, down_w, None)
    close(rows.reshape(count, chosen, hidden).sum(1), y, 1e-6)


def test_codes_meet_weights_of_their_kind_only():
    layout, _ = CHIPS["hopper"]
    with pytest.raises(MoecError, match="codes of fp8_g128 are not multiplied with int8_g128"):
        linear(Linear(64, 256, Packing("int8_g128", 64, 256), dtype="fp8_g128"), Tile(16, 32, 128), layout)


def test_what_is_rounded_is_chosen_by_an_option_and_the_chip():
    def rounding(chip, **options):
        return [c.options["pairs"] for c in find_accelerator(chip, options).pipeline if "activations" in c.name]

    assert rounding("nvidia-h200") == ["fp8_b128:fp8_g128, fp8_g128:fp8_g128"]
    assert rounding("nvidia-h200", activations="bf16") == rounding("ascend-910b") == []
    with pytest.raises(MoecError, match="ascend-910b does not multiply activations in fp8"):
        rounding("ascend-910b", activations="fp8")


@needs_triton
@pytest.mark.parametrize(
    ("chip", "instruction"),
    [
        ("nvidia-h200", "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3"),
        pytest.param("nvidia-b200", "tcgen05.mma.cta_group::1.kind::f8f6f4", marks=pytest.mark.long),
        pytest.param("nvidia-rtx5090", "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32", marks=pytest.mark.long),
        pytest.param("amd-mi355x", "v_mfma_f32_32x32x64_f8f6f4", marks=pytest.mark.long),
    ],
)
def test_the_matrix_unit_multiplies_codes(chip, instruction):
    profile = find_profile(chip, {})
    p = Linear(256, 1024, Packing("fp8_b128", 256, 1024), dtype="fp8_g128")
    made = compile_kernel(linear(p, Tile(128, 128, 128), layout_of(profile)), profile.arch, 8)
    assert instruction in made.assembly and made.spills == 0
