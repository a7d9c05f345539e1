"""The routers that models have: each family's becomes one moe.route, and so do routers of other families, traced alone."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from moec.compiler.driver import compile_source, opt
from moec.compiler.frontends.aten.export import trace_module
from moec.compiler.frontends.aten.lower import TracedGraph, lower_graph
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.frontends.transformers.layers import BATCH, NEW
from moec.compiler.frontends.transformers.model import _type_of
from moec.compiler.ir.dtypes import dtype_name
from moec.compiler.ir.module import Dim, Module
from moec.compiler.ir.recipes import Tensor
from moec.compiler.ir.types import TensorType
from moec.compiler.ops.builder import IRBuilder
from places import SUPPORT
from tiny_models import INSTALLED, random_model

ALWAYS = ("olmoe", "mixtral", "qwen2_moe", "qwen3_moe")  # the others belong to the long matrix
DENSE = ("llama", "gemma3_text", "gpt_neox")
CHECKED = [pytest.param(n, marks=() if n in ALWAYS else pytest.mark.long) for n in INSTALLED if n not in DENSE]

# what makes ids and gates where that is not one moe.route alone: some of the family's own code stands between
BETWEEN = {
    "llama4_text": {"core.full", "core.topk"},  # the scores multiply the experts' input, all gates are 1
    "longcat_flash": {"core.clamp", "core.where"},  # ids of identity experts are cut off
    "zaya": {"core.reshape"},  # logits of three axes
    "inkling_text": {"moe.route", "core.slice"},  # shared experts enter the chosen ones' softmax
}
ROWS = (
    "muse_spark",
    "inkling2",
    "inkling2_loop",
)  # what their experts do besides is none of moe.experts: matrix by matrix


@pytest.mark.parametrize("name", CHECKED)
def test_router_of_a_family(name: str) -> None:
    done = compile_source(random_model(FAMILIES[name]), stop_after="fuse-router")
    module = done.module
    if name in ROWS:
        names = [{op.name for op in f.ops} for f in module.functions]
        assert any("moe.route" in found for found in names)
        assert not any("core.topk" in found for found in names)
    routed = [(f, op) for f in module.functions for op in f.ops if op.name == "moe.experts"]
    assert bool(routed) == (name not in ROWS)
    for f, op in routed:
        assert {f.producers[v.name].name for v in op.inputs[1:3]} == BETWEEN.get(name, {"moe.route"})
    assert name in BETWEEN or not [n for n in done.notes if "fuse-router" in str(n)]


# --- routers alone ---------------------------------------------------------------------------------------------

EIGHT = {"num_experts": 8, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2}
GROUPED = {**ROUTED, "n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
FOUR = {"groups": 4, "topk_groups": 2}
SUM20 = {"renorm": "sum", "eps": 1e-20}
SIGMOID, SOFTMAX, SQRT = {"score": "sigmoid"}, {"score": "softmax"}, {"score": "sqrtsoftplus"}
WIDTH = 16


@dataclass(frozen=True)
class Router:
    """A router class of transformers, its config, and the attributes of moe.route that it is."""

    folder: str
    name: str
    config: str
    options: dict[str, Any]
    route: dict[str, Any]
    operands: tuple[str, ...] = ()
    flat: bool = False  # called with [tokens, width]
    extra: Callable[[], torch.Tensor] | None = field(default=None)


def eight() -> torch.Tensor:
    return torch.empty(8)


def tokens() -> torch.Tensor:
    return torch.empty(BATCH, NEW, dtype=torch.int64)


ROUTERS = (
    Router("mistral4", "Mistral4TopkRouter", "Mistral4Config", GROUPED,
           {**SOFTMAX, **SUM20, **FOUR, "group_score": "top2", "mask": 0.0, "scale": 2.5}),
    Router("deepseek_v2", "DeepseekV2TopkRouter", "DeepseekV2Config", {**GROUPED, "topk_method": "group_limited_greedy"},
           {**SOFTMAX, **FOUR, "mask": 0.0, "weigh": "choice", "scale": 2.5}),
    Router("deepseek_v2", "DeepseekV2TopkRouter", "DeepseekV2Config", {**GROUPED, "topk_method": "greedy"},
           {**SOFTMAX, "scale": 2.5}),
    Router("axk2", "AXK2TopkRouter", "AXK2Config", GROUPED,
           {**SIGMOID, **SUM20, **FOUR, "group_score": "top2", "mask": 0.0, "scale": 2.5}, ("bias",)),
    Router("lfm2_moe", "Lfm2MoeTopKRouter", "Lfm2MoeConfig",
           {**EIGHT, "use_expert_bias": True, "routed_scaling_factor": 1.5},
           {**SIGMOID, "renorm": "sum", "eps": 1e-6, "scale": 1.5}, ("bias",), flat=True, extra=eight),
    Router("gemma4", "Gemma4TextRouter", "Gemma4TextConfig",
           {"num_experts": 8, "top_k_experts": 2, "enable_moe_block": True, "moe_intermediate_size": 8},
           {**SOFTMAX, "renorm": "sum"}, ("expert_scale",), flat=True),
    Router("kolibri1", "Kolibri1TopKRouter", "Kolibri1Config", {**EIGHT, "norm_topk_prob": True},
           {**SIGMOID, "order": "select_score", "renorm": "sum"}, ("bias",)),
    Router("longcat_flash", "LongcatFlashTopkRouter", "LongcatFlashConfig",
           {"n_routed_experts": 8, "zero_expert_num": 0, "moe_topk": 2, "routed_scaling_factor": 6.0},
           {**SOFTMAX, "scale": 6.0}, ("bias",)),
    Router("phimoe", "PhimoeTopKRouter", "PhimoeConfig", LOCAL, {"score": "sparsemixer", "jitter": 0.01}, flat=True),
    Router("step3p7", "Step3p7TopKRouter", "Step3p7TextConfig", {"moe_num_experts": 8, "moe_top_k": 2},
           {**SIGMOID, "renorm": "sum"}, ("bias",)),
    Router("muse_spark", "MuseSparkTopkRouter", "MuseSparkTextConfig", EIGHT,
           {**SIGMOID, "renorm": "sum", "eps": 1e-15}, ("bias",)),
    Router("laguna", "LagunaTopKRouter", "LagunaConfig", {**EIGHT, "moe_router_logit_softcapping": 5.0},
           {**SIGMOID, "renorm": "sum"}, ("bias",)),
    Router("flint", "FlintTopKRouter", "FlintConfig", EIGHT, {**SIGMOID, "renorm": "sum"}),
    Router("hy_v3", "HYV3TopKRouter", "HYV3Config", {**EIGHT, "router_scaling_factor": 1.5},
           {**SIGMOID, **SUM20, "scale": 1.5}, ("bias",), extra=eight),
    Router("deepseek_v4", "DeepseekV4TopKRouter", "DeepseekV4Config", {**ROUTED, "routed_scaling_factor": 1.5},
           {**SQRT, **SUM20, "scale": 1.5}, ("bias",)),
    Router("deepseek_v4", "DeepseekV4HashRouter", "DeepseekV4Config",
           {**ROUTED, "routed_scaling_factor": 1.5, "vocab_size": 32},
           {**SQRT, **SUM20, "scale": 1.5}, ("given",), extra=tokens),
    Router("openai_privacy_filter", "OpenAIPrivacyFilterTopKRouter", "OpenAIPrivacyFilterConfig", LOCAL,
           {**SOFTMAX, "order": "select_score", "scale": 0.5}, flat=True),
    Router("minimax_m3_vl", "MiniMaxM3VLTopKRouter", "MiniMaxM3VLTextConfig", LOCAL,
           {**SIGMOID, "renorm": "sum"}, ("bias",)),
    Router("mistral_large4", "MistralLarge4TextTopkRouter", "MistralLarge4TextConfig", GROUPED,
           {**SOFTMAX, **SUM20, **FOUR, "group_score": "top2", "mask": 0.0, "scale": 2.5}),
    Router("inkling2", "Inkling2TopKRouter", "Inkling2TextConfig", {**ROUTED, "route_scale": 2.0},
           {**SIGMOID, **SUM20, "scale": 2.0}, ("bias",)),
    Router("inkling2", "Inkling2TopKRouter", "Inkling2TextConfig", {**ROUTED, "scoring_func": "sqrtsoftplus"},
           {**SQRT, **SUM20, "scale": 8.0}, ("bias",)),
    Router("cohere2_moe", "Cohere2MoeTopKRouter", "Cohere2MoeConfig",
           {**EIGHT, "expert_selection_fn": "sigmoid", "norm_topk_prob": True},
           {**SIGMOID, "order": "select_score", "renorm": "sum"}, flat=True),
)  # fmt: skip


class Alone(torch.nn.Module):
    """A router as a function of a list of tensors; the results are the weights and the experts."""

    def __init__(self, router: torch.nn.Module, flat: bool) -> None:
        super().__init__()
        self.router, self.flat = router, flat

    def forward(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        x, *rest = tensors
        return list(self.router(x.reshape(-1, WIDTH) if self.flat else x, *rest)[1:3])


def imported(case: Router) -> Module:
    """Return the program of a router, as the importer spells it."""
    code = importlib.import_module(f"transformers.models.{case.folder}.modeling_{case.folder}")
    configs = importlib.import_module(f"transformers.models.{case.folder}.configuration_{case.folder}")
    config = getattr(configs, case.config)(hidden_size=WIDTH, num_attention_heads=4, **case.options)
    with torch.device("meta"):
        inputs = [torch.empty(BATCH, NEW, WIDTH), *([case.extra()] if case.extra else [])]
    traced = trace_module(Alone(getattr(code, case.name)(config).to("meta").eval(), case.flat), inputs, case.name)
    signature, builder = traced.program.graph_signature, IRBuilder("main")
    tensors = {**traced.program.state_dict, **traced.program.constants}
    values: dict[str, Any] = {}
    for i, (node, tensor) in enumerate(zip(signature.user_inputs, inputs, strict=True)):
        values[str(node)] = builder.param(f"x{i}", _type_of(tensor))
    for node, name in {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.items():
        type_ = TensorType.of(dtype_name(tensors[name].dtype), *tensors[name].shape)
        values[node] = builder.const(name.replace(".", "_"), Tensor(name, type_))
    function = builder.build(lower_graph(TracedGraph(builder, traced=traced), values))
    return Module("graph", (Dim("B", 1, 64), Dim("S", 1, 64)), (function,))


@pytest.mark.parametrize("case", ROUTERS, ids=lambda case: f"{case.name}-{len(case.options)}")
def test_router_alone(case: Router) -> None:
    module = opt(imported(case), "cleanup,lift-moe,cleanup,fuse-router,cleanup", check=True)
    routes = [op for op in module.main.ops if op.name == "moe.route"]
    assert [dict(op.attrs) for op in routes] == [{"k": 2, **case.route}]
    names = ("bias", "given", "expert_scale")
    assert tuple(n for n, v in zip(names, routes[0].operands[1:], strict=True) if v) == case.operands
    assert not {op.name for op in module.main.ops} & {"core.topk", "core.gather", "core.softmax", "core.sigmoid"}


def test_a_live_model_is_the_first_that_a_process_compiles() -> None:
    """transformers must know moec's attention before a copy of the model is told to use it."""
    code = "import moec, tiny_models as t; from moec.compiler.frontends.families import FAMILIES as F;"
    code += "print(moec.compile(t.random_model(F['olmoe'], num_hidden_layers=1), stop_after='graph').stage)"
    paths = [str(SUPPORT), *filter(None, sys.path)]
    code = f"import sys; sys.path[:0] = {paths!r}; {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "graph", done.stderr[-2000:]
