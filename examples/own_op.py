"""Declare an op: its signature, its meaning in torch and its FLOPs. The parser, the verifier and the costs know it then.

python examples/own_op.py
"""

import torch
from moec.compiler.check.interpret import interpret
from moec.compiler.cost.count import module_costs
from moec.compiler.ir.recipes import Recipe
from moec.compiler.ops.define import op
from moec.compiler.text.parser import parse_module

PROGRAM = """moec 1 stage moe
dim B in 1..8

func @main(%x: f32[B, 4]) -> (f32[B, 4]) {
  %y = own.soft_cap(%x) {cap=2.0} : f32[B, 4]
  return %y
}
"""


@op("own.soft_cap", "x: A[*X] -> y: A[*X]", flops=lambda operands, results, attributes: 3 * results[0].elements)
def soft_cap(x: torch.Tensor, *, cap: float) -> torch.Tensor:
    """Keep numbers between -cap and cap, smoothly: cap * tanh(x / cap)."""
    return cap * torch.tanh(x / cap)


def no_weight(recipe: Recipe) -> torch.Tensor:
    """Refuse to make a weight: this program reads none."""
    raise LookupError(recipe)


def main() -> None:
    module = parse_module(PROGRAM)
    (y,) = interpret(module, [torch.tensor([[-9.0, -1.0, 1.0, 9.0]])], no_weight)
    print([round(value, 3) for value in y[0].tolist()])
    print("FLOPs:", module_costs(module).total.flops)


if __name__ == "__main__":
    main()
