"""The append to a cache, simulated on a chip of every family, equals the reference op; which appends it computes."""

import pytest
import torch
from chips_for_tests import CHIPS, close, run
from kernel_checks import numbers
from moec.compiler.ops import nn
from moec.compiler.text.parser import parse_module
from moec.targets.accelerator.kernels.append import Appended, append_kernel
from moec.targets.accelerator.kernels.choices import RowTile
from moec.targets.accelerator.select.states import IMPLEMENTATIONS


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize(
    ("past", "new", "tile"), [(0, 5, RowTile(4, 8)), (3, 1, RowTile(1, 32)), (7, 9, RowTile(4, 16))]
)
def test_appends_behind_the_past_and_touches_nothing_else(name, past, new, tile):
    layout, chip = CHIPS[name]
    batch, heads, width = 2, 3, 20
    before, tokens = numbers(batch, heads, past, width), numbers(batch, heads, new, width)
    room = torch.full((batch, heads, new + 2, width), 9.0)
    scalars = {"B": batch, "S": new, "P": past, "C": past + new + 2}
    program = append_kernel(Appended("3*B", width, "f32"), tile, layout)
    found = run(program, chip, scalars, new=tokens, present=torch.cat((before, room), 2))
    wanted = torch.cat((nn.cache_append(before, tokens, axis=2), room[:, :, :2]), 2)
    close(found["present"].reshape(wanted.shape), wanted)


APPEND = """moec 1 stage kernel
dim B in 1..4
dim S in 1..9
dim P in 0..9
func @main(%past: state {past}, %new: {new}) -> (state {present}) {{
  %present = nn.cache_append(%past, %new) {{axis={axis}}} : state {present}
  return %present
}}
"""


@pytest.mark.parametrize(
    ("dtype", "shape", "axis", "problem"),
    [
        ("f32", "B, 4, {}, 8", 2, Appended("4*B", 8)),
        ("f32", "B, {}, 8", 1, Appended("B", 8)),
        ("f32", "B, {}, 2, 8", 1, Appended("B", 16)),
        ("f32", "B, {}", 1, Appended("B", 1)),
        ("i64", "B, {}, 8", 1, None),
        ("f32", "B, {}, B", 1, None),
    ],
)
def test_which_appends_have_a_kernel(dtype, shape, axis, problem):
    past, new, present = (f"{dtype}[{shape.format(n)}]" for n in ("P", "S", "P + S"))
    (op,) = parse_module(APPEND.format(past=past, new=new, present=present, axis=axis)).main.ops
    found = IMPLEMENTATIONS["nn.cache_append"](op, {})
    assert (found and found.problem) == problem
