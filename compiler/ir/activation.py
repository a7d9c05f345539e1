"""The activation between the two matrices of an expert, as one value: an attribute of ops, with a text of its own.

gated(silu)                                                         silu(g) u of the halves g and u
gated(silu, layout=interleaved, alpha=1.702, beta=1.0, limit=7.0)   gpt-oss
gated(silu, limit=7.0, clamp_after=true)                            Step 3.7
plain(relu2)                                                        without a gate
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import MoecError

# each function with what says it in ops of stage moe, as the matcher of rules reads it: %a of %g
KINDS: Mapping[str, str] = {
    "silu": "%a = core.silu(%g)",
    "gelu": "%a = core.gelu(%g) {approximate=none}",
    "gelu_tanh": "%a = core.gelu(%g) {approximate=tanh}",
    "relu": "%a = core.relu(%g)",
    "relu2": "%r = core.relu(%g)\n%a = core.mul(%r, %r)",
    "identity": "",
}
LAYOUTS = ("concat", "interleaved")
FORMS = {"gated": True, "plain": False}  # the word that begins the text, and what `gated` is then


@dataclass(frozen=True)
class Activation:
    """What is computed of h, the first matrix's result. Gated: kind(g) (u + beta) with g and u the halves of h.

    The halves are concatenated or interleaved, as `layout` says. g is clamped above at `limit` and u on both sides;
    with `clamp_after` it is kind(g) that is clamped, not g. silu(g) is g sigmoid(alpha g). Not gated: kind(h).
    MoecError for what does not fit together.
    """

    kind: str = "silu"
    gated: bool = True
    layout: str = "concat"
    alpha: float = 1.0
    beta: float = 0.0
    limit: float = math.inf
    clamp_after: bool = False

    def __post_init__(self) -> None:
        numbers = [self.alpha, self.beta, self.limit]
        if self.kind not in KINDS:
            raise MoecError(f"there is no activation {self.kind}", todo=f"there are {', '.join(KINDS)}")
        if self.layout not in LAYOUTS:
            raise MoecError(f"layout={self.layout} is neither {' nor '.join(LAYOUTS)}")
        if not all(isinstance(n, float) and not math.isnan(n) for n in numbers) or not isinstance(
            self.clamp_after, bool
        ):
            raise MoecError(
                "alpha, beta and limit of an activation are numbers such as 1.0, clamp_after is true or false"
            )
        if self.limit < 0:
            raise MoecError(f"the limit of an activation is not less than 0, as {self.limit} is")
        if not self.gated and self._options():
            raise MoecError(f"an activation without a gate has no {', '.join(self._options())}")
        if self.alpha != 1 and self.kind != "silu":
            raise MoecError(f"alpha is one of silu, not of {self.kind}")
        if self.clamp_after and math.isinf(self.limit):
            raise MoecError("clamp_after needs a limit")
        for name in ("alpha", "beta", "limit"):  # 0.0 and -0.0 compute the same here, and have one text
            object.__setattr__(self, name, getattr(self, name) + 0.0)

    @staticmethod
    def of(form: str, kind: str, options: Mapping[str, Any]) -> Activation:
        """Return the activation that a text says; MoecError for an option that there is not."""
        known = [f.name for f in fields(Activation)[2:]]
        if unknown := [name for name in options if name not in known]:
            raise MoecError(f"an activation has no {unknown[0]}", todo=f"it has {', '.join(known)}")
        return Activation(kind, FORMS[form], **options)

    def __str__(self) -> str:
        """Return the text, which reads back as the same value."""
        options = [f"{name}={str(v).lower() if isinstance(v, bool) else v}" for name, v in self._options().items()]
        return f"{'gated' if self.gated else 'plain'}({', '.join([self.kind, *options])})"

    def _options(self) -> dict[str, Any]:
        """Return what differs from the defaults of a gated activation, beside kind and gate."""
        found = {f.name: getattr(self, f.name) for f in fields(self)[2:]}
        return {f.name: found[f.name] for f in fields(self)[2:] if found[f.name] != f.default}

    @property
    def interleaved(self) -> bool:
        """Whether the rows of gate and up are interleaved."""
        return self.layout == "interleaved"

    @property
    def clamped(self) -> bool:
        """Whether there is a limit."""
        return not math.isinf(self.limit)


SILU = Activation()
IDENTITY = Activation("identity", gated=False)  # what is computed where there is no activation
