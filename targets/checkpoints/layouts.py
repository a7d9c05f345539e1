"""The layouts that engines read codes in, one module's weight at a time: compressed-tensors, and GPTQ.

A layout gives the tensors of a module with a weight [rows, width] in a format, fills them from the format's parts, and says
in config.json how they are to be read. Both pack codes into words i32, the first code in the lowest bits, as parts have
them in bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...compiler.formats.format import Format, Parts
from ...compiler.formats.packing import pack_bits, unpack_bits
from ...compiler.formats.table import integers_of
from ...compiler.ir.module import Op
from .patterns import module_patterns

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]  # leaf -> dtype, shape
Modules = Mapping[str, Format | None]  # None: a linear that is not quantized
_WORD = 32
_READ_GROUPS = (32, 64, 128)
HOLDERS = ("core.linear", "nn.gated_mlp", "moe.experts")  # ops of stage moe whose weights are linear modules


@dataclass(frozen=True)
class Layout:
    """A layout: the tensors of a module in a format, how they are filled, and the quantization_config."""

    name: str
    tensors: Callable[[Format, int, int], Tensors]
    fill: Callable[[Parts, Format, int, int], Mapping[str, torch.Tensor]]
    config: Callable[[Modules], dict[str, Any]]
    forms: Callable[[Modules], Modules]  # the formats that modules are stored in, which hold the same codes
    refuses: Callable[[Op, Format], str | None]


def why_not_held(op: Op, format: Format, layout: Layout) -> str | None:
    """Return why an op of stage moe cannot have its weights in a format, None if it can."""
    if op.name == "nn.embedding":
        return "no engine looks rows up in codes of such a checkpoint"
    if op.name not in HOLDERS:
        return f"{op.name} is no linear module, and only these are stored as codes"
    return layout.refuses(op, format)


def why_slow(op: Op, format: Format) -> str | None:
    """Return why a format that an op holds should not be chosen, None if it may be."""
    if format.element == "int" and format.group not in _READ_GROUPS:
        return f"engines have kernels for groups of {', '.join(map(str, _READ_GROUPS))}, not of {format.group}"
    return None


def _words(packed: torch.Tensor) -> torch.Tensor:
    """Return bytes as words along the last axis."""
    return packed.contiguous().view(torch.int32)


def _linear_config(modules: Modules) -> tuple[dict[Format, list[str]], list[str]]:
    """Return patterns for the modules of each format, and for those that are not quantized."""
    patterns = module_patterns(modules)
    formats = sorted((f for f in patterns if f is not None), key=lambda f: f.name)
    return {format: patterns[format] for format in formats}, patterns.get(None, [])


# --- compressed-tensors ---------------------------------------------------------------------------------------------

_PACKED = {"int": "pack-quantized", "e2m1": "mxfp4-pack-quantized"}


def _compressed_refuses(op: Op, format: Format) -> str | None:
    if format.element == "int":
        if format.zeros and op.name == "moe.experts":
            return "engines read experts of compressed-tensors without zero points only"
        return None
    if format.name == "mxfp4":
        return None
    return f"compressed-tensors has no layout for {format.name}; it has integers of 2, 4 and 8 bits, and mxfp4"


def _compressed_tensors(format: Format, rows: int, width: int) -> Tensors:
    groups = width // format.group
    if format.element != "int":
        return {"weight_packed": ("u8", (rows, width // 2)), "weight_scale": ("u8", (rows, groups))}
    words = -(-width * format.bits // _WORD)
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight_packed": ("i32", (rows, words)), "weight_scale": ("f32", (rows, groups)), "weight_shape": ("i64", (2,)),
    }  # fmt: skip
    if format.zeros:
        found["weight_zero_point"] = ("i32", (-(-rows * format.bits // _WORD), groups))
    return found


def _fill_compressed(parts: Parts, format: Format, rows: int, width: int) -> Mapping[str, torch.Tensor]:
    if format.element != "int":
        return {"weight_packed": parts["codes"], "weight_scale": parts["scales"].view(torch.uint8)}
    found = {
        "weight_packed": _words(parts["codes"]), "weight_scale": parts["scales"].float(),
        "weight_shape": torch.tensor([rows, width]),
    }  # fmt: skip
    if format.zeros:  # packed along the rows
        found["weight_zero_point"] = _packed_columns(_zero_points(parts, format, width), format.bits).T.contiguous()
    return found


def _zero_points(parts: Parts, format: Format, width: int) -> torch.Tensor:
    """Return the zero points u8[groups, rows] of a module."""
    return unpack_bits(parts["zeros"], format.bits, width // format.group).T


def _packed_columns(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes packed along the last axis into whole words."""
    extra = -codes.shape[-1] % (_WORD // bits)
    return _words(pack_bits(torch.nn.functional.pad(codes, (0, extra)), bits))


def _compressed_config(modules: Modules) -> dict[str, Any]:
    formats, ignored = _linear_config(modules)
    routed = {f for name, f in modules.items() if is_expert(name)}
    groups = {
        f"group_{i}": {
            "targets": targets if format in routed else [_without_word(t) for t in targets], "format": _PACKED[format.element], "input_activations": None, "output_activations": None,
            "weights": {
                "num_bits": format.bits, "type": "int" if format.element == "int" else "float",
                "symmetric": not format.zeros, "strategy": "group", "group_size": format.group, "dynamic": False,
                **({} if format.element == "int" else {"scale_dtype": "torch.uint8"}),
            },
        }
        for i, (format, targets) in enumerate(sorted(formats.items(), key=lambda item: item[0] not in routed))
    }  # fmt: skip
    kinds = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": ignored,
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision", "config_groups": groups,
    }  # fmt: skip


def _without_word(target: str) -> str:
    """Return a pattern without the word by which transformers tells the group of routed experts (shared_experts has it)."""
    return target.replace("experts", "expert[s]")


def _common_forms(modules: Modules) -> Modules:
    """Return one format for all experts, and one for all other modules, where the bits of their codes are the same.

    transformers reads all modules of a kind by one group of the config: a scale is then written once for each of the
    smallest groups, and zero points are written where another module has some.
    """
    kinds: dict[bool, set[Format]] = {}
    for name, format in modules.items():
        if format is not None:
            kinds.setdefault(is_expert(name), set()).add(format)
    common = {kind: _common_format(formats) for kind, formats in kinds.items()}
    return {name: f and (common[is_expert(name)] or f) for name, f in modules.items()}


def _common_format(formats: set[Format]) -> Format | None:
    bits = {f.bits for f in formats}
    if len(bits) > 1 or any(f.element != "int" for f in formats):
        return None
    return integers_of(bits.pop(), math.gcd(*(f.group for f in formats)), any(f.zeros for f in formats))


def is_expert(module: str) -> bool:
    """Return whether a module is one of the experts that tokens are routed to, as transformers tells by the name."""
    return ".experts." in module


def with_form(parts: Parts, format: Format, form: Format, width: int) -> Parts:
    """Return parts in a format with smaller groups, or with zero points, that holds the same codes."""
    if form == format:
        return parts
    times, found = format.group // form.group, dict(parts)
    found["scales"] = parts["scales"].repeat_interleave(times, -1)
    if form.zeros:
        groups = width // format.group
        half = torch.full((len(parts["codes"]), groups), 1 << (format.bits - 1), dtype=torch.uint8)
        zeros = unpack_bits(parts["zeros"], format.bits, groups) if format.zeros else half
        found["zeros"] = pack_bits(zeros.repeat_interleave(times, -1), form.bits)
    return found


COMPRESSED = Layout(
    "compressed-tensors", _compressed_tensors, _fill_compressed, _compressed_config, _common_forms, _compressed_refuses
)

# --- GPTQ -----------------------------------------------------------------------------------------------------------


def _gptq_refuses(op: Op, format: Format) -> str | None:
    if format.element != "int":
        return f"GPTQ's layout has integers of 2, 4 and 8 bits, no {format.name}"
    return None


def _gptq_tensors(format: Format, rows: int, width: int) -> Tensors:
    groups = width // format.group
    return {
        "qweight": ("i32", (width * format.bits // _WORD, rows)),
        "qzeros": ("i32", (groups, -(-rows * format.bits // _WORD))),
        "scales": ("f16", (groups, rows)), "g_idx": ("i32", (width,)),
    }  # fmt: skip


def _fill_gptq(parts: Parts, format: Format, rows: int, width: int) -> Mapping[str, torch.Tensor]:
    """Fill GPTQ's first layout: codes packed along the columns, zero points along the rows and stored less one."""
    groups = width // format.group
    half = torch.full((groups, rows), 1 << (format.bits - 1), dtype=torch.uint8)
    zeros = _zero_points(parts, format, width) if format.zeros else half
    stored = (zeros - 1) & ((1 << format.bits) - 1)
    return {
        "qweight": _words(parts["codes"]).T.contiguous(), "qzeros": _packed_columns(stored.contiguous(), format.bits),
        "scales": parts["scales"].half().T.contiguous(),
        "g_idx": torch.from_numpy(np.arange(width, dtype=np.int32) // format.group),
    }  # fmt: skip


def _gptq_config(modules: Modules) -> dict[str, Any]:
    formats, ignored = _linear_config(modules)
    values = {f: {"bits": f.bits, "group_size": f.group, "sym": not f.zeros} for f in formats}
    common = max(values, key=lambda f: sum(own is f for own in modules.values()))
    dynamic: dict[str, dict[str, Any]] = {f"-:{_start_pattern(p)}": {} for p in ignored}
    dynamic |= {f"+:{_start_pattern(p)}": values[f] for f, own in formats.items() if f is not common for p in own}
    return {
        "quant_method": "gptq", "checkpoint_format": "gptq", "desc_act": False, **values[common],
        "lm_head": bool(modules.get("lm_head")), **({"dynamic": dynamic} if dynamic else {}),
    }  # fmt: skip


def _start_pattern(pattern: str) -> str:
    """Return a pattern as GPTQModel matches it: from the start of a name."""
    return pattern.removeprefix("re:")


GPTQ = Layout("gptq", _gptq_tensors, _fill_gptq, _gptq_config, lambda modules: modules, _gptq_refuses)
LAYOUTS: Mapping[str, Layout] = {layout.name: layout for layout in (COMPRESSED, GPTQ)}
