"""The tensors of a DeepSeek-V4 checkpoint: three dialects of names, and what they are stored in.

`official` is that of the released checkpoints, `saved` what transformers' save_pretrained writes, `memory` that of a
live model. A name is asked for in the official dialect. Checkpoints hold FP4 or FP8 experts, FP8 linears, their scales
as powers of two (E8M0) or f32, or plain floats; every weight is given out as f32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ...errors import MoecError
from ...ir.recipes import Recipe, Tensor, bind_recipe
from ...ir.types import TensorType, expand_range
from ...weights.joined import join_recipes
from ...weights.sources.checkpoint import names_like
from ...weights.steps.table import step
from ..stored.layouts import FLOATS, Stored, scaled_codes
from ..stored.schemes import Scheme, read_schemes
from ..stored.stored import fitting_recipe

FP4_GROUP = 32  # codes of a row that share a scale
EXTRA = "mtp."  # multi-token prediction: blocks behind the model that draft tokens

# official leaf -> leaf of a live model; `saved` has the official ones but for one norm
_MEMORY = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    **{f"hc_{part}_{leaf}": f"{part}_hc.{leaf}" for part in ("attn", "ffn") for leaf in ("fn", "base", "scale")},
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv.weight": "self_attn.kv_proj.weight",
    "attn.wo_a.weight": "self_attn.o_a_proj.weight",
    "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.attn_sink": "self_attn.sinks",
    "attn.compressor.wkv.weight": "self_attn.compressor.kv_proj.weight",
    "attn.compressor.wgate.weight": "self_attn.compressor.gate_proj.weight",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.compressor.norm.weight": "self_attn.compressor.kv_norm.weight",
    "attn.indexer.wq_b.weight": "self_attn.compressor.indexer.q_b_proj.weight",
    "attn.indexer.weights_proj.weight": "self_attn.compressor.indexer.scorer.weights_proj.weight",
    "attn.indexer.compressor.wkv.weight": "self_attn.compressor.indexer.kv_proj.weight",
    "attn.indexer.compressor.wgate.weight": "self_attn.compressor.indexer.gate_proj.weight",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
    "attn.indexer.compressor.norm.weight": "self_attn.compressor.indexer.kv_norm.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
}
_SAVED = {"attn.kv_norm.weight": "attn.norm.weight"}
# names outside of the layers: (saved, memory)
_AROUND = {
    "embed.weight": ("model.embed_tokens.weight",) * 2,
    "head.weight": ("head.weight", "lm_head.weight"),
    "norm.weight": ("model.norm.weight",) * 2,
    **{f"hc_head_{leaf}": (f"model.hc_head.hc_{leaf}",) * 2 for leaf in ("fn", "base", "scale")},
}
# what the released checkpoints store in FP8 blocks; the experts too, or in FP4
_BLOCKS = (
    "attn.wq_a.", "attn.wq_b.", "attn.wkv.", "attn.wo_a.", "attn.wo_b.", "attn.indexer.wq_b.", "ffn.shared_experts.",
    "e_proj.", "h_proj.",
)  # fmt: skip
_FLOATS = ("hc_", "attn.attn_sink", "ffn.gate.bias")  # f32 whatever the rest is; so is every `ape`


@dataclass(frozen=True)
class Weights:
    """Where weights are found. `types` are the checkpoint's tensors; None if there is only a config.json.

    `quantization` is the config's quantization_config, `dtype` what a tensor that is not quantized is stored in.
    """

    types: Mapping[str, TensorType] | None
    quantization: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "bf16"

    @cached_property
    def dialect(self) -> str:
        """`official`, `saved` or `memory`: what most names are, since any single tensor may be the one that is missing."""
        if self.types is None:
            return "official"
        inside = sum(name.startswith("model.") for name in self.types)
        if len(self.types) > 2 * inside:
            return "official"
        return (
            "memory" if 2 * sum(".self_attn." in name or ".mlp." in name for name in self.types) > inside else "saved"
        )

    @property
    def prefix(self) -> str:
        """What stands before the name of a layer's tensor."""
        return "layers.{layer}." if self.dialect == "official" else "model.layers.{layer}."

    def of_drafting(self) -> Weights:
        """Return where the weights of multi-token prediction are found: ModelOpt leaves them as they are released."""
        rewritten = ("quant_algo", "moe_quant_algo", "quantized_layers")
        return replace(self, quantization={k: v for k, v in self.quantization.items() if k not in rewritten})

    def top_level_weight(self, name: str, *sizes: int) -> Recipe:
        """Return a weight outside of the layers."""
        other = _AROUND[name]
        own = {"official": name, "saved": other[0], "memory": other[1]}[self.dialect]
        return self._stored_recipe("", own, name, sizes)

    def layer_weight(self, layer: int, name: str, *sizes: int) -> Recipe:
        """Return a weight of a layer, its name relative to `prefix`."""
        own = {"official": {}, "saved": _SAVED, "memory": _MEMORY}[self.dialect].get(name, name)
        return self._stored_recipe(self.prefix.replace("{layer}", str(layer)), own, name, sizes)

    def expert_weights(self, layer: int, count: int, width: int, inner: int) -> tuple[Recipe, Recipe]:
        """Return (up [count, 2 inner, width], gate rows first; down [count, width, inner]) of the routed experts."""
        if self.dialect == "memory":
            place = self.prefix.replace("{layer}", str(layer))
            sizes = {"gate_up_proj": (count, 2 * inner, width), "down_proj": (count, width, inner)}
            up, down = (self._stored_recipe(place, f"mlp.experts.{own}", own, s) for own, s in sizes.items())
            return up, down
        shapes = {"w1": (inner, width), "w3": (inner, width), "w2": (width, inner)}
        gate, up, down = (
            join_recipes(
                "stack",
                [
                    self.layer_weight(layer, f"ffn.experts.{each}.{w}.weight", *sizes)
                    for each in self._expert_ranges(layer, count)
                ],
            )
            for w, sizes in shapes.items()
        )
        return step("concat", gate, up, axis=1), down

    def _expert_ranges(self, layer: int, count: int) -> list[str]:
        """Return the numbers of the experts: one range if all are stored alike."""
        if self.types is None:
            return [f"{{0..{count - 1}}}"]
        place = f"{self.prefix.replace('{layer}', str(layer))}ffn.experts."
        kinds: dict[int, set[tuple[str, TensorType]]] = {expert: set() for expert in range(count)}
        for name, type_ in self.types.items():
            number, _, leaf = name.removeprefix(place).partition(".") if name.startswith(place) else ("", "", "")
            if number.isdigit() and int(number) in kinds:
                kinds[int(number)].add((leaf, type_))
        if all(kind == kinds[0] for kind in kinds.values()):
            return [f"{{0..{count - 1}}}"]
        return [str(expert) for expert in kinds]

    def stored_as(self) -> Callable[[int], Hashable]:
        """Return a function that says how the tensors of a layer are stored: layers stored alike get the same answer."""
        start = self.prefix.removesuffix("{layer}.")
        found: dict[str, list[tuple[str, TensorType]]] = {}
        for name, type_ in (self.types or {}).items():
            if name.startswith(start):
                number, _, rest = name[len(start) :].partition(".")
                found.setdefault(number, []).append((rest, type_))
        kinds = {number: tuple(sorted(own, key=lambda item: item[0])) for number, own in found.items()}
        return lambda layer: kinds.get(str(layer))

    def parameter_recipes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Recipe]:
        """Return the parameters of a live model by name, from their shapes; the names in the recipes are absolute."""
        around = {memory: official for official, (_, memory) in _AROUND.items()}
        leaves = {memory: official for official, memory in _MEMORY.items()}
        found = {}
        for name, shape in shapes.items():
            if name in around:
                found[name] = self.top_level_weight(around[name], *shape)
                continue
            number, leaf = name.removeprefix("model.layers.").split(".", 1)
            if leaf.startswith("mlp.experts."):
                count, width, inner = shapes[name.replace("gate_up_proj", "down_proj")]
                made = self.expert_weights(int(number), count, width, inner)["gate_up" not in leaf]
            else:
                made = self.layer_weight(int(number), leaves[leaf], *shape)
            found[name] = bind_recipe(made, self.prefix, {"layer": number})
        return found

    def _stored_recipe(self, prefix: str, own: str, name: str, sizes: tuple[int, ...]) -> Recipe:
        """Return a weight as f32 (integers stay integers); `name` is what the official dialect calls it."""
        stored = self._stored_type(prefix + own, name, sizes)
        packed = stored.dtype in ("i8", "u8")
        shape = (*stored.sizes[:-1], 2 * stored.sizes[-1]) if packed else stored.sizes
        integers = name.endswith("tid2eid")
        codes = packed or stored.dtype in ("f8e4m3", "f8e5m2")
        wanted = "" if shape != sizes else "integers of " if integers else "floats or codes of "
        if wanted == "" or (not codes and (stored.dtype in FLOATS) == integers):
            raise MoecError(
                f"the tensor {_first_of_range(prefix + own)} is {stored}, {wanted}{list(sizes)} is wanted",
                todo="config.json and the weights do not belong together",
            )
        if codes and not integers:
            return self._dequantized_codes(prefix, own, stored)
        return Tensor(own, stored) if stored.dtype in ("f32", "i64") else step("cast", Tensor(own, stored), to="f32")

    def _dequantized_codes(self, prefix: str, own: str, codes: TensorType) -> Recipe:
        """Return what codes stand for with the scales beside them."""
        module = own.removesuffix(".weight")
        named = {
            "scale": f"{module}.scale",
            "weight_scale_inv": f"{own}_scale_inv",
            "weight_scale": f"{own}_scale",
            "weight_scale_2": f"{own}_scale_2",
        }
        if self.types is None:
            scales = self._expected_scales(prefix + module, codes)
        else:
            found = {role: self.types.get(_first_of_range(prefix + full)) for role, full in named.items()}
            scales = {role: type_ for role, type_ in found.items() if type_ is not None}
        if not scales:
            raise _missing_tensor(_first_of_range(prefix + named["scale"]), self.types or ())
        parts = {"weight": Tensor(own, codes), **{role: Tensor(named[role], type_) for role, type_ in scales.items()}}
        try:
            return fitting_recipe(
                scaled_codes, Stored(parts, _refuse_reading), self._schemes_of_module(prefix + module)
            )
        except ValueError as error:
            raise MoecError(
                f"{_first_of_range(prefix + own)} is not understood: {str(error).replace(module, _first_of_range(prefix + module))}",
                where=_first_of_range(prefix + next(iter(parts[role].name for role in scales))),
                todo="config.json and the weights do not belong together",
            ) from None

    def _schemes_of_module(self, module: str) -> tuple[Scheme, ...]:
        if not self.quantization.get("weight_block_size"):
            raise MoecError("the checkpoint holds FP8 codes, but config.json names no weight_block_size")
        return read_schemes({"quant_method": "fp8", **self.quantization})(_first_of_range(module))

    def _expected_scales(self, module: str, codes: TensorType) -> dict[str, TensorType]:
        """Return the scales that a checkpoint would hold, from its config alone: ModelOpt's for FP4 in groups of 16, else DeepSeek's."""
        schemes = self._schemes_of_module(module)
        *outer, rows, width = codes.sizes
        if codes.dtype != "f8e4m3":
            if (rewritten := next((s for s in schemes if s.scale == "e4m3" and s.block), None)) is not None:
                assert rewritten.block is not None
                groups = TensorType.of("f8e4m3", *outer, rows, 2 * width // rewritten.block[1])
                return {"weight_scale": groups, "weight_scale_2": TensorType.of("f32")}
            return {"scale": TensorType.of("f8e8m0", *outer, rows, 2 * width // FP4_GROUP)}
        high, wide = schemes[0].block or (1, 1)
        powers = self.quantization.get("scale_fmt") == "ue8m0"
        counts = (*outer, math.ceil(rows / high), math.ceil(width / wide))
        return {"scale": TensorType.of("f8e8m0" if powers else "f32", *counts)}

    def _stored_type(self, full: str, name: str, sizes: tuple[int, ...]) -> TensorType:
        if self.types is not None:
            return self._tensor_type(full)
        if name.endswith("tid2eid"):
            return TensorType.of("i64", *sizes)
        if name.startswith(_FLOATS) or name.endswith(".ape"):
            return TensorType.of("f32", *sizes)
        expert = name.startswith("ffn.experts.")
        q = self.quantization
        if q and expert and (q.get("expert_dtype") == "fp4" or q.get("moe_quant_algo") == "NVFP4"):
            return TensorType.of("i8", *sizes[:-1], sizes[-1] // 2)
        blocks = self.quantization and (expert or name.startswith(_BLOCKS)) and name.endswith(".weight")
        return TensorType.of("f8e4m3" if blocks else self.dtype, *sizes)

    def _tensor_type(self, full: str) -> TensorType:
        assert self.types is not None
        name = _first_of_range(full)
        if name not in self.types:
            raise _missing_tensor(name, self.types)
        return self.types[name]


def _missing_tensor(name: str, names: Iterable[str]) -> MoecError:
    return MoecError(f"the checkpoint has no tensor {name}", todo=names_like(name, names))


def _refuse_reading(name: str) -> Any:
    raise ValueError(f"{name} would have to be read")


def _first_of_range(name: str) -> str:
    return expand_range(name)[0]
