"""Boxes of tensors as hypothesis draws them, and tensors compared byte by byte."""

from typing import Any

import torch
from hypothesis import strategies as st


def boxes_of(sizes: Any, allow_empty: bool = False) -> st.SearchStrategy[tuple[tuple[int, int], ...]]:
    """Draw a box of a tensor: the first and last index, the latter excluded, of each axis."""

    def span(size: int) -> st.SearchStrategy[tuple[int, int]]:
        return st.integers(0, size if allow_empty else size - 1).flatmap(
            lambda low: st.tuples(st.just(low), st.integers(low if allow_empty else low + 1, size))
        )

    return st.tuples(*(span(n) for n in sizes))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compare dtype, shape and every byte (so that NaN equals NaN and 0.0 differs from -0.0)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    left, right = (t.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8) for t in (a, b))
    return torch.equal(left, right)
