"""Finds which activation the code of a model has, by comparing numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from ...errors import MoecError
from ...ir.activation import KINDS, Activation
from ...ops.activation import FUNCTIONS, apply_activation
from .tracing import current_trace


def activation_of(module: Any, gated: bool, layout: str) -> Activation | None:
    """Return the activation between the matrices of a module of experts; None if it is none that there is.

    A class may override the gate's formula, so its code is not trusted to be the usual one: every candidate is
    compared with what the module computes on random numbers, in the rehearsal: a trace cannot look at numbers.
    """
    known = current_trace().activations
    if id(module) not in known:
        known[id(module)] = _find_activation(module, gated, layout)
    return known[id(module)]


def _find_activation(module: Any, gated: bool, layout: str) -> Activation | None:
    with torch.no_grad(), torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        h = 12 * torch.randn(64, 32, generator=generator)
        h[:, :] = h * torch.linspace(0.05, 1.0, 64)[:, None]
        actual = module._apply_gate(h) if gated else module.act_fn(h)
        for act in (
            _candidate_activations(module, layout) if gated else (Activation(kind, gated=False) for kind in KINDS)
        ):
            expected = apply_activation(h, act)
            if expected.shape == actual.shape and torch.allclose(expected, actual, rtol=1e-5, atol=1e-6):
                return act
    return None


def _candidate_activations(module: Any, layout: str) -> Iterator[Activation]:
    """Yield gated activations, the simplest first."""
    limit = float(getattr(module, "limit", None) or getattr(module, "swiglu_limit", None) or math.inf)
    alpha = float(getattr(module, "alpha", getattr(module, "swiglu_alpha", 1.0)))
    yield from (Activation(kind, layout=layout) for kind in KINDS)
    yield Activation("silu", layout=layout, alpha=alpha, beta=1.0, limit=limit)
    yield from (Activation(kind, layout=layout, limit=limit) for kind in KINDS)
    yield Activation("silu", layout=layout, alpha=alpha, limit=limit)
    if not math.isinf(limit):
        yield from (Activation(kind, layout=layout, limit=limit, clamp_after=True) for kind in KINDS)


def kind_of(function: Any) -> str:
    """Return the kind that an activation without a gate is, found once; MoecError if it is none."""
    known = current_trace().names
    if id(function) not in known:
        known[id(function)] = _find_kind(function)
    return known[id(function)]


def _find_kind(function: Any) -> str:
    with torch.no_grad(), torch.device("cpu"):
        x = torch.linspace(-6, 6, 97)
        for kind, candidate in FUNCTIONS.items():
            if torch.allclose(candidate(x), function(x), rtol=1e-5, atol=1e-6):
                return kind
    raise MoecError(f"the activation {function} is none that moe.experts knows", todo=", ".join(KINDS))
