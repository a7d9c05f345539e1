"""Chooses the kernels of a module's ops: what an op computes, how its weights lie, and which implementation is fastest.

kernels.json (artifact/spec.py) and predicted steps (step.py) both stand on it, so that they name the same kernels and times.
"""

from __future__ import annotations

from collections.abc import Mapping

from ....compiler.errors import MoecError
from ....compiler.formats.table import find_format
from ....compiler.ir.module import Function, Module, Op, Value
from ..chip.chip import Profile
from ..kernels.choices import Tile
from ..predict.assumed import has_matmul
from ..tile.packing import Packing
from .activations import bits_of
from .implementations import Computation, Tokens
from .search import Fit, Found, KernelTemplate, search_tile
from .supported import IMPLEMENTATIONS, why_unsupported

WEIGHTS = ("w", "up", "down", "w_uk", "w_uv")  # operands of kernels that are packed

Fits = dict[tuple[str, str], dict[Tile, Fit]]  # of a kernel, by its implementation's name and its own


def computation_of(
    op: Op, function: Function, stored: Mapping[tuple[str, str], Packing], profile: Profile
) -> Computation | None:
    """Return what kernels compute of an op, None for one that the framework computes.

    `stored` is what `weight_layouts` found. MoecError for an op that neither has.
    """
    if reason := why_unsupported(op):
        raise MoecError(reason, where=f"@{function.name}", model=", ".join(op.loc))
    if op.name not in IMPLEMENTATIONS:
        return None
    places = {name: (function.name, v.name) for name, v in op.named}
    weights = {name: stored[place] for name, place in places.items() if place in stored}
    computation = IMPLEMENTATIONS[op.name](op, weights)
    if computation is not None and not has_matmul(profile, computation.matmuls):
        return None
    return computation


def fastest_kernels(
    computation: Computation, tokens: Tokens, profile: Profile, fits: Fits
) -> list[tuple[KernelTemplate, Found]]:
    """Return the kernels of the implementation that is predicted to be fastest, each with its tile.

    `fits` holds what searches for other numbers of tokens found out; what this one does is added.
    """
    offered = computation.implementations(tokens, profile)
    found = [[(k, search_tile(k, profile, fits.setdefault((i.name, k.name), {}))) for k in i.kernels] for i in offered]
    return min(found, key=lambda kernels: sum(f.best.prediction.time for _, f in kernels))


def _in_pairs(op: Op, weight: Value) -> bool:
    """Return whether an op multiplies the codes of a weight of 4 bits as they are: with activations in a format."""
    form = find_format(weight.type.dtype)
    return form is not None and form.bits == 4 and _is_coded(op, weight)


def _is_coded(op: Op, weight: Value) -> bool:
    """Return whether an op multiplies codes: with activations in a format."""
    return any(find_format(v.type.dtype) for v in op.inputs if v != weight)


def weight_layouts(module: Module, profile: Profile) -> dict[tuple[str, str], Packing]:
    """Return how the weights of the kernels are stored, by function and name; others lie as they are typed.

    A weight that is read otherwise too, as a tied table is whose rows are looked up, lies row by row, not in fractals.
    """
    fractal = any(layout.order == "FRACTAL_NZ" for layout in profile.layouts)
    found = {}
    for function in module.functions:
        consts = {c.value.name for c in function.consts}
        looked_up = {v.name for op in function.ops if op.name not in IMPLEMENTATIONS for v in op.inputs}
        for op in function.ops:
            for operand, value in op.named if op.name in IMPLEMENTATIONS else ():
                if operand in WEIGHTS and value.name in consts and len(value.type.shape) in (2, 3):
                    *lead, rows, columns = map(int, value.type.shape)
                    plain = value.type.dtype in ("bf16", "f16")
                    found[function.name, value.name] = Packing(
                        value.type.dtype,
                        rows,
                        columns,
                        lead[0] if lead else 0,
                        fractal and plain and value.name not in looked_up,
                        _in_pairs(op, value),
                        bits_of(profile, value.type.dtype) if _is_coded(op, value) else "",
                    )
    return found
