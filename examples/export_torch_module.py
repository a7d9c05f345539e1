"""Compile a hand-written Mixture-of-Experts layer: what computes every expert becomes what computes the chosen ones.

python examples/export_torch_module.py FOLDER
"""

import sys
from pathlib import Path

import moec
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class Einsum(nn.Module):
    """Every expert for every token, times gates that are 0 for all but two."""

    def __init__(self, width=256, inner=512, experts=16):
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, inner) / width**0.5)
        self.down = nn.Parameter(torch.randn(experts, inner, width) / inner**0.5)

    def forward(self, x):
        scores = F.softmax(self.router(x), -1)
        best, ids = scores.topk(2, -1)
        gates = torch.zeros_like(scores).scatter(-1, ids, best)
        h = F.silu(torch.einsum("td,edi->tei", x, self.up))
        return (torch.einsum("tei,eid->ted", h, self.down) * gates[..., None]).sum(1)


class Loop(Einsum):
    """The same as a loop over the experts, each with its own tokens."""

    def forward(self, x):
        best, ids = F.softmax(self.router(x), -1).topk(2, -1)
        y = torch.zeros_like(x)
        for e in range(len(self.up)):
            token, choice = torch.where(ids == e)
            h = F.silu(x[token] @ self.up[e]) @ self.down[e]
            y.index_add_(0, token, h * best[token, choice, None])
        return y


def main(folder: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 256)
    for kind in (Einsum, Loop):
        module = kind()
        for quantize in (None, "int4"):
            name = folder / f"{kind.__name__.lower()}-{quantize or 'f32'}"
            artifact = moec.compile(module, example_inputs=x, out=name, quantize=quantize)
            off = np.abs(artifact(x) - module(x).detach().numpy()).max()
            print(f"{name.name}: {artifact.report['bytes']:,} bytes, off by {off:.1g}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "exported"))
