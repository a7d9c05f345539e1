"""From stage moe to an accelerator's ops: their numbers, costs and weights, which formats they hold, the targets by name."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from moec.compiler.check.compare import compare_function
from moec.compiler.driver import compile_source, passes_for
from moec.compiler.errors import MoecError
from moec.compiler.formats.table import format_of
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.ir.activation import Activation
from moec.compiler.ir.pipelines import parse_pipeline, print_pipeline
from moec.compiler.ir.recipes import Tensor
from moec.compiler.ir.types import TensorType
from moec.compiler.ops import OPS
from moec.compiler.quantize.request import read_request, with_quantization
from moec.compiler.quantize.stored import is_lossy
from moec.compiler.rewrite.pipeline import run_pipeline
from moec.compiler.text.parser import parse_module
from moec.compiler.weights.demote import demoted_recipe, is_demotion
from moec.compiler.weights.steps.table import step
from moec.passes import PASSES
from moec.targets import TARGETS, open_target
from moec.targets.accelerator.kernels.formats import why_not_held, why_slow
from moec.targets.accelerator.lower.module import lower_module
from moec.targets.accelerator.select.supported import why_unsupported
from tiny_models import random_model, save

TARGET = open_target("nvidia-h200", {})


def reference(name, *operands, **attributes):
    return OPS[name].reference(*operands, **attributes)


def types(*tensors):
    names = {torch.float32: "f32", torch.bfloat16: "bf16", torch.int64: "i64"}
    return [None if t is None else TensorType.of(names[t.dtype], *t.shape) for t in tensors]


# --- ops -----------------------------------------------------------------------------------------------------------

ACTS = [
    Activation(), Activation("silu", True, "interleaved", 1.702, 1.0, 0.5), Activation("gelu_tanh"),
    Activation("relu2", gated=False), Activation("gelu", gated=False), Activation(limit=0.5, clamp_after=True),
]  # fmt: skip


RESIDUAL = """moec 1 stage moe
dim B in 1..4
dim S in 1..8
func @main(%hidden: f32[B, S, 8], %x: f32[B*S, 8], %other: f32[B, S, 8], %ids: i64[B*S, 2], %gates: f32[B*S, 2]) -> ({result}) {{
  const %up : f32[3, 8, 8] = cast(tensor("up", bf16[3, 8, 8]), to=f32)
  const %down : f32[3, 8, 4] = cast(tensor("down", bf16[3, 8, 4]), to=f32)
  %e = moe.experts(%x, %ids, %gates, %up, %down, _, _) : f32[B*S, 8]
  %rows = core.reshape(%e) {{shape=[B, S, 8]}} : f32[B, S, 8]
  %shared = core.neg(%other) : f32[B, S, 8]
  %both = core.add(%rows, %shared) : f32[B, S, 8]
  %y = core.add(%hidden, %both) : f32[B, S, 8]
  return {returned}
}}
"""


@pytest.mark.parametrize(("returned", "adds", "given"), [("%y", 0, 2), ("%y, %both", 1, 1), ("%y, %e", 2, 0)])
def test_residual_adds_are_a_part_of_the_sum_of_experts(returned, adds, given):
    """All of them, but for what something else reads too."""
    types = {"%y": "f32[B, S, 8]", "%both": "f32[B, S, 8]", "%e": "f32[B*S, 8]"}
    result = ", ".join(types[name] for name in returned.split(", "))
    module = parse_module(RESIDUAL.format(returned=returned, result=result))
    lowered = lower_module(module).module
    names = [op.name for op in lowered.main.ops]
    assert names.count("core.add") == adds and names.count("acc.grouped_down") == 1
    (experts,) = (op for op in lowered.main.ops if op.name == "acc.grouped_down")
    assert sum(experts.get(name) is not None for name in ("residual", "shared")) == given
    compare_function(module, lowered, "main", {}, 1e-6)


@pytest.mark.parametrize("act", ACTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", ["some", "one", "all on one expert"])
def test_sort_and_grouped_linears_are_the_experts(act, dtype, bias, tokens):
    attributes = {"act": act}
    torch.manual_seed(0)
    count, experts, chosen, hidden, inner = (1 if tokens == "one" else 9), 6, 2, 12, 10
    x = torch.randn(count, hidden)
    ids = torch.rand(count, experts - 2).argsort(-1)[:, :chosen]  # two experts get nothing
    if tokens == "all on one expert":
        ids = torch.full((count, 1), 3)
    gates = torch.rand(ids.shape)
    rows = inner * (2 if act.gated else 1)
    up, down = torch.randn(experts, rows, hidden).to(dtype), torch.randn(experts, hidden, inner).to(dtype)
    up_bias, down_bias = (torch.randn(experts, rows), torch.randn(experts, hidden)) if bias else (None, None)
    pairs = (ids, *reference("acc.sort", ids, experts=experts))
    order = pairs[1].split(torch.bincount(ids.flatten(), minlength=experts).tolist())
    for e, own in enumerate(order):
        assert own.tolist() == (ids.flatten() == e).nonzero().flatten().tolist()
    h = reference("acc.grouped_up", x, *pairs, up, up_bias, act=act)
    y = reference("acc.grouped_down", h, *pairs, gates, down, down_bias, None, None)
    wanted = reference("moe.experts", x, ids, gates, up.float(), down.float(), up_bias, down_bias, act=act)
    assert torch.allclose(y, wanted, atol=1e-5 * float(wanted.abs().max()))
    first, second = types(x, *pairs, up, up_bias), types(h, *pairs, gates, down, down_bias, None, None)
    assert OPS["acc.grouped_up"].infer(first, attributes)[0].sizes == h.shape
    assert OPS["acc.grouped_down"].infer(second, {})[0].sizes == y.shape
    whole = types(x, ids, gates, up.float(), down.float(), up_bias, down_bias)
    flops = OPS["moe.experts"].flops(whole, tuple(types(y)), attributes)
    assert flops == sum((
        OPS["acc.grouped_up"].flops(first, tuple(types(h)), attributes),
        OPS["acc.grouped_down"].flops(second, tuple(types(y)), {}),
    ))  # fmt: skip


def test_gated_mlp_in_two_parts():
    x, up, down = torch.randn(3, 2, 8), torch.randn(12, 8), torch.randn(8, 6)
    act = Activation("gelu_tanh", layout="interleaved", beta=0.5)
    h = reference("acc.gated_up", x, up, None, act=act)
    y = reference("acc.linear", h, down, None)
    wanted = reference("nn.gated_mlp", x, up, down, None, None, None, act=act)
    assert torch.equal(y, wanted)
    flops = OPS["nn.gated_mlp"].flops([*types(x, up, down), None, None, None], tuple(types(y)), {})
    first = OPS["acc.gated_up"].flops([*types(x, up), None], tuple(types(h)), {})
    assert flops == first + OPS["acc.linear"].flops([*types(h, down), None], tuple(types(y)), {})


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("extras", [True, False])
def test_rope_append_and_attention_are_the_cached_attention(packed, extras):
    torch.manual_seed(1)
    batch, new, past, heads, groups, width = 2, 3, 4, 4, 2, 8
    q, k, v = (torch.randn(batch, new, n * width) for n in (heads, groups, groups))
    states = torch.randn(2, batch, groups, past, width)
    cos, sin = (torch.randn(1, new, 4), torch.randn(1, new, 4)) if extras else (None, None)
    norms = (torch.rand(width), torch.rand(width)) if extras else (None, None)
    given = (torch.cat((q, k, v), -1), None, None) if packed else (q, k, v)
    given = (*given, *states, cos, sin, *norms)
    turned, key, value = reference("acc.rope_append", *given, heads=heads, eps=1e-6)
    y = reference("nn.attention", turned, key, value, None, None, scale=0.3, window=3).flatten(2)
    wanted = reference("nn.cached_attention", *given, None, None, heads=heads, eps=1e-6, scale=0.3, window=3)
    assert all(map(torch.equal, (y, key, value), wanted))


@pytest.mark.parametrize(
    ("name", "operands", "attributes", "what"),
    [
        ("acc.linear", ["f32[2, 8]", "i64[4, 8]", None], {}, "weights are bf16, f32 or in a quantized format"),
        ("acc.gated_up", ["f32[2, 8]", "bf16[5, 8]", None], {}, "5 rows are no halves"),
        ("acc.gated_up", ["f32[2, 8]", "bf16[4, 8]", None], {"act": "swish"}, "act=swish is no activation"),
        (
            "acc.grouped_up",
            ["f32[2, 8]", "i64[2, 2]", "i64[3]", "i64[5, 3, 3]", "bf16[3, 4, 8]", None],
            {},
            "does not order",
        ),
        (
            "acc.grouped_up",
            ["f32[2, 8]", "i64[2, 2]", "i64[4]", "i64[5, 3, 3]", "bf16[3, 4, 8]", None],
            {},
            r"i64\[5, 3, 3\]",
        ),
        ("acc.window_conv", ["f32[1, 2, 8]", "state f32[1, 8, 2]", "f32[8, 4]", None], {}, "do not fit"),
        (
            "acc.linear_attention",
            ["f32[1, 2, 3, 8]", "f32[1, 2, 3, 8]", "f32[1, 2, 4, 6]", None, None, None, "state f32[1, 4, 8, 6]"],
            {},
            "do not fit the state",
        ),
        (
            "acc.linear_attention",
            ["f32[1, 2, 4, 8]", "f32[1, 2, 4, 8]", "f32[1, 2, 4, 6]", None, "f32[4, 8]", None, "state f32[1, 4, 8, 6]"],
            {},
            "there is no decay",
        ),
    ],
)
def test_operands_that_do_not_fit(name, operands, attributes, what):
    def type_of(text):
        dtype, _, sizes = text.removeprefix("state ").partition("[")
        return TensorType.of(dtype, *map(int, sizes[:-1].split(",")), state=text.startswith("state "))

    with pytest.raises(MoecError, match=what):
        OPS[name].infer([text and type_of(text) for text in operands], attributes)


# --- weights -------------------------------------------------------------------------------------------------------


def leaf(dtype, *sizes):
    return Tensor("w", TensorType.of(dtype, *(sizes or (4, 4))))


def test_narrowed():
    wide = step("cast", leaf("bf16"), to="f32")
    assert demoted_recipe(wide) == (leaf("bf16"), True)
    assert demoted_recipe(step("transpose", wide, perm=(1, 0))) == (step("transpose", leaf("bf16"), perm=(1, 0)), True)
    mixed = step("concat", wide, step("cast", leaf("f16"), to="f32"), axis=0)
    assert demoted_recipe(mixed) == (step("concat", leaf("bf16"), step("cast", leaf("f16"), to="bf16"), axis=0), False)
    assert demoted_recipe(step("cast", leaf("f8e4m3"), to="f32")) == (step("cast", leaf("f8e4m3"), to="bf16"), True)
    assert demoted_recipe(wide, "f16") == (step("cast", leaf("bf16"), to="f16"), False)
    assert not is_demotion(wide) and is_demotion(step("cast", leaf("f32"), to="bf16"))
    assert not is_demotion(step("cast", leaf("f8e4m3"), to="bf16"))
    assert is_demotion(step("cast", leaf("bf16"), to="f16"))


LINEAR = """moec 1 stage moe
dim T in 1..64
func @main(%x: f32[T, 256]) -> (f32[T, 256]) {{
  const %w : f32[256, 256] = {}
  %y = core.linear(%x, %w, _) : f32[T, 256]
  return %y
}}
"""


def test_rounding_is_lossy_and_bf16_is_not():
    steps = parse_pipeline("round-weights,lower")
    for recipe, lossy in [('tensor("w", f32[256, 256])', True), ('cast(tensor("w", bf16[256, 256]), to=f32)', False)]:
        module = parse_module(LINEAR.format(recipe))
        run = run_pipeline(module, steps, target=TARGET, check=True, table=passes_for(TARGET))
        stored = run.module.main.consts[0].value
        assert stored.type.dtype == "bf16" and stored.name == "w"
        assert is_lossy(run.module) == lossy == run.timings[0].changed
        assert any("1 weights are rounded to bf16: %w" in note.reason for note in run.notes) == lossy
    with pytest.raises(MoecError, match="not rounded to f8"):
        PASSES["round-weights"](module, to="f8")


def test_a_matrix_that_bf16_does_not_hold_stays_and_says_so():
    lowered, notes = lower_module(parse_module(LINEAR.format('tensor("w", f32[256, 256])')))
    assert lowered.main.consts[0].value.type.dtype == "f32"
    assert any("%w stays f32" in note.reason and "round-weights" in note.reason for note in notes)
    with pytest.raises(MoecError, match="pass lower has no option accuracy"):
        passes_for(TARGET)["lower"].convert({"accuracy": "exact"})
    assert lower_module(lowered).module is lowered


def test_quantize_comes_before_rounding():
    request = read_request("experts=int4")
    pipelines = {
        "cleanup,round-weights,lower": "cleanup,quantize{experts=int4},round-weights,lower",
        "cleanup,lower": "cleanup,quantize{experts=int4},lower",
    }
    for before, after in pipelines.items():
        assert print_pipeline(with_quantization(parse_pipeline(before), request, None)[0]) == after


BLOCKS = """moec 1 stage moe
dim T in 1..64
func @main(%x: f32[T, 256], %ids: i64[T, 2], %gates: f32[T, 2]) -> (f32[T, 256]) {
  const %w : f32[200, 256] = dequantize(tensor("w", f8e4m3[200, 256]), tensor("w.s", f32[2, 2]), block=[128, 128])
  const %part : f32[128, 256] = slice(dequantize(tensor("p", f8e4m3[384, 256]), tensor("p.s", f8e8m0[3, 2]), block=[128, 128]), axis=0, start=128, stop=256)
  const %up : f32[4, 256, 256] = concat(stack(dequantize(tensor("e.{0..3}.gate", f8e4m3[128, 256]), tensor("e.{0..3}.gate.s", f32[1, 2]), block=[128, 128])), stack(dequantize(tensor("e.{0..3}.up", f8e4m3[128, 256]), tensor("e.{0..3}.up.s", f32[1, 2]), block=[128, 128])), axis=1)
  const %down : f32[4, 256, 128] = stack(dequantize(tensor("e.{0..3}.down", f8e4m3[256, 128]), tensor("e.{0..3}.down.s", f32[2, 1]), block=[128, 128]))
  const %out : f32[256, 200] = transpose(dequantize(tensor("o", f8e4m3[200, 256]), tensor("o.s", f32[2, 2]), block=[128, 128]), perm=[1, 0])
  const %last : f32[256, 128] = tensor("last", f32[256, 128])
  %y = moe.experts(%x, %ids, %gates, %up, %down, _, _) : f32[T, 256]
  %a = core.linear(%y, %w, _) : f32[T, 200]
  %b = core.linear(%a, %out, _) : f32[T, 256]
  %c = core.linear(%b, %part, _) : f32[T, 128]
  %d = core.linear(%c, %last, _) : f32[T, 256]
  return %d
}
"""


def test_fp8_blocks_of_a_checkpoint_are_kept():
    module = parse_module(BLOCKS)
    kept, notes = PASSES["keep-codes"].run(module, TARGET)
    formats = {c.value.name: c.value.type.dtype for c in kept.main.consts}
    blocks = dict.fromkeys(("w", "part", "up", "down"), "fp8_b128")
    assert formats == {**blocks, "out": formats["out"], "last": "f32"} and formats["out"].startswith("f32"), notes
    assert any("blocks of rows and columns would be turned" in note.reason for note in notes)
    compare_function(module, kept, "main", {}, 1e-6)
    lowered = lower_module(PASSES["round-weights"](kept)).module
    assert {c.value.name: c.value.type.dtype for c in lowered.main.consts} == {**blocks, "out": "bf16", "last": "bf16"}
    compare_function(PASSES["round-weights"](kept), lowered, "main", {}, 1e-6)


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "deepseek_v3", "deepseek_v4"])
def test_families_are_lowered_with_their_numbers(family, tmp_path):
    """Of random checkpoints in f32, so that every matrix is rounded; the lowering itself changes no number."""
    folder = save(random_model(FAMILIES[family]), tmp_path)
    done = compile_source(folder, target="nvidia-h200", stop_after="lower", check=True)
    module = done.module
    assert [why_unsupported(op) for f in module.functions for op in f.ops if why_unsupported(op)] == []
    assert is_lossy(done.module) and any("rounded to bf16" in note.reason for note in done.notes)
    moe = [f for f in module.functions if any(op.name == "acc.grouped_up" for op in f.ops)]
    assert moe
    for function in moe:
        dtypes = {c.value.name: c.value.type.dtype for c in function.consts if len(c.value.type.shape) == 3}
        assert set(dtypes.values()) == {"bf16"}, dtypes


# --- formats -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Use:
    name: str


@pytest.mark.parametrize("format", ["int4_g16", "uint4_g128", "int8_g32", "uint8_g64", "mxfp4", "nvfp4", "fp8_b128"])
def test_formats_that_kernels_read(format):
    for name in ("core.linear", "nn.gated_mlp", "moe.experts"):
        assert why_not_held(Use(name), format_of(format)) is None and why_slow(Use(name), format_of(format)) is None
    assert "in bf16" in why_not_held(Use("nn.embedding"), format_of(format))
    assert "no kernel of moe.grouped_linear" in why_not_held(Use("moe.grouped_linear"), format_of(format))


def test_formats_that_they_do_not_read():
    assert "integers of 4 and 8 bits" in why_not_held(Use("core.linear"), format_of("int2_g32"))
    assert "256" in why_slow(Use("core.linear"), format_of("int8_g256"))


@pytest.mark.parametrize(
    ("options", "format"),
    [
        ({}, "uint4_g128"),
        ({"head": "int4", "symmetric": True, "group": 32}, "int4_g32"),
        ({"head": "int8"}, "int8_g128"),
    ],
)
def test_quantize_picks_groups(options, format):
    module = parse_module(LINEAR.format('tensor("w", f32[256, 256])'))
    assert PASSES["quantize"](module, TARGET, **options).main.consts[0].value.type.dtype == format


def test_one_format_for_everything_leaves_out_the_embedding():
    text = LINEAR.format('tensor("w", f32[256, 256])').replace("%x: f32[T, 256]", "%t: i64[T]")
    text = text.replace(
        "  %y", '  const %e : f32[9, 256] = tensor("e", f32[9, 256])\n  %x = nn.embedding(%t, %e) : f32[T, 256]\n  %y'
    )
    module = parse_module(text)
    everything = dict.fromkeys(("experts", "attention", "shared", "dense", "embedding", "head"), "mxfp4")
    made, notes = PASSES["quantize"].run(module, TARGET, **everything)
    assert {c.value.name: c.value.type.dtype for c in made.main.consts} == {"w": "mxfp4", "e": "f32"}
    assert any("looked up by the framework" in note.reason for note in notes)
    with pytest.raises(MoecError, match="looked up by the framework"):
        PASSES["quantize"](module, TARGET, embedding="mxfp4")


# --- targets -------------------------------------------------------------------------------------------------------


def test_targets_by_name(tmp_path):
    assert "nvidia-h200" in TARGETS and "cpu" in TARGETS and "nvidia-h2" not in TARGETS
    assert len(TARGETS) == len(set(TARGETS)) > 10
    assert TARGETS["ascend-950dt"].name == "ascend-950dt"
    with pytest.raises(MoecError, match="there is no target 'nvidia-h2'") as caught:
        open_target("nvidia-h2", {})
    assert "nvidia-h200" in caught.value.todo
    with pytest.raises(MoecError, match="kernels cannot be ptx"):
        open_target("nvidia-h200", {"kernels": "ptx"})
    with pytest.raises(MoecError, match="no figure of this profile"):
        open_target("nvidia-h200", {"memory.dram.bandwith": "1TB/s"})
    assert open_target("nvidia-h200", {"memory.dram.bandwidth": "1TB/s", "kernels": "source"}).name == "nvidia-h200"
    with pytest.raises(MoecError, match="cannot be read"):
        open_target(str(tmp_path / "mine.toml"), {})


def test_names_of_targets_are_known_without_reading_profiles():
    code = "import sys, moec.targets as t; n = list(t.TARGETS); print(len(n) > 10, sorted({'tomllib', 'torch', 'jsonschema'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=1) == ["True", "[]\n"]
