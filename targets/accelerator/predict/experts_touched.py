"""How many experts and tiles of rows a step touches: what decides how many bytes decoding reads.

With balanced routing a token chooses an expert with probability k / E, so that of T tokens at least one does with
1 - (1 - k / E)^T.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import sympy


def distinct_experts(experts: int, chosen: int, tokens: Any) -> Any:
    """Return the expected number of experts that `tokens` tokens touch; tokens may be a sympy expression."""
    miss = 1 - sympy.Rational(chosen, experts)
    return experts * (1 - miss**tokens) if isinstance(tokens, sympy.Basic) else experts * (1 - float(miss) ** tokens)


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
