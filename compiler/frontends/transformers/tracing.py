"""What is known while one model of transformers is traced; transformers calls registered functions without a way to pass it on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...ir.activation import Activation


@dataclass
class Tracing:
    """What the registered functions need to know while one model is traced."""

    windows: dict[int, tuple[int, int]] = field(default_factory=dict)  # id of a mask -> its sliding window, its chunk
    masks: list[Tensor] = field(default_factory=list)  # keeps the ids above alive
    window: tuple[int, int] = (0, 0)  # the window and the chunk of the layer that is being traced
    names: dict[int, str] = field(default_factory=dict)  # activation functions by id
    layers: list[Any] = field(default_factory=list)  # what the stubs stand for, call by call
    called: int = 0  # how many of these calls the pass of the model that is being traced has made
    recurrent: Tensor | None = None  # the recurrent state that was asked for last
    activations: dict[int, Activation | None] = field(default_factory=dict)  # by id of an experts module


_CURRENT: list[Tracing] = []  # transformers calls the registered functions without a way to pass this along


def current_trace() -> Tracing:
    """Return the trace that is under way."""
    return _CURRENT[-1]
