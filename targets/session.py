"""What the sessions of all targets share: the checks of a step, and what a session that times its ops records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..compiler.errors import MoecError

INPUTS = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True)
class OpTime:
    """One run of an op or a kernel, in a session that was opened with `profiling`: see `events` of the sessions.

    `start` is as time.monotonic_ns() counts, `modules` are those of the source model that the op comes from, `predicted` is the
    seconds that were expected when the artifact was compiled.
    """

    name: str
    modules: tuple[str, ...]
    start: int
    seconds: float
    predicted: float | None = None


class Kept(Protocol):
    """What a step returns to be given to the next one, as every target has it."""

    @property
    def batch(self) -> int:
        """The rows."""
        ...

    @property
    def length(self) -> int:
        """The past tokens."""
        ...

    def __len__(self) -> int: ...


def check_step(
    arrays: Mapping[str, np.ndarray], states: Kept | None, wanted: Sized, context: int, vocabulary: int, padded: bool
) -> int:
    """Return the number of past tokens of a step; MoecError if its inputs do not belong together.

    `states` is None for what no step of the target returned, `wanted` are the states of the program; `padded` programs take positions, so that
    rows may begin with padding.
    """
    ids, mask, positions = (arrays[name] for name in INPUTS)
    if ids.ndim != 2 or ids.size == 0:
        raise MoecError(f"input_ids has the shape {list(ids.shape)}", todo="give [batch, new tokens], not empty")
    batch, new = ids.shape
    if states is None or len(states) != len(wanted):
        raise MoecError("these are not the states of a step of this model", todo="pass on what a step returned")
    if states.batch != batch:
        raise MoecError(f"the states are those of {states.batch} rows, {batch} are given")
    past = states.length
    shapes = {"attention_mask": (batch, past + new), "position_ids": (batch, new)}
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise MoecError(f"{name} has the shape {list(arrays[name].shape)}, {list(shape)} is wanted")
    if past + new > context:
        raise MoecError(
            f"{past} past and {new} new tokens are more than the model's context of {context}",
            todo="shorten the prompt or generate fewer tokens",
        )
    if not padded and not (mask.all() and (positions == past + np.arange(new)).all()):
        raise MoecError(
            "this model takes no padding: the positions of all rows count from 0",
            todo="run prompts of one length together, or one after the other",
        )
    check_tokens((int(ids.min()), int(ids.max())), vocabulary)
    return past


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
