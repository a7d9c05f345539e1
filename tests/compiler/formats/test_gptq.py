"""gptq: against rounding to nearest, against a direct solution, in tiles, and with inputs that say nothing."""

import pytest
import torch
from moec.compiler.errors import MoecError
from moec.compiler.formats.gptq import factor_of, gptq_encode
from moec.compiler.formats.integers import search_scales
from moec.compiler.formats.table import format_of
from moec.compiler.ir.recipes import Tensor
from moec.compiler.ir.types import TensorType
from moec.compiler.weights.calibrated import Calibrated, Inputs
from moec.compiler.weights.evaluate import evaluate_recipe
from moec.compiler.weights.rows import encode_rows
from moec.compiler.weights.sources.source import ModuleSource
from moec.compiler.weights.steps.table import step
from moec.compiler.weights.uncalibrated import without_calibration

FORMATS = ("uint4_g32", "int4_g64", "uint2_g16", "int8_g64", "uint4_g256")


def inverse_factor(x):
    """Return the factor of inputs f32[N, K]."""
    return factor_of(x.T @ x)


def correlated(rows, width, seed=0):
    """Return inputs f32[rows, width] that lie near a space of a quarter of the width, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width // 4, width, generator=generator)
    numbers = torch.randn(rows, width // 4 + width, generator=generator)  # more rows begin with the same ones
    return numbers[:, : width // 4] @ mixing + 0.3 * numbers[:, width // 4 :]


def weights(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def output_error(parts, format, w, x):
    return float((x @ (format.decode(parts, w.shape[1]) - w).T).square().mean())


@pytest.mark.parametrize("name", FORMATS)
def test_errs_less_than_rounding_to_nearest(name):
    format, x, w = format_of(name), correlated(1000, 256), weights(48, 256)
    found, plain = gptq_encode(w, inverse_factor(x), format), format.encode(w)
    layouts = [{k: (v.shape, v.dtype, v.stride()) for k, v in parts.items()} for parts in (found, plain)]
    assert layouts[0] == layouts[1]
    assert output_error(found, format, w, x) < 0.6 * output_error(plain, format, w, x)
    unseen = correlated(3000, 256)[1000:]  # the same mixing, other tokens
    assert output_error(found, format, w, unseen) < 0.6 * output_error(plain, format, w, unseen)


def test_independent_inputs_of_one_size_mean_rounding_to_nearest():
    format, w = format_of("uint4_g32"), weights(16, 64)
    found = gptq_encode(w, inverse_factor(torch.eye(64) * 3), format)
    again = format.decode(found, 64)
    scales = found["scales"].repeat_interleave(32, dim=1)
    inside = (again - w).abs() <= scales / 2 + 1e-6  # nearest, unless the search clipped the number
    ends = (format.decode(format.encode(w), 64) - w).abs() > scales / 2
    assert (inside | ends).all()
    assert output_error(found, format, w, torch.eye(64)) <= 1.2 * output_error(
        format.encode(w), format, w, torch.eye(64)
    )


def test_a_scale_is_chosen_by_what_errors_do_to_the_outputs():
    """Of two candidates the search takes that with the least weighted error, found here by trying each."""
    format, x, importance = format_of("uint4_g32"), weights(200, 32), torch.rand(32).square() * 10
    plain, counted = search_scales(x, format), search_scales(x, format, importance)

    def error(found):
        factor, scale, zero = (t.unsqueeze(1) for t in found)
        codes = (x * factor + zero).round().clamp(0, 15)
        return ((codes - zero) * scale - x).square() @ importance

    assert (error(counted) <= error(plain) * (1 + 1e-5)).all()
    assert error(counted).sum() < 0.97 * error(plain).sum()


def test_the_factor_is_that_of_the_inverse():
    x = correlated(300, 32)
    h = (x.T @ x).double()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    u = inverse_factor(x).double()
    assert torch.allclose(u, u.triu())
    assert torch.allclose(u.T @ u @ h, torch.eye(32, dtype=torch.float64), atol=1e-2)


def test_the_update_is_the_best_one():
    """After column 0 is rounded, the others as gptq left them minimise the error: compared with least squares."""
    x, w = correlated(400, 16).double().float(), weights(1, 16)
    u = inverse_factor(x)
    rounded = w[0, 0].round()
    updated = w[0, 1:] - (w[0, 0] - rounded) / u[0, 0] * u[0, 1:]
    h = x.T @ x
    h.diagonal().add_(0.01 * h.diagonal().mean())
    wanted = w[0, 1:] + torch.linalg.solve(h[1:, 1:], h[1:, 0]) * (w[0, 0] - rounded)
    assert torch.allclose(updated, wanted, atol=1e-3)


def test_dead_inputs_do_no_harm():
    format, x, w = format_of("uint4_g32"), correlated(500, 64), weights(8, 64)
    x[:, 32:] = 0
    w[:, :16] = 0
    numbers = format.decode(gptq_encode(w, inverse_factor(x), format), 64)
    assert torch.isfinite(numbers).all()
    assert float((numbers[:, 32:] - w[:, 32:]).square().mean()) < 0.05
    assert inverse_factor(torch.zeros(10, 64)) is None
    few = inverse_factor(correlated(3, 64))  # fewer rows than columns: H is singular but for the damping
    assert torch.isfinite(format.decode(gptq_encode(w, few, format), 64)).all()


# --- through recipes -------------------------------------------------------------------------------------------


def calibrated(name, *shape, inputs, **extra):
    """Return a quantized recipe of a random tensor, its item, and a source that knows the inputs."""
    source = ModuleSource({"w": weights(*shape)})
    item = Tensor("w", TensorType.of("f32", *shape))
    quantized = step("quantize", item, to=name, method="gptq", weight="main:w", **extra)
    return quantized, Calibrated(source, {"main:w": inputs})


def test_tiles_are_the_whole():
    x = correlated(200, 64).bfloat16()
    quantized, source = calibrated("uint4_g32", 24, 64, inputs=Inputs(x))
    whole = encode_rows(quantized, source, ((0, 24),))
    for a, b in ((0, 8), (8, 9), (9, 24)):
        found = encode_rows(quantized, source, ((a, b),))
        assert torch.allclose(found["scales"], whole["scales"][a:b], rtol=1e-5)  # sums in another order
        same = (found["codes"] == whole["codes"][a:b]).float().mean()
        assert same > 0.99, "codes differ only where a number lies half way between two"
    for name, part in whole.items():  # small parts are pulled one by one
        assert torch.equal(evaluate_recipe(step(name, quantized), source), part)
    assert torch.equal(evaluate_recipe(quantized, source), format_of("uint4_g32").decode(whole, 64))


def test_every_expert_has_its_own_inputs():
    x = correlated(300, 64).bfloat16()
    chosen = (torch.arange(100), None, torch.arange(100, 300))
    quantized, source = calibrated("uint4_g32", 3, 8, 64, inputs=Inputs(x, chosen))
    w, format = weights(3, 8, 64), format_of("uint4_g32")
    found = encode_rows(quantized, source, ((0, 3), (0, 8)))
    for e in (0, 2):
        wanted = gptq_encode(w[e], inverse_factor(x[chosen[e]].float()), format)
        assert torch.equal(found["codes"][e], wanted["codes"])
    assert torch.equal(found["codes"][1], format.encode(w[1])["codes"])  # it saw too few tokens


def test_interleaved_rows_are_the_same_rows():
    x = correlated(300, 64).bfloat16()
    quantized, source = calibrated("uint4_g32", 3, 8, 64, inputs=Inputs(x, (torch.arange(300),) * 3))
    item = quantized.items[0]
    halves = [step("slice", item, axis=1, start=a, stop=a + 4) for a in (0, 4)]
    turned = step("quantize", step("interleave", *halves, axis=1), to="uint4_g32", method="gptq", weight="main:w")
    plain = evaluate_recipe(quantized, source)
    assert torch.equal(evaluate_recipe(turned, source), plain.reshape(3, 2, 4, 64).transpose(1, 2).reshape(3, 8, 64))


def test_a_weight_whose_inputs_are_lost_is_never_rounded_to_nearest():
    quantized, source = calibrated("uint4_g32", 8, 64, inputs=Inputs(correlated(99, 64).bfloat16()))
    nameless = step("quantize", quantized.items[0], to="uint4_g32", method="gptq")
    other = step("quantize", quantized.items[0], to="uint4_g32", method="gptq", weight="main:other")
    for recipe, given in ((quantized, source.source), (nameless, source), (other, source)):
        with pytest.raises(MoecError, match="the calibration saw nothing that the weight") as caught:
            evaluate_recipe(recipe, given)
        assert caught.value.model == "w" and "method=gptq" in caught.value.todo
    plain = step("quantize", quantized.items[0], to="uint4_g32")
    assert torch.equal(
        evaluate_recipe(without_calibration(quantized), source.source), evaluate_recipe(plain, source.source)
    )
    assert not torch.equal(evaluate_recipe(quantized, source), evaluate_recipe(plain, source.source))
