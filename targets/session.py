"""Checks that the sessions of all targets share."""

from __future__ import annotations

from collections.abc import Iterable

from ..compiler.errors import MoecError


def check_tokens(tokens: Iterable[int], vocabulary: int) -> None:
    """Raise MoecError for the first token id that a model has no embedding for; some runtimes would read another one's."""
    for token in tokens:
        if token < 0:  # a runtime may count it from the end of the vocabulary
            raise MoecError(f"the token {token} is negative", todo=f"this model has the tokens 0..{vocabulary - 1}")
        if token >= vocabulary:
            what = f"the token {token} is outside of the vocabulary of {vocabulary} tokens"
            raise MoecError(
                what, todo=f"this model has the tokens 0..{vocabulary - 1}; does the tokenizer belong to it?"
            )
