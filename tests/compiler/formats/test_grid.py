"""Grids of whole numbers: their tables against Lloyd's algorithm, what is stored, their errors, gptq, and an artifact."""

from fractions import Fraction

import moec
import numpy as np
import pytest
import torch
from moec.compiler.formats.bounds import rounding_bounds
from moec.compiler.formats.gptq import factor_of, gptq_encode
from moec.compiler.formats.packing import pack_bits, unpack_bits
from moec.compiler.formats.table import find_format, format_of

NAMES = ("grid4_g32", "grid4_g64", "grid3_g32", "grid3_g64")


def normal(*sizes, seed=0):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def rounded(x, name):
    format = format_of(name)
    return format.decode(format.encode(x), x.shape[-1])


@pytest.mark.parametrize("bits", [3, 4])
def test_the_table_is_what_lloyds_algorithm_finds(bits):
    """Nearest numbers and means by turns, from equal distances, on normal numbers over the farthest one of 32."""
    x = np.random.default_rng(5).standard_normal((40_000, 32))
    x = np.sort((x / np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)).ravel())
    sums = np.concatenate(([0.0], np.cumsum(x)))
    grid = np.linspace(-0.9, 0.97, 1 << bits)
    for _ in range(1000):
        ends = np.concatenate(([0], np.searchsorted(x, (grid[1:] + grid[:-1]) / 2), [len(x)]))
        grid = (sums[ends[1:]] - sums[ends[:-1]]) / np.diff(ends)
    table = np.array(format_of(f"grid{bits}_g32").values)
    assert np.abs(table - grid / grid[-1] * 127).max() < 1
    assert (table == table.astype(np.int8)).all()


def test_codes_of_three_bits_are_two_rows_of_bits():
    codes = torch.tensor([[5, 2, 7, 0, 1, 4, 6, 3]], dtype=torch.uint8)
    packed = pack_bits(codes, 3)
    assert packed.tolist() == [[0b00_11_10_01, 0b11_10_00_01, 0b01100101]]
    assert (unpack_bits(packed, 3, 8) == codes).all()
    many = torch.randint(0, 8, (3, 5, 48), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    assert (unpack_bits(pack_bits(many, 3), 3, 48) == many).all() and pack_bits(many, 3).shape[-1] == 18


def test_what_is_stored():
    assert format_of("grid4_g32").bits_per_weight == Fraction(9, 2)
    assert format_of("grid3_g64").bits_per_weight == Fraction(13, 4)
    parts = format_of("grid3_g32").encode(normal(2, 5, 64))
    assert {n: (tuple(p.shape), p.dtype) for n, p in parts.items()} == {
        "codes": ((2, 5, 24), torch.uint8), "scales": ((2, 5, 2), torch.bfloat16),
    }  # fmt: skip
    assert find_format("grid5_g32") is None and find_format("grid4_g48") is None


@pytest.mark.parametrize(
    ("name", "other", "share"), [("grid4_g32", "uint4_g32", 0.95), ("grid4_g64", "uint4_g128", 0.8)]
)
def test_it_errs_less_than_integers_in_no_fewer_bits(name, other, share):
    x = normal(64, 512)
    assert format_of(name).bits_per_weight < format_of(other).bits_per_weight
    assert (rounded(x, name) - x).square().sum() < share * (rounded(x, other) - x).square().sum()


@pytest.mark.parametrize("name", NAMES)
def test_the_error_is_within_its_bound(name):
    for x in (normal(64, 128), normal(64, 128) ** 3, normal(64, 128).abs(), torch.ones(4, 64), torch.zeros(4, 64)):
        error = (rounded(x, name) - x).double()
        whole, rows = rounding_bounds(x, format_of(name))
        assert error.norm() <= whole and (error.norm(dim=-1) <= rows).all()


@pytest.mark.parametrize("name", NAMES)
def test_gptq_errs_less_on_outputs_than_rounding_to_nearest(name):
    format, w = format_of(name), normal(32, 256, seed=1)
    numbers = normal(1000, 320, seed=2)
    x = numbers[:, :64] @ normal(64, 256, seed=3) + 0.3 * numbers[:, 64:]
    found, plain = gptq_encode(w, factor_of(x.T @ x), format), format.encode(w)
    assert {n: (p.shape, p.dtype) for n, p in found.items()} == {n: (p.shape, p.dtype) for n, p in plain.items()}
    errors = [(x @ (format.decode(parts, 256) - w).T).square().mean() for parts in (found, plain)]
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("name", ["grid4_g32", "grid3_g64"])
def test_an_artifact_computes_with_the_numbers_of_the_codes(name, tmp_path, request):
    import transformers

    folder = request.config.rootpath / "examples/tiny-moe"
    artifact = moec.compile(folder, out=tmp_path / "a", quantize=name, accuracy="exact")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(3, 31)[None]
    mask, positions = torch.ones_like(ids), torch.arange(28)[None]
    logits, _ = artifact.session(spinning=False).step(ids.numpy(), mask.numpy(), positions.numpy())
    weights = {n: p for n, p in model.named_parameters() if p.dim() > 1 and "gate.weight" not in n}
    with torch.no_grad():
        for p in {id(p): p for p in weights.values()}.values():
            p.copy_(rounded(p, name))
        want = model(ids).logits.numpy()
    assert np.abs(logits - want).max() <= 1e-4 * np.abs(want).max()
