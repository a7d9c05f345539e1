"""Routed experts as tile programs: the simulator, in the memories of each family's chips, equals moe.experts."""

import ml_dtypes
import numpy as np
import pytest
import torch
from moec.compiler.errors import MoecError
from moec.compiler.formats.table import find_format
from moec.compiler.ir.activation import Activation
from moec.compiler.ops import OPS
from moec.compiler.ops.moe import experts as reference
from moec.targets import declare_kernel_ops
from moec.targets.accelerator.chip.profile import find_profile
from moec.targets.accelerator.kernels.choices import TILE_ROWS, Tile
from moec.targets.accelerator.kernels.experts import Experts, combine_kernel, grouped_down, grouped_up, sort_kernel
from moec.targets.accelerator.tile.machine import chip_of, layout_of
from moec.targets.accelerator.tile.packing import Packing
from moec.targets.accelerator.tile.serialize import program_from_json, program_to_json
from moec.targets.accelerator.tile.simulate import simulate_program
from moec.targets.accelerator.tile.tiles import memory_footprint

CHIPS = ("nvidia-h200", "nvidia-b200", "amd-mi300x", "ascend-910b", "ascend-950dt", "cambricon-mlu370")
FORMATS = ("bf16", "int4_g128", "uint4_g32", "int8_g64", "uint8_g64", "fp8_b128", "mxfp4", "nvfp4")
BF16 = ml_dtypes.bfloat16
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])
TOLERANCE = 2e-2  # of the largest number: x, h and y are bf16, and so are weights when they are multiplied


def random_weight(packing, rng):
    """Return (parts in device memory, the numbers that they stand for), computed from the definition of the format."""
    shape, f = (packing.experts, packing.rows, packing.columns), find_format(packing.format)
    if f is None:
        w = (rng.standard_normal(shape) * 0.1).astype(BF16)
        return packing.pack(w), w.astype(np.float32)
    groups = -(-packing.columns // f.group)

    def spread(a):
        return np.repeat(a, f.group, 2)[:, :, : packing.columns]

    if f.element == "e4m3":
        codes = rng.standard_normal(shape).astype(ml_dtypes.float8_e4m3fn)
        scales = (rng.random((packing.experts, -(-packing.rows // 128), groups)) * 0.1).astype(np.float32)
        return packing.pack(codes=codes, scales=scales), codes.astype(np.float32) * spread(
            np.repeat(scales, 128, 1)[:, : packing.rows]
        )
    if f.element == "e2m1":
        codes = rng.integers(0, 16, shape).astype(np.uint8)
        if f.tensor_scale:
            scales = (rng.random((*shape[:2], groups)) + 0.5).astype(ml_dtypes.float8_e4m3fn)
            whole = (rng.random(packing.experts) * 0.1).astype(np.float32)
            parts = packing.pack(codes=codes, scales=scales, tensor_scale=whole)
            return parts, E2M1[codes] * spread(scales.astype(np.float32)) * whole[:, None, None]
        scales = rng.integers(120, 126, (*shape[:2], groups)).astype(np.uint8)
        return packing.pack(codes=codes, scales=scales), E2M1[codes] * spread(2.0 ** (scales.astype(np.float32) - 127))
    scales = (rng.random((*shape[:2], groups)) * 0.02).astype(np.float32)
    if not f.zeros:
        codes = rng.integers(-(2 ** (f.bits - 1)), 2 ** (f.bits - 1), shape).astype(np.int8)
        return packing.pack(codes=codes, scales=scales), codes.astype(np.float32) * spread(scales)
    codes = rng.integers(0, 2**f.bits, shape).astype(np.uint8)
    zeros = rng.integers(0, 2**f.bits, scales.shape).astype(np.uint8)
    numbers = (codes.astype(np.float32) - spread(zeros).astype(np.float32)) * spread(scales)
    return packing.pack(codes=codes, scales=scales, zeros=zeros), numbers


def named(prefix, parts):
    return {f"{prefix}_{name}" if name else prefix: array for name, array in parts.items()}


def run(e, tensors, tokens, profile, tile, direct=False):
    """Simulate the kernels of a layer one after the other; return y and check what each says that it uses."""
    layout = layout_of(profile, tile.m)
    chip = chip_of(profile, layout)
    programs = [] if direct else [sort_kernel(e, layout)]
    programs += [
        grouped_up(e, tile, layout, direct),
        grouped_down(e, tile, layout, direct),
        combine_kernel(e, 64, layout),
    ]
    pairs = tokens * e.chosen
    tensors |= {
        "order": np.zeros(pairs, np.int32), "tiles": np.zeros((len(TILE_ROWS), 3, pairs), np.int32),
        "h": np.zeros((pairs, e.inner), BF16), "rows": np.zeros((pairs, e.hidden), BF16),
        "y": np.zeros((tokens, e.hidden), BF16),
    }  # fmt: skip
    for program in programs:
        program = program_from_json(program_to_json(program))
        given = {a.name: tensors[a.name] for a in program.arguments}
        used = simulate_program(program, given, {"T": tokens}, chip)
        assert used == memory_footprint(program, chip.align)
        assert all(used[memory] <= chip.capacity[memory] for memory in used)
    return tensors["y"].astype(np.float32)


def layer(rng, experts=4, chosen=2, hidden=72, inner=40, tokens=5, format="bf16", fractal=False, ids=None, **options):
    """Return (experts, tensors, expected y) of a random layer."""
    up = Packing(format, inner * (2 if options.get("act", Activation()).gated else 1), hidden, experts, fractal)
    down = Packing(format, hidden, inner, experts, fractal)
    e = Experts(experts, chosen, hidden, inner, up, down, **options)
    up_parts, up_numbers = random_weight(up, rng)
    down_parts, down_numbers = random_weight(down, rng)
    x = rng.standard_normal((tokens, hidden)).astype(BF16)
    if ids is None:
        ids = np.stack([rng.choice(experts, chosen, False) for _ in range(tokens)])
    gates = rng.random((tokens, chosen)).astype(np.float32)
    tensors = {"x": x, "ids": ids.reshape(-1).astype(np.int32), "gates": gates.reshape(-1)}
    tensors |= named("up", up_parts) | named("down", down_parts)
    biases = [None, None]
    for i, (name, there, rows) in enumerate((("up_bias", e.up_bias, up.rows), ("down_bias", e.down_bias, hidden))):
        if there:
            tensors[name] = biases[i] = (rng.standard_normal((experts, rows)) * 0.1).astype(np.float32)

    def as_torch(a):
        return None if a is None else torch.tensor(np.asarray(a, np.float32))

    y = reference(
        as_torch(x), torch.tensor(ids), as_torch(gates), as_torch(up_numbers), as_torch(down_numbers), *map(as_torch, biases),
        act=e.act,
    )  # fmt: skip
    for name in e.added:
        tensors[name] = rng.standard_normal((tokens, hidden)).astype(BF16)
        y = y + as_torch(tensors[name])
    return e, tensors, y.numpy()


def close(found, expected):
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_on_every_family(name, format):
    profile = find_profile(name, {})
    fractal = profile.family.name == "ascend" and format == "bf16"
    e, tensors, expected = layer(np.random.default_rng(0), format=format, fractal=fractal)
    close(run(e, tensors, 5, profile, Tile(16, 32, 64 if format == "bf16" else 128)), expected)


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize("added", [("residual",), ("shared", "residual")])
def test_what_is_added_to_a_token_is_rounded_once(name, added):
    e, tensors, expected = layer(np.random.default_rng(5), added=added)
    found = run(e, tensors, 5, find_profile(name, {}), Tile(16, 32, 64))
    close(found, expected)
    assert np.abs(found - expected).max() < 4e-3 * np.abs(expected).max()


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize(
    "case", ["one token", "one expert has all", "experts without a token", "more than a tile each"]
)
def test_how_tokens_spread(name, case):
    rng = np.random.default_rng(1)
    tokens = {"one token": 1, "more than a tile each": 70}.get(case, 19)
    ids = None
    if case == "one expert has all":
        ids = np.full((tokens, 1), 2)
    elif case == "experts without a token":
        ids = np.stack([rng.permutation([1, 6]) for _ in range(tokens)])
    chosen = ids.shape[1] if ids is not None else 2
    e, tensors, expected = layer(rng, experts=8, chosen=chosen, tokens=tokens, ids=ids, format="int4_g32")
    profile = find_profile(name, {})
    for rows in (16, 64):
        if name == "ascend-910b" and rows == 64:
            continue  # two sums of 64 x 128 and their tiles do not fit beside dequantized weights
        close(run(e, dict(tensors), tokens, profile, Tile(rows, 32, 128)), expected)


@pytest.mark.parametrize("tokens", [1, 3])
def test_pair_by_pair(tokens):
    e, tensors, expected = layer(np.random.default_rng(2), tokens=tokens)
    close(run(e, tensors, tokens, find_profile("nvidia-h200", {}), Tile(16, 32, 64), True), expected)


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize(("experts", "chosen", "tokens"), [(4, 2, 60), (16, 3, 5), (3, 1, 130), (5, 2, 1)])
def test_sort_lists_pairs_and_tiles_as_its_op_does(name, experts, chosen, tokens):
    """Every pair is in one tile of its expert, and no tile has pairs of two; numbers in between say that there is none."""
    profile, rng = find_profile(name, {}), np.random.default_rng(7)
    ids = np.stack([rng.permutation(experts - 1)[:chosen] for _ in range(tokens)])  # the last expert has none
    pairs = tokens * chosen
    e = Experts(experts, chosen, 1, 1, Packing("bf16", 1, 1), Packing("bf16", 1, 1))
    found = {"order": np.zeros(pairs, np.int32), "tiles": np.full((len(TILE_ROWS), 3, pairs), -1, np.int32)}
    layout = layout_of(profile)
    simulate_program(
        sort_kernel(e, layout),
        {"ids": ids.reshape(-1).astype(np.int32), **found},
        {"T": tokens},
        chip_of(profile, layout),
    )
    declare_kernel_ops()
    order, tiles = (x.numpy() for x in OPS["acc.sort"].reference(torch.tensor(ids), experts=experts))
    assert (found["order"] == order).all()
    for level, rows in enumerate(TILE_ROWS):
        numbers = min(pairs // rows + experts, pairs)
        assert (found["tiles"][level, :, :numbers] == tiles[level, :, :numbers]).all()
        seen = []
        for expert, begin, end in tiles[level].T[tiles[level, 0] < experts]:
            places = order[begin : min(begin + rows, end)]
            assert len(places) and (ids.reshape(-1)[places] == expert).all()
            seen += places.tolist()
        assert sorted(seen) == list(range(pairs))


@pytest.mark.parametrize("direct", [False, True])
def test_a_weight_as_the_first_operand(direct):
    e, tensors, expected = layer(np.random.default_rng(9), tokens=9, up_bias=True, down_bias=True, hidden=80)
    close(run(e, tensors, 9, find_profile("nvidia-h200", {}), Tile(16, 64, 32, swapped=True), direct), expected)


@pytest.mark.parametrize("name", ["nvidia-h200", "ascend-950dt"])
def test_tiles_of_rows_side_by_side(name):
    """The order of the grid changes no number, nor do tiles of the last group that do not exist."""
    e, tensors, expected = layer(np.random.default_rng(6), experts=3, tokens=40, hidden=64)
    close(run(e, tensors, 40, find_profile(name, {}), Tile(16, 32, 64, group=4)), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"act": Activation("gelu")},
        {"act": Activation("gelu_tanh")},
        {"act": Activation("relu2", gated=False)},
        {"act": Activation("silu", True, "interleaved", 1.702, 1.0, 7.0), "up_bias": True, "down_bias": True},
        {"act": Activation(limit=0.5)},
        {"act": Activation(limit=0.5, clamp_after=True)},
    ],
    ids=lambda o: str(o["act"]),
)
def test_activations_and_biases(options):
    e, tensors, expected = layer(np.random.default_rng(3), **options)
    close(run(e, tensors, 5, find_profile("nvidia-h200", {}), Tile(16, 32, 64)), expected)


def test_what_does_not_fit_is_refused():
    profile = find_profile("ascend-910b", {})
    e, tensors, _ = layer(np.random.default_rng(4), tokens=20)
    with pytest.raises(MoecError, match=r"does not fit: l0[bc] has \d+ bytes"):
        run(e, tensors, 20, profile, Tile(128, 256, 128))


def test_a_path_that_the_chip_lacks_is_refused():
    old, new = find_profile("ascend-910b", {}), find_profile("ascend-950dt", {})
    e, tensors, _ = layer(np.random.default_rng(5), format="mxfp4")
    layout = layout_of(new, 16)  # from the sums straight to the vector unit, which 910B cannot
    program = grouped_up(e, Tile(16, 32, 128), layout, direct=True)
    tensors["h"] = np.zeros((10, e.inner), BF16)
    given = {a.name: tensors[a.name] for a in program.arguments}
    with pytest.raises(MoecError, match="no path from"):
        simulate_program(program, given, {"T": 5}, chip_of(old, layout))
