"""Selects the kernels of latent attention: absorbed, where queries and results pass the latent space, and expanded.

The expanded form makes keys and values of all cached tokens, which costs more the more there are for each new one; the
absorbed form attends with wider heads. Both read the same cache. A step takes the one or the other by how many new
tokens of a sequence it has. Chosen slots are gathered in the absorbed form, once there are more than are chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import ceil

from ....compiler.ir.module import Op
from ..chip.chip import Profile
from ..kernels.attention import Attention, attention_kernel, attention_merge
from ..kernels.dense import Linear, linear_kernel
from ..kernels.latent import Expand, LatentAppend, expand_kernel, latent_append, widen_kernel
from ..kernels.norm import power_of_two
from ..tile.packing import Packing
from .activations import bits_of
from .attention import attention_implementations, mask_of
from .implementations import (
    Computation,
    Implementation,
    Selector,
    Tokens,
    only_implementation,
    operand_types,
    row_shapes,
    row_tile,
)
from .search import COLUMNS, DEPTHS, KernelTemplate, row_choices, tile_shapes


@dataclass(frozen=True)
class Latent:
    """Latent attention: the attention of its absorbed form, and its two weights.

    `nope` are the numbers of a head of q that meet the latent, of `row` in memory, `value` those of a head of the result.
    """

    absorbed: Attention
    nope: int
    row: int
    value: int
    w_uk: Packing
    w_uv: Packing

    @property
    def whole(self) -> Attention:
        """The attention of the absorbed form where all slots are chosen."""
        return replace(self.absorbed, selected=False, best_first=False)

    @property
    def expanded(self) -> Attention:
        """The attention of the expanded form: each head has keys and values of its own."""
        a = self.absorbed
        return replace(
            self.whole,
            groups=a.heads,
            width=self.nope,
            value_width=self.value,
            row=self.row,
            shared=False,
            dense=True,
            eight_bits=False,
        )

    @property
    def expanded_from(self) -> int | None:
        """The new tokens of a sequence from which the expanded form computes less, with many before; None: never.

        With latents of R numbers and heads of N and V: R (N + V) products for each cached token, instead of
        2 R - N - V more for each pair of a new token and a cached one.
        """
        latent, heads = self.absorbed.width, self.nope + self.value
        return ceil(latent * heads / (2 * latent - heads)) if 2 * latent > heads else None


def _latent_attention(op: Op, weights: Mapping[str, Packing]) -> Computation | None:
    """Return latent attention; with f32 weights, which no matrix unit multiplies, it is the framework's."""
    operands, a = operand_types(op), op.settings
    heads, (_, _, _, width), row = a.integer("heads"), operands["latent"].shape, operands["q"].shape[2]
    w_uk, w_uv = weights["w_uk"], weights["w_uv"]
    if "f32" in (w_uk.format, w_uv.format):
        return None
    absorbed = Attention(
        heads, 1, int(width), int(width), a.number("scale"), a.integer("window"), a.integer("chunk"),
        a.number("softcap"), "sinks" in operands, mask_of(operands), shared=True,
        rope=int(operands["rope"].shape[3]) if "rope" in operands else 0,
        selected="selected" in operands, best_first=a.flag("best_first"), eight_bits=bool(a.text("cache", "")),
    )  # fmt: skip
    chosen = int(operands["selected"].shape[2]) if absorbed.selected else 0
    p = Latent(absorbed, w_uk.columns, int(row) // heads, w_uv.rows // heads, w_uk, w_uv)

    def implementations(tokens: Tokens, profile: Profile) -> tuple[Implementation, ...]:
        if absorbed.selected and not (absorbed.best_first and tokens.past + tokens.new <= chosen):
            return _absorbed_implementations(p, absorbed, tokens, chosen)
        expands = p.expanded_from is not None and tokens.new >= p.expanded_from
        return _expanded_implementations(p, tokens) if expands else _absorbed_implementations(p, p.whole, tokens)

    # with as many slots as are chosen, or fewer, a token reads what its mask leaves
    slots_at = chosen + 1 if absorbed.best_first else None
    changes_at = p.expanded_from if absorbed.best_first or not absorbed.selected else None
    return Computation("latent_attention", p, weights, implementations, changes_at, slots_at)


def _absorbed_implementations(p: Latent, a: Attention, tokens: Tokens, chosen: int = 0) -> tuple[Implementation, ...]:
    """Return the form that takes queries and results through the latent space, to attend as `a`; `chosen` slots of a token."""
    into = Linear(a.width, p.nope, p.w_uk, a.heads, wide=p.row)
    absorb = _linear_template("absorb", into, tokens, {"x": "q", "w": "w_uk", "y": "q_latent"})
    back = Linear(p.value, a.width, p.w_uv, a.heads)
    project = _linear_template("project", back, tokens, {"x": "y_latent", "w": "w_uv"})
    form, scalars, rows, touched = "absorbed", _step_scalars(tokens), tokens.new * a.heads, None
    if chosen:
        share = min(tokens.new * chosen / (tokens.past + tokens.new), 1.0)
        form, scalars, rows, touched = (
            "chosen slots",
            {**scalars, "J": chosen},
            a.heads,
            {"key": share, "key_rope": share},
        )
    attended = attention_implementations(
        "attention", lambda t, layout: attention_kernel(a, t, layout),
        lambda t, layout, split: attention_merge(a, t, layout, split), scalars, rows, a.width, a.width, tokens,
        {"q": "q_latent", "key": "latent", "key_rope": "rope", "y": "y_latent"}, touched,
    )  # fmt: skip
    return tuple(Implementation(f"{form}, {i.name}", (absorb, *i.kernels, project)) for i in attended)


def _expanded_implementations(p: Latent, tokens: Tokens) -> tuple[Implementation, ...]:
    """Return the form that makes keys and values of every cached token that is attended to."""
    a = p.expanded
    keys = Expand(a.heads, p.nope, p.absorbed.width, p.w_uk, turned=True, window=a.window)
    values = Expand(a.heads, p.value, p.absorbed.width, p.w_uv, window=a.window)
    latent = {"latent": "wide"} if p.absorbed.eight_bits else {}
    expands = (
        *_widen_template(p, tokens),
        _expand_template("expand_keys", keys, tokens, {"w": "w_uk", "y": "keys", **latent}),
        _expand_template("expand_values", values, tokens, {"w": "w_uv", "y": "values", **latent}),
    )
    attended = attention_implementations(
        "attention", lambda t, layout: attention_kernel(a, t, layout),
        lambda t, layout, split: attention_merge(a, t, layout, split), _step_scalars(tokens), tokens.new, a.width,
        a.value_width, tokens, {"key": "keys", "key_rope": "rope", "value": "values"},
    )  # fmt: skip
    return tuple(Implementation(f"expanded, {i.name}", (*expands, *i.kernels)) for i in attended)


def _widen_template(p: Latent, tokens: Tokens) -> tuple[KernelTemplate, ...]:
    """Return the kernel that makes latents of 8 bits as wide as what is multiplied; none for others."""
    width = p.absorbed.width
    kernel = KernelTemplate(
        "widen", lambda t, layout: widen_kernel(width, row_tile(t), layout), _step_scalars(tokens),
        row_shapes(power_of_two(width), (4, 16)), staged=False,
    )  # fmt: skip
    return (kernel,) if p.absorbed.eight_bits else ()


def _linear_template(name: str, x: Linear, tokens: Tokens, renamed: Mapping[str, str]) -> KernelTemplate:
    return KernelTemplate(
        name, lambda t, layout: linear_kernel(x, t, layout, name=name), {"T": tokens.count},
        tile_shapes(row_choices(tokens.count), x.weight.step), renamed=renamed,
    )  # fmt: skip


def _expand_template(name: str, x: Expand, tokens: Tokens, renamed: Mapping[str, str]) -> KernelTemplate:
    return KernelTemplate(
        name,
        lambda t, layout: expand_kernel(x, t, layout),
        _step_scalars(tokens),
        _expand_shapes(x, tokens),
        renamed=renamed,
    )


def _expand_shapes(x: Expand, tokens: Tokens) -> tuple[tuple[int, int, int], ...]:
    """Return the tiles of an up-projection; the columns of a turned weight are read in the steps of its packing."""
    rows = row_choices(tokens.past + tokens.new)
    if not x.turned:
        return tile_shapes(rows, x.weight.step)
    step = x.weight.step
    columns = [n for n in COLUMNS if n % step == 0 and n < 2 * power_of_two(x.rows)] or [max(step, COLUMNS[0])]
    return tuple(product(rows, columns, DEPTHS))


def _step_scalars(tokens: Tokens) -> dict[str, int]:
    return {"B": tokens.batch, "S": tokens.new, "P": tokens.past, "C": tokens.past + tokens.new}


def _append(op: Op, weights: Mapping[str, Packing]) -> Computation:
    operands, a = operand_types(op), op.settings
    heads, width, rope = a.integer("heads"), operands["past_latent"].shape[3], operands["past_rope"].shape[3]
    p = LatentAppend(
        heads, int(operands["q"].shape[2]) // heads, int(width), int(rope), a.number("eps"), a.flag("pairs"),
        str(operands["cos"].shape[0]) == "B", eight_bits=bool(a.text("cache", "")),
    )  # fmt: skip

    def implementations(tokens: Tokens, profile: Profile) -> tuple[Implementation, ...]:
        own = replace(p, bits=bits_of(profile, "fp8_g128")) if p.eight_bits else p
        kernel = KernelTemplate(
            "latent_append", lambda t, layout: latent_append(own, row_tile(t), layout), _step_scalars(tokens),
            tuple((m, 1, 1) for m in (1, 2, 4, 8, 16, 32)), staged=False,
            appended={"latent": ("past_latent", "latent"), "key_rope": ("past_rope", "rope")},
        )  # fmt: skip
        return only_implementation(kernel)

    return Computation("latent_append", p, {}, implementations)


IMPLEMENTATIONS: dict[str, Selector] = {"acc.latent_attention": _latent_attention, "acc.latent_append": _append}
