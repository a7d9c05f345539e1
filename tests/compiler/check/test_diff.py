"""What `moec diff` finds: planted differences and nothing else."""

import json
import shutil

import numpy as np
import pytest
from moec.compiler.artifact.stored_weights import differing_weights
from moec.compiler.check.diff import diff_modules
from moec.compiler.text.parser import parse_module
from moec.targets import declare_kernel_ops
from moec_command import invoke

declare_kernel_ops()
TEXT = """\
moec 1 stage graph
source "here"
dim B in 1..8

func @layer(%x: f32[B, 16]) -> (f32[B, 16]) weights "layers.{layer}." {
  const %up : f32[32, 16] = cast(tensor("up.weight", bf16[32, 16]), to=f32)
  const %down : f32[16, 32] = cast(tensor("down.weight", bf16[16, 32]), to=f32)
  const %norm : f32[16] = cast(tensor("norm.weight", bf16[16]), to=f32)
  %n = nn.rms_norm(%x, %norm) {eps=1e-06} : f32[B, 16] loc("norm")
  %u = core.linear(%n, %up, _) : f32[B, 32] loc("up")
  %s = core.silu(%u) : f32[B, 32] loc("act")
  %d = core.linear(%s, %down, _) : f32[B, 16] loc("down")
  %y = core.add(%x, %d) : f32[B, 16]
  return %y
}

func @main(%x: f32[B, 16]) -> (f32[B, 16]) {
  %h.0 = call @layer(%x) {layer=0} : f32[B, 16]
  %h.1 = call @layer(%h.0) {layer=1} : f32[B, 16]
  return %h.1
}
"""
MODULE = parse_module(TEXT, "a.moir")


def changed(*pairs):
    text = TEXT
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    return diff_modules(MODULE, parse_module(text, "b.moir"))


@pytest.mark.parametrize(
    "pairs, wanted",
    [
        ((), []),
        ([("%n,", "%other,"), ("%n =", "%other =")], []),  # names are not compared
        ([("%up ", "%w "), ("%up,", "%w,")], []),
        ([("eps=1e-06", "eps=1e-05")], ["@layer", "  ~ %n = nn.rms_norm of norm: eps=1e-06 -> 1e-05"]),
        (
            [('"up.weight"', '"gate.weight"')],
            ["@layer", '  ~ const %up: "up.weight" -> "gate.weight"'],
        ),
        ([("core.silu", "core.gelu")], ["@layer", '  - %s = core.silu(%u) : f32[B, 32] loc("act")',
                                        '  + %s = core.gelu(%u) : f32[B, 32] loc("act")']),
        ([("core.add(%x, %d)", "core.add(%d, %x)")], ["@layer", "  ~ %y = core.add: reads %x -> %d, %d -> %x"]),
        ([("dim B in 1..8", "dim B in 1..9")], ["dim B: 1..8 -> 1..9"]),
        ([('source "here"', 'source "there"')], ["source: here -> there"]),
        ([("call @layer(%h.0) {layer=1}", "call @layer(%h.0) {layer=2}")], ["@main", "  ~ %h.1 = layer: layer=1 -> 2"]),
    ],
)  # fmt: skip
def test_planted_differences(pairs, wanted):
    assert changed(*pairs) == wanted


def test_an_op_put_between_two_is_one_line():
    between = ("  %d = core.linear", "  %t = core.neg(%s) : f32[B, 32]\n  %d = core.linear")
    assert changed(between) == ["@layer", "  + %t = core.neg(%s) : f32[B, 32]"]
    read = changed(between, ("core.linear(%s, %down", "core.linear(%t, %down"))
    assert read[:2] == ["@layer", "  + %t = core.neg(%s) : f32[B, 32]"]
    assert read[2:] == ["  ~ %d = core.linear of down: reads %s -> %t"]


def test_a_function_that_only_one_has():
    text = TEXT.replace(
        "func @main",
        TEXT[TEXT.index("func @layer") : TEXT.index("func @main")].replace("@layer", "@other") + "func @main",
    )
    assert diff_modules(MODULE, parse_module(text, "b")) == ["+ @other: 5 ops, 3 weights"]


def test_one_weight_of_other_numbers(tiny_lm, tmp_path):
    import onnx

    other = shutil.copytree(tiny_lm[1], tmp_path / "other")
    assert differing_weights(tiny_lm[1], other) == []
    model = onnx.load(str(other / "model.onnx"), load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == "transformer.h.1.mlp.c_fc.weight")
    place = {entry.key: entry.value for entry in tensor.external_data}
    data = np.memmap(other / place["location"], np.uint8, "r+")
    data[int(place["offset"]) + 5] ^= 1
    data.flush()
    assert differing_weights(tiny_lm[1], other) == ["transformer.h.1.mlp.c_fc.weight"]


def test_the_command(tmp_path):
    for name, text in (("a.moir", TEXT), ("b.moir", TEXT.replace("eps=1e-06", "eps=1e-05"))):
        (tmp_path / name).write_text(text)
    same = invoke("diff", tmp_path / "a.moir", tmp_path / "a.moir")
    assert (same.exit_code, same.stdout) == (0, "no difference\n")
    found = invoke("diff", tmp_path / "a.moir", tmp_path / "b.moir", "--json")
    assert found.exit_code == 1
    assert json.loads(found.stdout)["differences"] == ["@layer", "  ~ %n = nn.rms_norm of norm: eps=1e-06 -> 1e-05"]
