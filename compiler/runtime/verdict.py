"""What quantization cost, in one line: how far predictions on a text moved, beside what is usual for as many bits a weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from .text_score import TextScore

# bits a weight and mean KL divergence in nats of llama.cpp's files of Llama 3 8B against f16 on Wikitext-2, without an
# importance matrix: q2_K to q8_0 of its tools/perplexity/README.md, the file's bits over 8.03e9 parameters
USUAL = ((3.17, 0.445132), (4.00, 0.101913), (4.90, 0.031273), (5.70, 0.010762), (6.57, 0.005452), (8.51, 0.001355))
LESS, MORE, FAR_MORE = 0.67, 1.5, 4.0  # of what is usual


def stored_bits(manifest: Mapping[str, Any]) -> float | None:
    """Return the bits a weight of an artifact: those of all its weights over their number; None where it does not say."""
    counted = manifest["figures"].get("counted", {})
    stored, number = counted.get("bytes", {}).get("compiled"), counted.get("parameters", {}).get("total")
    return stored * 8 / number if stored and number else None


def usual_divergence(bits: float) -> float | None:
    """Return the divergence that is usual for so many bits a weight; None outside of what was measured.

    >>> round(usual_divergence(4.9), 4)
    0.0313
    """
    for (low, first), (high, second) in pairwise(USUAL):
        if low <= bits <= high:
            share = (bits - low) / (high - low)
            return math.exp(math.log(first) * (1 - share) + math.log(second) * share)
    return None


def verdict_line(against: str, bits: float | None, score: TextScore) -> str:
    """Return the verdict on a quantized artifact."""
    usual = None if bits is None else usual_divergence(bits)
    stored = "quantized" if bits is None else f"quantized to {bits:.2f} bits a weight"
    change = score.perplexity / score.reference_perplexity - 1 if score.reference_perplexity else math.nan
    figures = (
        f"KL {score.kl_mean:.3g}{'' if usual is None else f' (usual {usual:.2g})'}, "
        f"top-1 agreement {score.top1:.1%}, perplexity {change:+.2%}"
    )
    return f"{stored}, {_judge(score.kl_mean, usual)} {against}: {figures}"


def _judge(found: float, usual: float | None) -> str:
    if not math.isfinite(found):
        return "its predictions are no numbers, compared with"
    if usual is None:
        return "compared with"
    ratio = found / usual
    if ratio < LESS:
        return "it differs less than is usual from"
    if ratio <= MORE:
        return "it differs as much as is usual from"
    return "it differs more than is usual from" if ratio <= FAR_MORE else "it differs far more than is usual from"
