"""What all layers compute alike is computed once, by the caller."""

import pytest
import torch
from moec.compiler.check.interpret import interpret
from moec.compiler.text.parser import parse_module
from moec.targets import declare_kernel_ops
from moec.targets.accelerator.lower.hoist import hoist_ops

declare_kernel_ops()
TEXT = """moec 1 stage kernel
dim B in 1..4
dim S in 1..9
dim P in 0..9
func @layer(%x: f32[B, S, 8], %cos: f32[B, S, 8], %mask: bool[B, S], %past: state f32[B, P, 8])
    -> (f32[B, S, 8], state f32[B, P + S, 8]) weights "l.{layer}." {
  const %w : f32[8] = literal(f32[8], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
  %half = core.slice(%cos) {axis=2, start=0, stop=4} : f32[B, S, 4]
  %cos2 = core.concat(%half, %half) {axis=2} : f32[B, S, 8]
  %turned = core.mul(%x, %cos2) : f32[B, S, 8]
  %scaled = core.mul(%cos, %w) : f32[B, S, 8]
  %y = core.add(%turned, %scaled) : f32[B, S, 8]
  %there = core.reshape(%mask) {shape=[B, S, 1]} : bool[B, S, 1]
  %z = core.where(%there, %y, %x) : f32[B, S, 8]
  %present = nn.cache_append(%past, %z) {axis=1} : state f32[B, P + S, 8]
  return %z, %present
}
func @other(%x: f32[B, S, 8], %angles: f32[B, S, 8]) -> (f32[B, S, 8]) {
  %half = core.slice(%angles) {axis=2, start=0, stop=4} : f32[B, S, 4]
  %two = core.concat(%half, %half) {axis=2} : f32[B, S, 8]
  %y = core.mul(%x, %two) : f32[B, S, 8]
  return %y
}
func @main(%x: f32[B, S, 8], %angle: f32[B, S, 8], %mask: bool[B, S], %p0: state f32[B, P, 8], %p1: state f32[B, P, 8])
    -> (f32[B, S, 8], state f32[B, P + S, 8], state f32[B, P + S, 8]) {
  %cos = core.cos(%angle) : f32[B, S, 8]
  %a, %n0 = call @layer(%x, %cos, %mask, %p0) {layer=0} : f32[B, S, 8], state f32[B, P + S, 8]
  %b = call @other(%a, %cos) : f32[B, S, 8]
  %c, %n1 = call @layer(%b, %cos, %mask, %p1) {layer=1} : f32[B, S, 8], state f32[B, P + S, 8]
  return %c, %n0, %n1
}
"""


def names(function):
    return [op.callee or op.name for op in function.ops]


def test_ops_of_shared_values_move_and_their_numbers_stay():
    module = parse_module(TEXT)
    found = hoist_ops(module)
    assert names(found.main) == ["core.cos", "core.slice", "core.concat", "layer", "other", "layer"]
    # weights stay with their function, and so does a view that only such ops read
    assert names(found.by_name["layer"]) == [
        "core.mul",
        "core.mul",
        "core.add",
        "core.reshape",
        "core.where",
        "nn.cache_append",
    ]
    assert names(found.by_name["other"]) == ["core.mul"]
    assert [p.name for p in found.by_name["layer"].params] == ["x", "cos", "mask", "past", "cos2"]
    assert [p.name for p in found.by_name["other"].params] == ["x", "two"]
    torch.manual_seed(0)
    inputs = [
        torch.randn(2, 3, 8),
        torch.randn(2, 3, 8),
        torch.rand(2, 3) < 0.5,
        torch.randn(2, 4, 8),
        torch.randn(2, 4, 8),
    ]
    before, after = (interpret(m, inputs, lambda recipe: torch.arange(1.0, 9.0)) for m in (module, found))
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert hoist_ops(found) is found


@pytest.mark.parametrize(
    "text",
    [
        TEXT.replace("%b, %cos, %mask", "%b, %angle, %mask"),
        TEXT.replace("%c, %n1 = call", "%cos3 = core.neg(%cos) : f32[B, S, 8]\n  %c, %n1 = call").replace(
            "%b, %cos, %mask", "%b, %cos3, %mask"
        ),
    ],
)
def test_what_differs_between_calls_stays(text):
    found = hoist_ops(parse_module(text))
    assert "core.concat" in names(found.by_name["layer"])
