"""Write a rewrite rule, apply it to a program, and have the numbers compared before and after.

python examples/own_rule.py
"""

from typing import Any

from moec.compiler.check.compare import compare_modules
from moec.compiler.errors import Refuse
from moec.compiler.rewrite.rules import Match, apply_rules, rule
from moec.compiler.text.parser import parse_module
from moec.compiler.text.printer import print_module

PROGRAM = """moec 1 stage moe
dim B in 1..8

func @main(%x: f32[B, 4]) -> (f32[B, 4], f32[B, 4]) {
  const %two : f32[] = literal(f32[], [2.0])
  const %three : f32[] = literal(f32[], [3.0])
  %square = core.pow(%x, %two) : f32[B, 4]
  %cube = core.pow(%x, %three) : f32[B, 4]
  return %square, %cube
}
"""


@rule(before="%y = core.pow(%x, %two)", after="%y = core.mul(%x, %x)")
def square_into_product(m: Match, target: Any) -> dict[str, Any]:
    """Compute a square as a product."""
    if m.number("two") != 2:
        raise Refuse("the exponent is not 2", m.two)
    return {}


def main() -> None:
    before = parse_module(PROGRAM)
    after, notes = apply_rules(before, None, [square_into_product])
    compare_modules(before, after, 1e-6)
    print(print_module(after))
    for note in notes:
        print(note)


if __name__ == "__main__":
    main()
