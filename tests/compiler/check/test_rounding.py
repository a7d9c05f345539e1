"""`--check` of passes that store weights in fewer bits: honest rounding passes, and wrong weights do not."""

from dataclasses import replace

import checkpoint_formats as formats
import pytest
import torch
from moec.compiler.errors import MoecError
from moec.compiler.formats.format import Format
from moec.compiler.formats.table import FORMAT_NAMES, GROUPS, find_format
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.frontends.load import load
from moec.compiler.ir.module import Const
from moec.compiler.ir.pipelines import PassCall
from moec.compiler.ir.recipes import Literal, Step
from moec.compiler.ir.types import TensorType
from moec.compiler.rewrite.declare import pass_
from moec.compiler.rewrite.pipeline import run_pipeline
from moec.compiler.text.parser import parse_module
from moec.compiler.weights.steps import quantized as evaluated
from moec.compiler.weights.steps.table import step
from moec.passes import PASSES
from quantized_checkpoints import CASES, checkpoint, quantized
from tiny_models import random_model

NAMES = [name for n in FORMAT_NAMES for name in ([n.replace("N", str(g)) for g in GROUPS] if "N" in n else [n])]
METHODS = {name: ("rtn", "gptq", "awq") if find_format(name).element == "int" else ("rtn",) for name in NAMES}
TEXT = """moec 1 stage moe
dim T in 1..64

func @main(%x: f32[T, 256], %ids: i64[T, 2], %gates: f32[T, 2]) -> (f32[T, 256]) {
  const %norm : f32[256] = tensor("norm", f32[256])
  const %w : f32[256, 256] = tensor("w", f32[256, 256])
  const %up : f32[5, 512, 256] = tensor("up", f32[5, 512, 256])
  const %down : f32[5, 256, 256] = tensor("down", f32[5, 256, 256])
  %n = nn.rms_norm(%x, %norm) {eps=1e-6} : f32[T, 256]
  %h = core.linear(%n, %w, _) : f32[T, 256]
  %y = moe.experts(%h, %ids, %gates, %up, %down, _, _) {act=gated(silu)} : f32[T, 256]
  return %y
}
"""


@pytest.fixture(autouse=True)
def reproducers(tmp_path, monkeypatch):
    """Have failures write their reproducers elsewhere than here."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def program():
    return parse_module(TEXT)


def checked(module, name, table=PASSES, **options):
    """Run a pass on a module and check what it did; return the module."""
    return run_pipeline(module, (PassCall(name, options),), table=table, check=True).module


def everything(name, method="rtn"):
    return {**dict.fromkeys(("experts", "attention", "shared", "dense", "head"), name), "method": method}


def formats_in(module):
    return {c.value.type.dtype for f in module.functions for c in f.consts if find_format(c.value.type.dtype)}


@pytest.mark.parametrize("name", NAMES)
def test_honest_rounding_passes(program, name):
    for method in METHODS[name]:
        assert formats_in(checked(program, "quantize", **everything(name, method))) == {name}


@pytest.mark.parametrize("to", ["bf16", "f16"])
def test_shorter_floats_pass(program, to):
    assert "cast" in str(checked(program, "round-weights", to=to).main.consts)


@pytest.fixture(scope="module")
def models():
    """Return programs of tiny models at stage moe, routers and attention and all."""
    pipeline = ["cleanup", "lift-moe", "cleanup", "fuse-router", "cleanup"]
    return {
        family: run_pipeline(
            load(random_model(FAMILIES[family])).module, tuple(map(PassCall, pipeline)), table=PASSES
        ).module
        for family in ("qwen2_moe", "gpt_oss")
    }  # fmt: skip


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_whole_models_pass(models, family):
    """With routers that choose other experts, and experts of one layer in several formats."""
    module = models[family]
    for name, method in (("uint2_g16", "rtn"), ("int4_g16", "awq"), ("uint4_g16", "gptq"), ("int2_g16", "rtn")):
        assert name in formats_in(checked(module, "quantize", **everything(name, method)))
    assert checked(module, "round-weights") is not module
    groups = "0.experts[0,2]=uint4_g16 0.experts[1]=int8_g16"
    assert checked(module, "quantize", experts="uint2_g16", layers=groups) is not module


@pytest.mark.parametrize("name", ["gptq", "ct int8 rows", "nvfp4"])
def test_kept_codes_pass_and_others_do_not(name, tmp_path):
    config, write, family, _ = CASES[name]
    folder, _ = checkpoint(tmp_path, family, config, quantized(write))
    module = moe(load(folder).module)
    checked(module, "keep-codes")
    for fault in (twice_the_scale, codes_of_others):
        with pytest.raises(MoecError, match=r"wrong weight: .* another weight than before"):
            checked(module, "wrong", table=faulty("keep-codes", fault))


def test_codes_that_no_format_holds_are_near(tmp_path):
    """GPTQ's desc_act has no format: its weights go to 8 bits, and the check holds them to that."""
    config = {**CASES["gptq"][0], "desc_act": True}
    folder, _ = checkpoint(tmp_path, "mixtral", config, quantized(lambda w: formats.gptq(w, act_order=True)))
    module = moe(load(folder).module)
    assert formats_in(checked(module, "keep-codes")) == {"int8_g32", "int8_g64"}
    with pytest.raises(MoecError, match="wrong weight"):
        checked(module, "wrong", table=faulty("keep-codes", zeroed))


def moe(module):
    steps = tuple(map(PassCall, ("cleanup", "lift-moe", "cleanup", "fuse-router", "cleanup")))
    return run_pipeline(module, steps, table=PASSES).module


# --- faults ----------------------------------------------------------------------------------------------------


def zeroed(recipe):
    return recipe and replace(recipe, items=(times(recipe.items[0], 0.0), *recipe.items[1:]))


def doubled(recipe):
    return replace(recipe, items=(times(recipe.items[0], 2.0), *recipe.items[1:]))


def exchanged(recipe):
    """Exchange the first two experts (rows of a matrix)."""
    item = recipe.items[0]
    parts = [step("slice", item, axis=0, start=a, stop=b) for a, b in ((1, 2), (0, 1), (2, item.type.sizes[0]))]
    return step(recipe.name, step("concat", *parts, axis=0), **recipe.attributes)


def times(item, factor):
    width = item.type.sizes[-1]
    last = len(item.type.sizes) - 1
    return step("scale", item, Literal(TensorType.of("f32", width), (factor,) * width), axes=(last,))


def twice_the_scale(recipe):
    codes, scales, *zeros = recipe.items
    return step("packed", codes, step("affine", scales, to=scales.type.dtype, factor=2), *zeros, **recipe.attributes)


def codes_of_others(recipe):
    codes, *rest = recipe.items
    rows = codes.type.sizes[0]
    turned = [step("slice", codes, axis=0, start=a, stop=b) for a, b in ((rows - 1, rows), (0, rows - 1))]
    return step("packed", step("concat", *turned, axis=0), *rest, **recipe.attributes)


def faulty(name, change, only=("quantize", "packed")):
    """Return a table with the pass `wrong`: another pass, and then a change to the steps that it made."""

    def broken(recipe):
        if not isinstance(recipe, Step):
            return recipe
        if recipe.name in only and recipe.attributes["to"] != "f32":
            return change(recipe)
        return replace(recipe, items=tuple(map(broken, recipe.items)))

    @pass_(reads="moe", rounds=True)
    def wrong(module, target, *, to: str = "", method: str = "rtn"):
        options = everything(to, method) if name == "quantize" else {"to": to} if to else {}
        made = PASSES[name].run(module, target, **options).module
        changed = {
            f.name: replace(f, consts=tuple(Const(c.value, broken(c.recipe)) for c in f.consts)) for f in made.functions
        }
        return made.with_functions(changed)

    return {"wrong": wrong}


@pytest.mark.parametrize("name", NAMES)
def test_other_weights_do_not_pass(program, name):
    for method in METHODS[name]:
        for fault in (zeroed, doubled, exchanged):
            with pytest.raises(MoecError, match=r"another weight than before.*found after pass wrong"):
                checked(program, "wrong", table=faulty("quantize", fault), to=name, method=method)


@pytest.mark.parametrize("fault", [zeroed, doubled, exchanged])
def test_shorter_floats_of_other_weights_do_not_pass(program, fault):
    with pytest.raises(MoecError, match="another weight than before"):
        checked(program, "wrong", table=faulty("round-weights", fault, ("cast",)), to="bf16")


WRONG_CODES = {
    "zero": lambda x: x * 0,
    "double": lambda x: x * 2,
    "half": lambda x: x / 2,
    "negative": lambda x: -x,
    "not a number": lambda x: x * float("nan"),
    "rows turned": lambda x: x.roll(1, -2),
    "one row is 0": lambda x: torch.cat([x[..., :-1, :], x[..., -1:, :] * 0], -2),
}


@pytest.mark.parametrize("name", NAMES)
def test_codes_that_stand_for_other_numbers_do_not_pass(program, name, monkeypatch):
    decode = Format.decode
    for wrong in WRONG_CODES.values():
        monkeypatch.setattr(Format, "decode", lambda *a, change=wrong: change(decode(*a)))
        with pytest.raises(MoecError, match=f"wrong weight: {name} .*is off by"):
            checked(program, "quantize", **everything(name))


def test_an_expert_that_no_token_visits_is_checked_too(models, monkeypatch):
    """Only the last expert is wrong, by an eighth: more than 4 bits may cost, less than any output shows."""
    encode = evaluated.encode_parts

    def wrong(quantized, box, inner, whole=None):
        parts = encode(quantized, box, inner, whole)
        last = len(box) > 2 and box[0][0] == quantized.type.sizes[0] - 1
        return {**parts, "scales": parts["scales"] * 1.25} if last else parts

    monkeypatch.setattr(evaluated, "encode_parts", wrong)
    with pytest.raises(MoecError, match=r"wrong weight: uint4_g16 of expert \d+ is off by 0.2"):
        checked(models["qwen2_moe"], "quantize", **everything("uint4_g16"))


def test_a_pass_that_rounds_may_do_nothing_else(program):
    @pass_(reads="moe", rounds=True)
    def wrong(module, target):
        rounded = PASSES["round-weights"](module)
        ops = tuple(replace(o, attrs=(("eps", 0.5),)) if o.name == "nn.rms_norm" else o for o in rounded.main.ops)
        return rounded.with_functions({"main": replace(rounded.main, ops=ops)})

    with pytest.raises(MoecError, match="wrong numbers: %y differs"):
        checked(program, "wrong", table={"wrong": wrong})
