"""Experts as people write them in plain torch: nothing in them is prepared for moec."""

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, INNER, EXPERTS, CHOSEN = 32, 64, 8, 2


def random_weight(*shape):
    """Return a parameter whose product with normal numbers is about normal."""
    return nn.Parameter(torch.randn(*shape) / shape[-2] ** 0.5)


class GatedExpert(nn.Module):
    """One expert as a module of its own."""

    def __init__(self, width=WIDTH, inner=INNER):
        super().__init__()
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Listed(nn.Module):
    """A router and a list of modules; subclasses say how tokens reach them."""

    def __init__(self, experts=EXPERTS):
        super().__init__()
        self.router = nn.Linear(WIDTH, experts, bias=False)
        self.experts = nn.ModuleList(GatedExpert() for _ in range(experts))

    def choose(self, x):
        """Softmax over all, then the best ones."""
        gates, ids = F.softmax(self.router(x), -1).topk(CHOSEN, -1)
        return gates / gates.sum(-1, keepdim=True), ids


class MaskedSum(Listed):
    """Every expert for every token, times a gate that is mostly 0."""

    def forward(self, x):
        gates, ids = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            y = y + (gates * (ids == e)).sum(-1, keepdim=True) * expert(x)
        return y


class IndexAdd(Listed):
    """The rows of an expert's tokens, added where they came from."""

    def forward(self, x):
        gates, ids = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(ids == e)
            y.index_add_(0, token, expert(x[token]) * gates[token, choice, None])
        return y


class WrittenBack(Listed):
    """The same with an assignment."""

    def forward(self, x):
        gates, ids = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(ids == e)
            y[token] += gates[token, choice].unsqueeze(-1) * expert(x[token])
        return y


class ScatterAdd(Listed):
    """The same with scatter_add."""

    def forward(self, x):
        gates, ids = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(ids == e)
            y.scatter_add_(0, token[:, None].expand(-1, WIDTH), expert(x[token]) * gates[token, choice][:, None])
        return y


class MaskedProbabilities(Listed):
    """Softmax over all, a mask of the best ones, and the sum made 1 again."""

    def forward(self, x):
        scores = F.softmax(self.router(x), -1)
        mask = torch.zeros_like(scores).scatter(-1, scores.topk(CHOSEN, -1)[1], 1.0)
        gates = scores * mask
        gates = gates / gates.sum(-1, keepdim=True)
        return sum(gates[:, e : e + 1] * expert(x) for e, expert in enumerate(self.experts))


class ChosenThenSoftmax(Listed):
    """The best logits first, then their softmax."""

    def forward(self, x):
        logits, ids = self.router(x).topk(CHOSEN, -1)
        gates = logits.softmax(-1)
        y = 0
        for e, expert in enumerate(self.experts):
            y = y + expert(x) * torch.where(ids == e, gates, torch.zeros_like(gates)).sum(-1, keepdim=True)
        return y


class NoisyRouter(Listed):
    """A router that adds noise in training, and experts whose results are stacked."""

    def forward(self, x):
        logits = self.router(x)
        if self.training:
            logits = logits + torch.randn_like(logits)
        best, ids = logits.topk(CHOSEN, -1)
        gates = torch.full_like(logits, float("-inf")).scatter(-1, ids, best).softmax(-1)
        return torch.stack([expert(x) for expert in self.experts], 1).mul(gates.unsqueeze(-1)).sum(1)


class GatheredResults(Listed):
    """What all experts give, of which the chosen ones are gathered."""

    def forward(self, x):
        gates, ids = self.choose(x)
        every = torch.stack([expert(x) for expert in self.experts], 1)
        chosen = torch.gather(every, 1, ids[..., None].expand(-1, -1, WIDTH))
        return (chosen * gates[..., None]).sum(1)


class SharedExpert(MaskedSum):
    """An expert for every token beside the chosen ones, with a gate of its own."""

    def __init__(self):
        super().__init__()
        self.shared, self.shared_gate = GatedExpert(inner=48), nn.Linear(WIDTH, 1, bias=False)

    def forward(self, x):
        return super().forward(x) + torch.sigmoid(self.shared_gate(x)) * self.shared(x)


class TwoRouters(nn.Module):
    """Two blocks of experts whose results are added."""

    def __init__(self):
        super().__init__()
        self.many, self.few = MaskedSum(), IndexAdd(experts=4)

    def forward(self, x):
        return self.many(x) + self.few(x)


class Switch(nn.Module):
    """One expert a token, its rows written over zeros."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, INNER), nn.ReLU(), nn.Linear(INNER, WIDTH)) for _ in range(EXPERTS)
        )

    def forward(self, x):
        gate, ids = self.router(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = ids == e
            y[mine] = expert(x[mine]) * gate[mine].unsqueeze(-1)
        return y


class Stacked(nn.Module):
    """Weights with an axis for the experts; subclasses say how they are multiplied."""

    def __init__(self, gated=True):
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up, self.down = random_weight(EXPERTS, WIDTH, INNER), random_weight(EXPERTS, INNER, WIDTH)
        self.gate = random_weight(EXPERTS, WIDTH, INNER) if gated else None

    def spread(self, x):
        """Gates of all experts, 0 for those that were not chosen."""
        scores = F.softmax(self.router(x), -1)
        gates, ids = scores.topk(CHOSEN, -1)
        return torch.zeros_like(scores).scatter(-1, ids, gates / gates.sum(-1, keepdim=True))


class Einsum(Stacked):
    """Einstein sums over every expert."""

    def forward(self, x):
        h = F.silu(torch.einsum("td,edi->tei", x, self.gate)) * torch.einsum("td,edi->tei", x, self.up)
        return (torch.einsum("tei,eid->ted", h, self.down) * self.spread(x)[..., None]).sum(1)


class EinsumOverBatches(nn.Module):
    """Batches of sequences, weights that lie the other way round, and biases."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.up, self.down = random_weight(EXPERTS, INNER, WIDTH), random_weight(EXPERTS, WIDTH, INNER)
        self.up_bias, self.down_bias = (
            nn.Parameter(torch.randn(EXPERTS, INNER)),
            nn.Parameter(torch.randn(EXPERTS, WIDTH)),
        )

    def forward(self, x):
        logits = self.router(x)
        best, ids = logits.topk(CHOSEN, -1)
        gates = torch.zeros_like(logits).scatter_(-1, ids, best.softmax(-1))
        h = F.gelu(torch.einsum("bsd,eid->bsei", x, self.up) + self.up_bias)
        y = torch.einsum("bsei,edi->bsed", h, self.down) + self.down_bias
        return torch.einsum("bsed,bse->bsd", y, gates)


class OneHot(Stacked):
    """One-hot masks, and products of batches of matrices."""

    def forward(self, x):
        gates, ids = F.softmax(self.router(x), -1).topk(CHOSEN, -1)
        spread = (F.one_hot(ids, EXPERTS).to(x.dtype) * gates.unsqueeze(-1)).sum(1)
        repeated = x.unsqueeze(0).expand(EXPERTS, -1, -1)
        h = F.silu(torch.bmm(repeated, self.gate)) * torch.bmm(repeated, self.up)
        return torch.einsum("etd,te->td", torch.bmm(h, self.down), spread)


class GatheredWeights(Stacked):
    """A copy of the chosen experts' weights for every token."""

    def forward(self, x):
        gates, ids = F.softmax(self.router(x), -1).topk(CHOSEN, -1)
        h = F.relu(torch.einsum("td,tkdi->tki", x, self.up[ids]))
        return (torch.einsum("tki,tkid->tkd", h, self.down[ids]) * gates[..., None]).sum(1)


class GroupLimited(Stacked):
    """Sigmoid scores, the best groups of experts, the best experts of these; the experts come first."""

    def forward(self, x):
        scores = self.router(x).sigmoid()
        groups = scores.view(-1, 4, 2).topk(2, -1)[0].sum(-1).topk(2, -1)[1]
        open_ = (
            scores.new_zeros(x.shape[0], 4).scatter(1, groups, 1.0).unsqueeze(-1).expand(-1, 4, 2).reshape(-1, EXPERTS)
        )
        ids = scores.masked_fill(open_ == 0, 0.0).topk(CHOSEN, -1)[1]
        gates = scores.gather(1, ids)
        gates = gates / (gates.sum(-1, keepdim=True) + 1e-20) * 2.5
        spread = torch.zeros_like(scores).scatter(1, ids, gates)
        h = F.silu(torch.einsum("td,edi->eti", x, self.gate)) * torch.einsum("td,edi->eti", x, self.up)
        return (torch.einsum("eti,eid->etd", h, self.down) * spread.t().unsqueeze(-1)).sum(0)


class ExpertChoice(Stacked):
    """Experts that choose their tokens: how many experts a token goes to is not fixed."""

    def forward(self, x):
        scores = F.softmax(self.router(x), -1).t()
        gates, ids = scores.topk(CHOSEN, -1)
        spread = torch.zeros_like(scores).scatter(-1, ids, gates)
        h = F.relu(torch.einsum("td,edi->eti", x, self.up))
        return (torch.einsum("eti,eid->etd", h, self.down) * spread.unsqueeze(-1)).sum(0)


class SoftMixture(Stacked):
    """Every expert has its share of every token: there is no choice."""

    def forward(self, x):
        h = F.relu(torch.einsum("td,edi->tei", x, self.up))
        return (torch.einsum("tei,eid->ted", h, self.down) * F.softmax(self.router(x), -1)[..., None]).sum(1)


class OneMissing(Listed):
    """A loop that leaves the last expert out."""

    def forward(self, x):
        gates, ids = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts[:-1]):
            y = y + (gates * (ids == e)).sum(-1, keepdim=True) * expert(x)
        return y


class OnlyThoseChosen(Listed):
    """A loop over the experts that some token chose, which depends on data."""

    def forward(self, x):
        gates, ids = self.choose(x)
        y = torch.zeros_like(x)
        for e in ids.unique():
            token, choice = torch.where(ids == e)
            y.index_add_(0, token, self.experts[e](x[token]) * gates[token, choice, None])
        return y


RAISED = (
    MaskedSum, IndexAdd, WrittenBack, ScatterAdd, MaskedProbabilities, ChosenThenSoftmax, NoisyRouter, GatheredResults,
    SharedExpert, TwoRouters, Switch, Einsum, EinsumOverBatches, OneHot, GatheredWeights, GroupLimited,
)  # fmt: skip
