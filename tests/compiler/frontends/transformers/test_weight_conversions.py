"""What transformers' conversion rules do to tensors becomes recipes that give the same numbers."""

import pytest
import torch
from moec.compiler.errors import MoecError
from moec.compiler.frontends.transformers.recipe_tensor import RecipeTensor
from moec.compiler.ir.recipes import Tensor
from moec.compiler.ir.types import TensorType
from moec.compiler.weights.evaluate import evaluate_recipe
from moec.compiler.weights.sources.source import ModuleSource

STEPS = {
    "first_rows": lambda x: x[:5],
    "last_columns": lambda x: x[:, -2:],
    "one_place": lambda x: x[:, 3],
    "last_place": lambda x: x[..., -1],
    "middle": lambda x: x[2:4, ..., 1:3],
    "flatten": lambda x: x.flatten(0, 1),
    "unflatten": lambda x: x.unflatten(0, (-1, 2)),
    "queries": lambda x: torch.cat([y := x.unflatten(0, (-1, 2))[:, :1], y], dim=1),
    "cut_and_cast": lambda x: x[:3].to(torch.float32).contiguous(),
    "to_a_device": lambda x: x.to("meta") if x.is_meta else x,
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_gives_the_same_numbers(name):
    x = torch.arange(6 * 4 * 3, dtype=torch.bfloat16).reshape(6, 4, 3)
    made = STEPS[name](RecipeTensor.of(Tensor("x", TensorType.of("bf16", 6, 4, 3)))).recipe
    expected = STEPS[name](x)
    found = evaluate_recipe(made, ModuleSource({"x": x}), tuple((0, n) for n in made.type.sizes))
    assert made.type.dtype == {torch.bfloat16: "bf16", torch.float32: "f32"}[expected.dtype]
    assert torch.equal(torch.as_tensor(found).float(), expected.float())


def test_a_step_that_is_not_understood_is_named():
    x = RecipeTensor.of(Tensor("x", TensorType.of("f32", 6, 4)))
    with pytest.raises(MoecError, match="exp is not understood"):
        x.exp()
    with pytest.raises(MoecError, match=r"\[slice\(None, None, 2\)\] is not understood"):
        x[::2]
