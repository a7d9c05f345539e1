"""What an engineer would call of a vendor's library in the place of a kernel, and whether weights lie as that takes them.

Names are those of torch_npu's documentation (Ascend/op-plugin, docs). Its grouped and plain products take transposed weights in
FRACTAL_NZ as [E, K1, N1, N0, K0], K0 and N0 being 16 for bf16 (aclnnGroupedMatmulWeightNz): what moec stores. In MX formats
transposed weights [E, N, K] have scales [E, N, ceil(K / 64), 2] (aclnnGroupedMatmulSwigluQuantV2): moec's [E, N, K / 32].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..tile.packing import Packing
from ..tile.tiles import Dot, Program, walk_statements


@dataclass(frozen=True)
class Library:
    """A vendor's library: what it has for an op by name, for one that multiplies or makes codes in an MX format, and for
    dispatch and combine over devices."""

    calls: Mapping[str, str] = field(default_factory=dict)
    coded: Mapping[str, str] = field(default_factory=dict)
    dispatch: str = ""
    combine: str = ""


TORCH_NPU = Library(
    {
        "acc.linear": "torch.nn.functional.linear",
        "acc.gated_up": "torch.nn.functional.linear, torch_npu.npu_swiglu",
        "acc.sort": "torch_npu.npu_moe_init_routing_v2",  # which gathers the rows too
        "acc.grouped_up": "torch_npu.npu_grouped_matmul, torch_npu.npu_swiglu",
        "acc.grouped_down": "torch_npu.npu_grouped_matmul, torch_npu.npu_moe_finalize_routing",
        "moe.route": "torch_npu.npu_moe_gating_top_k",
        "nn.rms_norm": "torch_npu.npu_rms_norm",
        "nn.add_rms_norm": "torch_npu.npu_add_rms_norm",
        "acc.rope_append": "torch_npu.npu_kv_rmsnorm_rope_cache",
        "nn.attention": "torch_npu.npu_fused_infer_attention_score",
        "acc.latent_attention": "torch_npu.npu_fused_infer_attention_score",
    },
    {
        "acc.quantize": "torch_npu.npu_dynamic_mx_quant",
        "acc.norm": "torch_npu.npu_add_rms_norm_dynamic_mx_quant",  # npu_rms_norm_dynamic_mx_quant without a residual
        "acc.linear": "torch_npu.npu_quant_matmul",
        "acc.gated_up": "torch_npu.npu_quant_matmul, torch_npu.npu_swiglu, torch_npu.npu_dynamic_mx_quant",
        "acc.grouped_up": "torch_npu.npu_grouped_matmul_swiglu_quant_v2",
        "acc.grouped_down": "torch_npu.npu_grouped_matmul, torch_npu.npu_moe_finalize_routing",
    },
    "torch_npu.npu_moe_distribute_dispatch_v2",
    "torch_npu.npu_moe_distribute_combine_v2",
)
LIBRARIES: Mapping[str, Library] = {"torch_npu": TORCH_NPU}


def library_of(name: str) -> Library:
    """Return a library by the name that a family of chips gives; one without calls where there is none."""
    return LIBRARIES.get(name, Library())


def call_json(library: Library, op: str, weights: Mapping[str, Packing], program: Program) -> dict[str, Any]:
    """Return the entry of a kernel as JSON values; nothing where the library has no call for it."""
    coded = any(isinstance(s, Dot) and s.scales for s in walk_statements(program.body)) or not weights
    call = (library.coded.get(op) if coded else None) or library.calls.get(op)
    if call is None:
        return {}
    layouts = {name: _layout_text(packing, coded) for name, packing in weights.items()}
    return {"library": {"call": call, "weights": layouts}}


def exchange_json(library: Library) -> dict[str, Any]:
    """Return the entry of dispatch and combine over devices as JSON values; nothing without such calls."""
    return {"library": {"dispatch": library.dispatch, "combine": library.combine}} if library.dispatch else {}


def _layout_text(packing: Packing, coded: bool) -> str:
    """Return how a call takes a weight that is stored so; `coded`: it multiplies codes under scales."""
    if packing.quantized and coded:
        return "as stored: codes ND, transposed; scales as [..., N, K / 64, 2]"
    if packing.quantized:
        return "to be packed anew: moec's codes and scales lie for its own kernels"
    return "as stored: FRACTAL_NZ, transposed" if packing.fractal else "as stored: ND, transposed"
