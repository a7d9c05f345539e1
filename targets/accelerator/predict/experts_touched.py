"""How many experts and tiles of rows a step touches: what decides how many bytes decoding reads.

With balanced routing a token chooses an expert with probability k / E, so that of T tokens at least one does with
1 - (1 - k / E)^T. Skewed routing gives expert i the weight (i + 1)^-s (Zipf), k choices for each token still.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import sympy


def distinct_experts(experts: int, chosen: int, tokens: Any, skew: float = 0.0) -> Any:
    """Return the expected number of experts that `tokens` tokens touch; tokens may be a sympy expression.

    `skew` s is the exponent of Zipf's law, 0 for balanced routing. The choices of a token count as independent of each
    other, each expert with k times its share, which is at most 1.
    """
    if skew == 0:
        miss = 1 - sympy.Rational(chosen, experts)
        return (
            experts * (1 - miss**tokens) if isinstance(tokens, sympy.Basic) else experts * (1 - float(miss) ** tokens)
        )
    if isinstance(tokens, sympy.Basic):
        return zipf_experts(experts, chosen, sympy.Float(skew), tokens)
    return zipf_number(experts, chosen, skew, tokens)


class zipf_experts(sympy.Function):
    """Return `distinct_experts` for skewed routing, short enough for formulas: a sum over all experts would make them long."""

    nargs = 4

    def _eval_evalf(self, prec: int) -> sympy.Float | None:
        if self.free_symbols:
            return None
        experts, chosen, skew, tokens = self.args
        return sympy.Float(zipf_number(int(experts), int(chosen), float(skew), float(tokens)), prec)


def zipf_number(experts: int, chosen: int, skew: float, tokens: float) -> float:
    """Return the expected number of experts that so many tokens touch with skewed routing."""
    return float((1 - (1 - np.array(_chances(experts, chosen, skew))) ** tokens).sum())


@lru_cache(maxsize=256)
def _chances(experts: int, chosen: int, skew: float) -> tuple[float, ...]:
    """Return for every expert the chance that a token chooses it; they add up to `chosen`, none is above 1."""
    weight = np.arange(1, experts + 1, dtype=np.float64) ** -skew
    chance = np.zeros(experts)
    for _ in range(experts):  # what is cut off above 1 goes to the others
        free = chance < 1
        missing = chosen - chance[~free].sum()
        chance[free] = weight[free] * missing / weight[free].sum()
        if (chance <= 1).all():
            break
        chance = np.minimum(chance, 1)
    return tuple(chance)


@lru_cache(maxsize=65536)
def expected_tiles(experts: int, chosen: int, tokens: int, rows: int) -> float:
    """Return the expected number of tiles of `rows` rows with balanced routing: sum over experts of ceil(n / rows).

    The pairs n of an expert are binomial: each of T tokens chooses it with probability k / E.
    """
    if chosen >= experts:
        return float(experts * -(-tokens // rows))
    chance = chosen / experts
    logs = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, tokens + 1)))))  # of the factorials
    n = np.arange(tokens + 1)
    log_odds = logs[-1] - logs - logs[::-1] + n * np.log(chance) + (tokens - n) * np.log1p(-chance)
    return float(experts * (np.exp(log_odds) * -(-n // rows)).sum())
