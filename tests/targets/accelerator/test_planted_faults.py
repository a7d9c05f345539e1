"""Faults that the accelerators' kernels had, or could have, put back: whole models no longer agree with transformers."""

from dataclasses import dataclass, field

import moec
import numpy as np
import pytest
import torch
from moec.compiler.errors import MoecError
from moec.compiler.formats.table import format_of
from moec.compiler.frontends.families import FAMILIES
from moec.passes import absorb_mla
from moec.targets.accelerator.artifact import bindings
from moec.targets.accelerator.kernels import attend, attention, experts, latent, low_precision, recurrent, rope, route
from moec.targets.accelerator.lower import module as lowering
from moec.targets.accelerator.run import slots
from moec.targets.accelerator.select import choose, search
from moec.targets.accelerator.tile.packing import Packing
from planted_faults import plant_fault
from tiny_models import random_model
from whole_models import check_near, run_beside


@dataclass(frozen=True)
class Model:
    """A random model of a family on a chip: changes to its configuration, and the format of its experts.

    `within`: how far most logits may be off where activations are rounded to a format too; elsewhere the model in bf16 says it.
    """

    family: str
    chip: str = "nvidia-h200"
    changes: dict = field(default_factory=dict)
    format: str = ""
    within: float = 0.0

    def check(self, folder, monkeypatch):
        """Assert that a prefill of rows of several lengths and cached steps agree with transformers."""
        monkeypatch.setattr(slots, "STEP", 4)  # caches are outgrown
        model = random_model(FAMILIES[self.family], **self.changes)
        if self.format:
            round_experts(model, format_of(self.format))
        options = {"kernels": "source", "buckets": "64"}
        quantize = f"experts={self.format},attention=none,head=none" if self.format else None
        artifact = moec.compile(model, target=self.chip, out=folder / "a", options=options, quantize=quantize)
        far = run_beside(model, self.family, artifact.session(threads=1), (6, 12, 5), 3)
        if self.within:
            assert np.median(np.concatenate(far[0])) <= self.within
        else:
            check_near(far)


def round_experts(model, format):
    """Give experts numbers that a format holds, so that storing them in it loses nothing."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "experts" in name and weight.dim() == 3:
                rows = weight.reshape(-1, weight.shape[-1])
                weight.copy_(format.decode(format.encode(rows), rows.shape[-1]).reshape(weight.shape))


ONE, TWO = {"num_hidden_layers": 1}, {"num_hidden_layers": 2}
MODELS = {
    "qwen3": Model("qwen3_moe", changes=ONE),
    "tied": Model("qwen3_moe", "ascend-950dt", {**ONE, "tie_word_embeddings": True}),
    "mxfp4": Model("qwen3_moe", "cambricon-mlu370", ONE, "mxfp4"),
    "fp8": Model("qwen3_moe", "amd-mi300x", {**ONE, "hidden_size": 128, "moe_intermediate_size": 128}, "fp8_g128", 0.1),
    "gpt_oss": Model("gpt_oss", "amd-mi355x", {**ONE, "layer_types": ["sliding_attention"]}),
    "deepseek": Model("deepseek_v3", changes={"kv_lora_rank": 32, "first_k_dense_replace": 0, **ONE}),
    "dots": Model("dots1", changes={"first_k_dense_replace": 0, **ONE}),
    "next": Model("qwen3_next", changes={"layer_types": ["linear_attention", "full_attention"], **TWO}),
    "lfm2": Model("lfm2_moe", "cambricon-mlu370", {"layer_types": ["conv", "full_attention"], **TWO}),
}
_DECLARED, _STORED = 'b.tensor("y", p.dtype, "B", p.heads, "S", p.width', 'return ["batch", "head", "token[:, None]"'
# name -> the model that shows it, and of functions of the product what is there and what stands there by mistake
FAULTS = {
    # a kernel stored the heads of q after the tokens, attention read them before these; the check of bindings did not exist
    "layout of q": ("qwen3", (
        (rope.qk_rope_append, (_DECLARED, 'b.tensor("y", p.dtype, "B", "S", p.heads, p.width'),
         (_STORED, 'return ["batch", "token[:, None]", "head"')),
        (bindings.check_op, ("not agrees_with_shape(value.type, tuple(a.shape))", "not a.shape")),
    )),
    "slot of a new token": ("qwen3", ((rope.qk_rope_append, ("(P + token)[:, None]", "token[:, None]")),)),
    "outgrown cache not copied": ("qwen3", ((slots.with_room, (".copy_(old)", "")),)),
    "sign of the rotation": ("qwen3", ((rope._add_rotation, ('else ("-", "+")', 'else ("+", "-")')),)),
    "norm of k by q's weight": ("qwen3", ((rope.qk_rope_append, ('source(p.heads), "k_norm"', 'source(p.heads), "q_norm"')),)),
    "token without itself": ("qwen3", ((attention._add_key_blocks, ("j[None, :] <= slot", "j[None, :] < slot")),)),
    "padding attended to": ("qwen3", ((attention._add_key_blocks, ('return f"({before}) & unmasked"', "return before")),)),
    "heads of another group": ("qwen3", (
        (attention._add_rows, ('"group * {each} + row % {each}"', '"row % {each} * {p.groups} + group"')),
    )),
    "powers of e as of two": ("qwen3", ((attend.Attend._weights, ("{s} * {self.scale * LOG2_E}", "{s} * {self.scale}")),)),
    "first pair of a tile alone": ("qwen3", ((experts._find_tile, ("(place < end)", "(place < begin + 1)")),)),
    "gate for up": ("qwen3", (
        (experts.grouped_up, ('{"gate": "n", "value": f"n + {e.inner}"}', '{"gate": f"n + {e.inner}", "value": "n"}')),
    )),
    "weights in the order of the experts": ("qwen3", ((experts.grouped_down, ('"gates", ["pair"]', '"gates", ["place"]')),)),
    "weights not normalised": ("dots", ((route._add_gates, ('if p.renorm != "none"', 'if p.renorm == "norm"')),)),
    "residual never added": ("qwen3", ((experts.combine_kernel, ("'total + cast({name}_tile", "'total + 0.0 * cast({name}_tile")),)),
    "residual added twice": ("qwen3", ((experts.combine_kernel, ("'total + cast({name}_tile", "'total + 2.0 * cast({name}_tile")),)),
    "rows of a tied embedding in fractals": ("tied", (
        (lowering._lower_embedding, ('editor.const(f"{table.name}{_TABLE}", narrow)', "_stored(editor, op, table)")),
        (choose.weight_layouts, ("fractal and plain and value.name not in looked_up", "fractal and plain")),
    )),
    # Triton multiplies heads of 16 numbers, which is less than what either chip multiplies or reads best
    "narrow heads refused on an H200": ("qwen3", ((search.search_tile, ("product((False, True), buffers)", "product((False,), buffers)")),)),
    "narrow heads refused on an MI355X": ("gpt_oss", (
        (search._no_matmul, ('(min(unit.k, LEAST_DEPTH) if profile.toolchain == "triton" else unit.k)', "unit.k")),
    )),
    "scale of the next group": ("mxfp4", (
        (Packing._scale, ("arange({groups})", "(arange({groups}) + 1) % {groups}")),
    )),
    "E4M3 of gfx942 at half": ("fp8", ((low_precision.multiply_codes, ("{each} * 4.0", "{each} * 2.0")),)),
    "E4M3 of gfx942 rounded as others'": ("fp8", ((low_precision.store_rows, ("({rounded} * 0.5,", "({rounded},")),)),
    "window of one more": ("gpt_oss", ((attention._add_key_blocks, ("first - {p.window - 1}", "first - {p.window}"), ("j[None, :] < {p.window}", "j[None, :] <= {p.window}")),)),
    "sinks left out": ("gpt_oss", ((attend.Attend.begin, ('full({self.tile.m}, 1.0, "f32")', 'full({self.tile.m}, 0.0, "f32")')),)),
    "interleaved gate for up": ("gpt_oss", (
        (experts.grouped_up, ('{"gate": "n * 2", "value": "n * 2 + 1"}', '{"gate": "n * 2 + 1", "value": "n * 2"}')),
    )),
    "up without its 1": ("gpt_oss", ((experts.activation_text, ("({u} + {act.beta})", "{u}")),)),
    "part with positions left out": ("deepseek", ((attention._attend_of_tile, ("keys = (*keys, *apart)", "pass")),)),
    "slot of a new latent": ("deepseek", ((latent.latent_append, ('"(P + token)[:, None]"', '"token[:, None]"')),)),
    "half of the keys for the values": ("deepseek", (
        (absorb_mla._absorbed_bindings, ("m.H, m.N, m.W, turned=False", "m.H, 0, m.N, turned=False")),
    )),
    "all groups chosen from": ("deepseek", ((route._add_group_mask, ("0, p.topk_groups, 1", "0, p.groups, 1")),)),
    "weights not scaled": ("dots", ((route._add_gates, ('else f"w * {p.scale}"', 'else "w"')),)),
    "state not carried": ("next", (
        (recurrent.linear_attention, ('"past", cell, "there"', '"past", cell, "there & (S > 1)"')),
    )),
    "nothing forgotten": ("next", ((recurrent._add_token_update, ("(u - sum(k_row * state, 1))", "u")),)),
    "window of a convolution shifted": ("lfm2", ((recurrent.window_conv, ("(s + {j - p.taps + 1})", "(s + {j - p.taps})")),)),
    "tokens of a convolution kept too early": ("lfm2", ((recurrent.window_conv, ("(S - {p.kept})", "(S - {p.kept + 1})")),)),
}  # fmt: skip
NOT_RUN = {  # what is raised before there are numbers
    "rows of a tied embedding in fractals": (RuntimeError, "'weight' must be 2-D"),
    "narrow heads refused on an H200": (MoecError, "no tile of .* fits nvidia-h200"),
    "narrow heads refused on an MI355X": (MoecError, "no tile of .* fits amd-mi355x"),
}
QUICK = ("layout of q", "slot of a new token", "gate for up")


def quick_first(names, quick):
    """Return names as parameters, those that are not quick marked long."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.long) for name in names]


@pytest.mark.parametrize("name", quick_first(MODELS, [FAULTS[fault][0] for fault in QUICK]))
def test_models_agree_without_a_fault(name, tmp_path, monkeypatch):
    MODELS[name].check(tmp_path, monkeypatch)


@pytest.mark.parametrize("fault", quick_first(FAULTS, QUICK))
def test_a_fault_is_seen(fault, tmp_path, monkeypatch):
    name, places = FAULTS[fault]
    for function, *changes in places:
        plant_fault(monkeypatch, function, *changes)
    error, said = NOT_RUN.get(fault, (AssertionError, None))
    with pytest.raises(error, match=said):
        MODELS[name].check(tmp_path, monkeypatch)
