"""Makes a program run as one block on each core, in which a loop takes points of the grid one after another.

An Ascend runs as many blocks at once as it has cores; those of a larger grid are started in rounds, each of which costs what
a start costs.
"""

from __future__ import annotations

from dataclasses import replace

from ..chip.chip import Profile
from ..tile.machine import core_count
from ..tile.parse import parse_expr
from ..tile.tiles import Dot, For, Let, Load, Move, Program, Statement, walk_statements
from ..tile.types import INT


def blocks_of(profile: Profile, program: Program) -> int:
    """Return how many blocks of a program a chip runs at once: its vector cores for one without products of matrices."""
    products = any(isinstance(statement, Dot) for statement in walk_statements(program.body))
    return int(profile.vector_cores.value) if profile.vector_cores and not products else core_count(profile)


def one_block_a_core(program: Program, blocks: int) -> Program:
    """Return a program of at most so many points, each of which computes several points of the given one."""
    taken = {*program.scalars, *program.buffers, *(name for name, _ in program.grid)}
    taken |= {s.name for s in walk_statements(program.body) if isinstance(s, (Let, Load, Move))}
    taken |= {s.var for s in walk_statements(program.body) if isinstance(s, For)}
    core, point = _free_name("core", taken), _free_name("point", taken)
    types = dict.fromkeys((*program.scalars, core, point), INT)
    extents = [f"({extent})" for _, extent in program.grid]
    points = " * ".join(extents)
    # a divisor is at least 1, which can be seen of it: where an extent is 0 the loop computes no point
    divisors = [f"maximum({extent}, 1)" for extent in extents]
    before: list[Statement] = []
    for number, (name, _) in enumerate(program.grid):
        faster = " * ".join(divisors[:number])
        own = f"({point} // ({faster}))" if faster else point
        last = number == len(extents) - 1
        before.append(Let(name, parse_expr(own if last else f"{own} % {divisors[number]}", types)))
    loop = For(
        point,
        parse_expr(core, types),
        parse_expr(points, types),
        parse_expr(str(blocks), types),
        (*before, *program.body),
    )
    grid = ((core, parse_expr(f"minimum({points}, {blocks})", types)),)
    return replace(program, grid=grid, body=(loop,))


def _free_name(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name
