"""What the library says of itself: the types of what `compile` returns, and a program in one line."""

import typing

from moec.compiler import driver
from moec.compiler.text.parser import parse_module

TEXT = """\
moec 1 stage graph
source "here"
dim B in 1..8

func @main(%x: f32[B, 16]) -> (f32[B, 16]) {
  %y = core.silu(%x) : f32[B, 16]
  return %y
}
"""


def test_compile_has_a_type_for_artifacts_and_one_for_programs():
    artifact, module = (overload.__annotations__ for overload in typing.get_overloads(driver.compile))
    assert (artifact["stop_after"], artifact["return"]) == ("None", "Artifact")
    assert (module["stop_after"], module["return"]) == ("str", "Module")


def test_a_program_says_in_one_line_what_it_is():
    assert repr(parse_module(TEXT, "a.moir")) == "<Module of here, stage graph: 1 functions, 1 ops>"
