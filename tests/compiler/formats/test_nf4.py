"""NF4: its table against the quantiles that define it, codes and scales by hand, its error, and an artifact in it."""

from fractions import Fraction
from statistics import NormalDist

import moec
import numpy as np
import pytest
import torch
from moec.compiler.errors import MoecError
from moec.compiler.formats.bounds import rounding_bounds
from moec.compiler.formats.table import format_of
from moec.compiler.weights.sources.checkpoint import open_checkpoint

NF4 = format_of("nf4")
# appendix E of QLoRA (Dettmers et al. 2023), to the digits that are printed there
PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def normal(*sizes, seed=0):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def rounded(x):
    return NF4.decode(NF4.encode(x), x.shape[-1])


def test_the_numbers_are_the_published_ones():
    assert list(NF4.values) == PUBLISHED


def test_the_numbers_are_quantiles_of_the_normal_distribution():
    """The halves have 8 and 7 steps of equal probability between 0 and the quantile of 0.9677083, which becomes 1."""
    last, quantile = 0.9677083, NormalDist().inv_cdf
    above = [quantile(last + (0.5 - last) * i / 8) for i in range(8)]
    below = [-quantile(last + (0.5 - last) * i / 7) for i in range(7)]
    assert list(NF4.values) == pytest.approx(sorted(x / above[0] for x in (*above, 0.0, *below)), abs=2e-7)


def test_codes_and_scales_by_hand():
    x = torch.zeros(2, 64)
    x[0, :5] = 2 * torch.tensor([1.0, -1.0, 0.44070982933044434, 0.16093020141124725, -0.09105003625154495])
    x[1, 1] = -3.0
    parts = NF4.encode(x)
    assert parts["scales"].dtype == torch.bfloat16 and parts["scales"].shape == (2, 1)
    assert parts["codes"].shape == (2, 32) and parts["codes"][:, 3:].unique().tolist() == [0x77]
    assert parts["scales"][0] == 2
    assert parts["codes"][0, :3].tolist() == [0x0F, 0x9C, 0x76]  # two in a byte, the first in the low bits
    stored = {"codes": torch.tensor([[0x0F, 0x9C, *[0x77] * 30]], dtype=torch.uint8), "scales": torch.tensor([[2.5]])}
    want = [2.5, -2.5, 2.5 * 0.44070982933044434, 2.5 * 0.16093020141124725, *[0.0] * 60]
    assert NF4.decode(stored, 64).tolist() == [pytest.approx(want)]
    assert rounded(x)[1, 1] == -3.0 and rounded(x)[1].count_nonzero() == 1


def test_what_is_stored():
    assert NF4.bits_per_weight == Fraction(17, 4)  # 4 and a scale of 16 bits for 64
    parts = NF4.encode(normal(3, 5, 128))
    assert {name: tuple(part.shape) for name, part in parts.items()} == {"codes": (3, 5, 64), "scales": (3, 5, 2)}


def test_the_error_is_below_that_of_the_largest_number_as_scale():
    """QLoRA's scale is the largest number of the block; a search errs less, on any size of numbers."""
    for x in (normal(256, 512), normal(256, 512) ** 3, normal(256, 512) + 1):
        blocks, grid = x.unflatten(-1, (-1, 64)), torch.tensor(PUBLISHED)
        scale = blocks.abs().amax(-1, keepdim=True)
        plain = grid[((blocks / scale).unsqueeze(-1) - grid).abs().argmin(-1)] * scale
        limit = 0.96 * (plain - blocks).norm()
        for size in (1e-30, 1.0, 1e30):
            assert (rounded(x * size) / size - x).norm() < limit


def test_the_error_is_within_its_bound():
    for x in (normal(64, 128), normal(64, 128) ** 3, normal(64, 128).abs(), torch.ones(4, 64), torch.zeros(4, 64)):
        error = (rounded(x) - x).double()
        whole, rows = rounding_bounds(x, NF4)
        assert error.norm() <= whole and (error.norm(dim=-1) <= rows).all()
        assert rows.max() <= 0.15 * x.norm(dim=-1).max() * 64**0.5


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_is_refused(value):
    x = normal(2, 64)
    x[1, 5] = value
    with pytest.raises(ValueError, match="infinite"):
        NF4.encode(x)


def test_an_artifact_computes_with_the_numbers_of_the_codes(tmp_path, request):
    import transformers

    folder = request.config.rootpath / "examples/tiny-moe"
    artifact = moec.compile(folder, out=tmp_path / "a", quantize="nf4")
    assert "nf4" in artifact.manifest["precision"]["layer"]
    plain = sum(t.type.elements for t in open_checkpoint(folder).tensors.values()) * 4
    assert (artifact.folder / "model.onnx.data").stat().st_size < 0.16 * plain  # router and norms are f32
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(3, 31)[None]
    mask, positions = torch.ones_like(ids), torch.arange(28)[None]
    logits, _ = artifact.session(spinning=False).step(ids.numpy(), mask.numpy(), positions.numpy())
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1 and "gate.weight" not in name}
    with torch.no_grad():
        for p in {id(p): p for p in weights.values()}.values():
            p.copy_(rounded(p))
        want = model(ids).logits.numpy()
    assert np.abs(logits - want).max() <= 1e-4 * np.abs(want).max()


def test_accelerators_refuse_it_by_name(tmp_path, request):
    with pytest.raises(MoecError, match="no kernel reads nf4; they read integers of 4 and 8 bits, mxfp4"):
        moec.compile(
            request.config.rootpath / "examples/tiny-moe", out=tmp_path / "a", target="nvidia-h200", quantize="nf4"
        )
