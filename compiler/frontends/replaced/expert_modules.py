"""Experts that transformers does not dispatch through an interface: loops over the experts that data choose.

Each forward pass below says the same with `moec::experts`, or with `moec::expert_linear` where a block does more
between the matrices of an expert than apply an activation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...ir.activation import Activation
from ..transformers.activations import activation_of, kind_of
from .expert_rows import expert_rows


@torch.library.custom_op("moec::expert_linear", mutates_args=())
def expert_linear_op(rows: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Stand for a linear layer whose weight each row [R, D] chooses by its id [R] from w [E, N, D]."""
    return rows.new_empty(rows.shape[0], w.shape[1])


@expert_linear_op.register_fake
def _(rows, ids, w):
    return rows.new_empty(rows.shape[0], w.shape[1])


def _gated_experts(
    x: Tensor, ids: Tensor, gates: Tensor, up: Tensor, down: Tensor, act: Any, transposed: bool
) -> Tensor:
    """Emit gated experts with rows of all gates before those of up."""
    return torch.ops.moec.experts(x, ids, gates, up, down, None, None, str(Activation(kind_of(act))), transposed)


def _llama4_moe(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Llama 4: the score multiplies what an expert reads, not what it gives."""
    x = hidden_states.reshape(-1, self.hidden_dim)
    logits = functional.linear(x, self.router.weight)
    values, ids = torch.topk(logits, self.top_k, dim=1)
    scaled = x[:, None, :] * torch.sigmoid(values)[:, :, None]
    rows, ids = scaled.reshape(-1, self.hidden_dim), ids.reshape(-1, 1)
    experts = self.experts
    ones = torch.ones_like(ids, dtype=x.dtype)
    y = _gated_experts(rows, ids, ones, experts.gate_up_proj, experts.down_proj, experts.act_fn, True)
    return self.shared_expert(x) + y.reshape(-1, self.top_k, self.hidden_dim).sum(1), logits


def _dbrx_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """DBRX: the matrices of all experts are concatenated, w2 as [in, out]."""
    shape = (self.num_experts, self.ffn_hidden_size, self.hidden_size)
    up = torch.cat((self.mlp.w1.view(shape), self.mlp.v1.view(shape)), dim=1)
    down = self.mlp.w2.view(shape).transpose(1, 2)
    x = hidden_states.reshape(-1, self.hidden_size)
    y = _gated_experts(x, top_k_index, top_k_weights, up, down, self.mlp.activation_fn, False)
    return y.view(hidden_states.shape)


def _longcat_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """LongCat: experts beyond the real ones give back what they read."""
    real = top_k_index < self.num_routed_experts
    zero = torch.zeros_like(top_k_weights)
    ids = top_k_index.clamp(max=self.num_routed_experts - 1)
    gates = torch.where(real, top_k_weights, zero)
    up = self.gate_up_proj[: self.num_routed_experts]
    y = _gated_experts(hidden_states, ids, gates, up, self.down_proj, self.act_fn, False)
    return y + hidden_states * torch.where(real, zero, top_k_weights).sum(-1, keepdim=True)


def _step_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Step 3.7: some layers clamp the gate behind its activation."""
    given, weights = (hidden_states, top_k_index, top_k_weights), (self.gate_up_proj, self.down_proj)
    act = activation_of(self, gated=True, layout="concat")
    if act is None:
        return expert_rows(*given, *weights, self._apply_gate)
    return torch.ops.moec.experts(*given, *weights, None, None, str(act), False)


# --- JetMoE: attention heads are experts too -----------------------------------------------------------------------


def _jetmoe_route(router: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = router.layer(x)
    values, ids = logits.topk(router.top_k, dim=1)
    return torch.softmax(values, dim=1), ids, logits


def _jetmoe_moe(self: Any, layer_input: Tensor) -> Tensor:
    x = layer_input.reshape(-1, self.input_size)
    gates, ids, _ = _jetmoe_route(self.router, x)
    y = _gated_experts(x, ids, gates, self.input_linear.weight, self.output_linear.weight, self.activation, False)
    return y.view(layer_input.shape) + self.bias


def _jetmoe_queries(self: Any, layer_input: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return the queries [B, S, K, H] of a token's K experts, and the routing."""
    batch, new, width = layer_input.shape
    x = layer_input.reshape(-1, width)
    gates, ids, logits = _jetmoe_route(self.router, x)
    rows = x[:, None, :].expand(-1, self.top_k, -1).reshape(-1, width)
    q = torch.ops.moec.expert_linear(rows, ids.reshape(-1), self.input_linear.weight)
    return q.view(batch, new, self.top_k, -1), logits, (ids, gates)


def _jetmoe_outputs(self: Any, layer_input: Tensor, topo_info: tuple[Tensor, Tensor]) -> Tensor:
    """Project the heads [B, S, K, H] of each expert and add them up."""
    batch, new, count, width = layer_input.shape
    ids, gates = topo_info
    rows = layer_input.reshape(-1, width)
    y = torch.ops.moec.expert_linear(rows, ids.reshape(-1), self.output_linear.weight)
    y = (y.reshape(-1, count, self.input_size) * gates[:, :, None]).sum(1)
    return y.view(batch, new, self.input_size) + self.bias


METHODS: dict[str, Callable[..., Any]] = {
    "Llama4TextMoe.forward": _llama4_moe,
    "DbrxExperts.forward": _dbrx_experts,
    "LongcatFlashExperts.forward": _longcat_experts,
    "Step3p7Experts.forward": _step_experts,
    "JetMoeMoE.forward": _jetmoe_moe,
    "JetMoeMoA.map": _jetmoe_queries,
    "JetMoeMoA.reduce": _jetmoe_outputs,
}
