"""awq: scales that change nothing but the rounding, and that lower its error where a few channels are large."""

import pytest
import torch
from moec.compiler.check.tiled import TiledInterpreter
from moec.compiler.driver import opt
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.frontends.load import load
from moec.compiler.ir.pipelines import print_pipeline
from moec.compiler.ir.recipes import FITTED, Tensor, tensors_of
from moec.compiler.ir.types import TensorType
from moec.compiler.quantize.awq_scales import fold_awq_scales
from moec.compiler.quantize.calibrate import collect_inputs, main_inputs
from moec.compiler.weights.awq import _sampled, _search_factors, fit_awq_factors
from moec.compiler.weights.calibrated import Calibrated, Inputs
from moec.compiler.weights.evaluate import evaluate_recipe
from moec.compiler.weights.sources.source import ModuleSource
from moec.compiler.weights.steps.table import step
from moec.targets import TARGETS
from moec.targets.target import FUSED
from tiny_models import random_model, save

TO_MOE = print_pipeline(FUSED)
IDS = torch.randint(3, 128, (3, 40), generator=torch.Generator().manual_seed(5))
POLICY = "method=awq, experts=uint4_g16, attention=uint4_g16, embedding=f32, head=uint4_g16, shared=f32, dense=f32"


@pytest.fixture(scope="module", params=["qwen3_moe", "olmoe"])
def family(request, tmp_path_factory):
    model = random_model(FAMILIES[request.param])
    loaded = load(save(model, tmp_path_factory.mktemp(request.param)))
    return loaded, opt(loaded.module, TO_MOE)


def logits(module, source):
    runner = TiledInterpreter(module, source, tuple(IDS.shape), numbers=lambda recipe: recipe)
    return runner.run(module.main, main_inputs(module, IDS), {})[0]


def test_scales_change_no_number(family):
    """With any factors at all the program gives the same logits."""
    loaded, module = family
    scaled = module.with_functions({f.name: fold_awq_scales(f)[0] for f in module.functions})
    names = {
        t: t.name for f in scaled.functions for c in f.consts for t in tensors_of(c.recipe) if t.name.endswith(FITTED)
    }
    assert {name.removesuffix(FITTED) for name in names.values()} >= {"input_layernorm", "experts_down_proj"}

    class Source:
        tensors = loaded.weights.tensors

        def read(self, name, box=None, expected=None):
            if not name.endswith(FITTED):
                return loaded.weights.read(name, box, expected)
            generator = torch.Generator().manual_seed(len(name))
            factors = torch.rand(expected.sizes, generator=generator) * 4 + 0.2
            return factors[tuple(slice(*span) for span in box)]

    wanted = logits(module, loaded.weights)
    assert float((logits(scaled, Source()) - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def test_factors_are_fitted_for_every_scaled_weight(family):
    loaded, module = family
    quantized = opt(module, f"quantize{{{POLICY}}}")
    calibration = collect_inputs(quantized, loaded.weights, IDS)
    fitted = fit_awq_factors(quantized, loaded.weights, calibration.inputs)
    wanted = {
        name for f in TARGETS["cpu"].lower(quantized, None).module.functions for c in f.consts for name in [t.name for t in tensors_of(c.recipe)]
        if name.endswith(FITTED)
    }  # fmt: skip
    assert {name.split(".")[-2] for name in fitted} == {name.split(".")[-2] for name in wanted}
    assert all(torch.isfinite(s).all() and (s > 0).all() for s in fitted.values())
    source = Calibrated(loaded.weights, calibration.inputs, fitted)
    assert torch.isfinite(logits(quantized, source)).all()


def test_a_few_large_channels_are_kept():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 64, generator=generator)
    x[:, ::16] *= 30
    w = torch.randn(32, 64, generator=generator)
    item = Tensor("w", TensorType.of("f32", 32, 64))
    quantized = step("quantize", item, to="uint4_g64", method="awq")
    s = _search_factors(quantized, ModuleSource({"w": w}), None, [_sampled(quantized, Inputs(x.bfloat16()), None)])

    def error(factors):
        parts = find("uint4_g64").encode(w * factors)
        return float((x @ (find("uint4_g64").decode(parts, 64) / factors - w).T).square().mean())

    from moec.compiler.formats.table import format_of as find

    assert float(s[::16].min()) > float(s[1::16].max())
    assert error(s) < 0.6 * error(torch.ones(64))


def test_scale_in_boxes():
    item = Tensor("w", TensorType.of("f32", 3, 8, 4))
    factors = Tensor("s", TensorType.of("f32", 3, 4))
    source = ModuleSource({"w": torch.randn(3, 8, 4), "s": torch.rand(3, 4) + 0.5})
    scaled = step("scale", item, factors, axes=(0, 1), start=4, inverse=True)
    whole = evaluate_recipe(scaled, source)
    wanted = source.read("w").clone()
    wanted[:, 4:] /= source.read("s")[:, :, None]
    assert torch.equal(whole, wanted)
    for box in (((1, 3), (2, 7), (1, 4)), ((0, 1), (0, 4), (0, 4)), ((2, 3), (5, 6), (0, 1))):
        assert torch.equal(evaluate_recipe(scaled, source, box), wanted[tuple(slice(*span) for span in box)])
    with pytest.raises(ValueError, match="do not fit the axes"):
        step("scale", item, factors, axes=(0, 1))
