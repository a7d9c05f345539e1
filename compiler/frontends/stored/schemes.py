"""How a quantization_config says that weights are stored: numbers, bits, what shares a scale, zero points.

One method has one reader here. A config speaks of modules by names and patterns of its own, so that a module can have
several candidates; the tensors then choose (see layouts.py), and none or two that fit are an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

Block = tuple[int, int]
WHOLE_ROW, WHOLE_TENSOR = (1, 0), (0, 0)
# what stands before the layers of the model that writes text, in checkpoints and in configs that name modules
_TEXT_PREFIXES = {"model", "language_model", "text_model", "thinker"}


@dataclass(frozen=True)
class Scheme:
    """How the weight of a module is stored.

    `block` is the rows and columns that share a scale; 0 stands for the whole axis, None for a config that does not say
    (then one scale for the tensor or one a row). `scale` is float, e4m3 (with a scale of the tensor) or e8m0.
    """

    kind: str  # int, float
    bits: int
    block: Block | None = None
    scale: str = "float"
    symmetric: bool | None = None  # None: not said
    layout: str = ""  # gptq, awq: how `qweight` is to be read; empty for everything else
    zeros_less_one: bool = True  # GPTQ: 15 stands for a zero point of 0
    in_order: bool = True  # False: scales belong to the inputs that g_idx names
    floats: str = "f8e4m3"  # the dtype of floats of 8 bits


MXFP4, MXFP8 = Scheme("float", 4, (1, 32), "e8m0"), Scheme("float", 8, (1, 32), "e8m0")
# of ModelOpt, by quant_algo
_ALGORITHMS = {
    "FP8": Scheme("float", 8, WHOLE_TENSOR),
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme("float", 8, WHOLE_ROW),
    "FP8_PB_WO": Scheme("float", 8, (128, 128)),
    "NVFP4": Scheme("float", 4, (1, 16), "e4m3"),
    "W4A16_NVFP4": Scheme("float", 4, (1, 16), "e4m3"),
    "W4A8_NVFP4_FP8": Scheme("float", 4, (1, 16), "e4m3"),
    "MXFP4": MXFP4,
    "W4A8_MXFP4_FP8": MXFP4,
    "MXFP8": MXFP8,
}


_FLOATS = {"e4m3": "f8e4m3", "float8_e4m3fn": "f8e4m3", "e5m2": "f8e5m2", "float8_e5m2": "f8e5m2"}

SchemesOf = Callable[[str], tuple[Scheme, ...]]


class Unquantized(Exception):
    """The config says of a module that it is not quantized."""


def read_schemes(config: Mapping[str, Any]) -> SchemesOf:
    """Return a function from a module's name to how its weight may be stored, by what `read_quantization` gave.

    ValueError, of this or of the function, says which value of the config is not understood; the function raises
    `Unquantized` where the config leaves a module out.
    """
    return _READERS[config["quant_method"]](config)


# --- values ------------------------------------------------------------------------------------------------------


def whole_number(config: Mapping[str, Any], *keys: str, default: int | None = None, least: int = 1) -> int:
    """Return the integer under the first of the keys that is there; ValueError for a missing or another value."""
    key, value = next(((k, config[k]) for k in keys if config.get(k) is not None), (keys[0], default))
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        what = "is missing" if value is None else f"cannot be {value!r}"
        raise ValueError(f"{key} in quantization_config {what}")
    return value


def _group_block(config: Mapping[str, Any], *keys: str) -> Block:
    size = whole_number(config, *keys, least=-1)
    if size == 0:
        raise ValueError(f"{keys[0]} in quantization_config cannot be 0")
    return (1, max(size, 0))


def _optional_flag(config: Mapping[str, Any], key: str) -> bool | None:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{key} in quantization_config cannot be {value!r}")
    return value


def _checked_block(value: Any, key: str) -> Block:
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(type(n) is int and n > 0 for n in value):
        raise ValueError(f"{key} in quantization_config cannot be {value!r}")
    return value[0], value[1]


# --- names -------------------------------------------------------------------------------------------------------


def text_name(module: str) -> str:
    """Return a module's name without what stands before the layers: configs and checkpoints differ in it."""
    parts = module.split(".")
    while len(parts) > 1 and parts[0] in _TEXT_PREFIXES:
        parts = parts[1:]
    return ".".join(parts)


def matches_module(pattern: str, module: str) -> bool:
    """Return whether a name or a pattern with `*` names a module or one that the module lies in."""
    own, wanted = text_name(module), text_name(pattern)
    if "*" in wanted:
        return fnmatchcase(own, wanted) or fnmatchcase(own, f"{wanted}.*")
    return own == wanted or own.startswith(f"{wanted}.")


@lru_cache(maxsize=4096)
def _compiled_pattern(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"the pattern {pattern!r} in quantization_config is not a regular expression: {error}"
        ) from None


def _is_regex_match(pattern: str, module: str) -> bool:
    return any(_compiled_pattern(pattern).match(name) for name in (module, text_name(module)))


# --- methods -----------------------------------------------------------------------------------------------------


def _same_schemes(*schemes: Scheme) -> SchemesOf:
    found = tuple(dict.fromkeys(schemes))
    return lambda module: found


def _fp8_schemes(config: Mapping[str, Any]) -> SchemesOf:
    block = config.get("weight_block_size")
    floats = _FLOATS.get(str(config.get("fmt") or "e4m3").lower())
    if floats is None:
        raise ValueError(f"fmt in quantization_config cannot be {config['fmt']!r}, it is e4m3 or e5m2")
    own = Scheme("float", 8, _checked_block(block, "weight_block_size") if block else None, floats=floats)
    # DeepSeek V4 keeps experts in FP4 beside linears in FP8 blocks; where ModelOpt rewrote them, the method's name stays
    if config.get("moe_quant_algo"):
        return _same_schemes(own, MXFP4, *_algorithm_schemes({**config, "quant_algo": config["moe_quant_algo"]}))
    more = _modelopt_schemes(config) if "quant_algo" in config else _same_schemes()
    return lambda module: tuple(dict.fromkeys((own, MXFP4, *more(module))))


def _modelopt_schemes(config: Mapping[str, Any]) -> SchemesOf:
    """Read ModelOpt's quant_algo. A mixed config names the algorithm of each module, or of what it lies in."""
    if config.get("quant_algo") != "MIXED_PRECISION":
        return _same_schemes(*_algorithm_schemes(config))
    layers = config.get("quantized_layers")
    if not isinstance(layers, Mapping) or not all(isinstance(entry, Mapping) for entry in layers.values()):
        raise ValueError("quantized_layers in quantization_config is missing or not a table")
    named = {text_name(name): _algorithm_schemes(entry) for name, entry in layers.items()}
    patterns = {name: schemes for name, schemes in named.items() if "*" in name}
    every = tuple(dict.fromkeys(scheme for schemes in named.values() for scheme in schemes))

    def of(module: str) -> tuple[Scheme, ...]:
        for name in _enclosing_modules(text_name(module)):
            if name in named:
                return named[name]
        return next((schemes for pattern, schemes in patterns.items() if matches_module(pattern, module)), every)

    return of


def _enclosing_modules(module: str) -> list[str]:
    """Return a module's name and the names of the modules that it lies in, from the inside out."""
    parts = module.split(".")
    return [".".join(parts[:i]) for i in range(len(parts), 0, -1)]


def _algorithm_schemes(entry: Mapping[str, Any]) -> tuple[Scheme, ...]:
    algorithm = entry.get("quant_algo")
    if algorithm is None:  # a config that says nothing of itself: what the tensors can only be
        return (_ALGORITHMS["FP8"], _with_group(_ALGORITHMS["NVFP4"], entry))
    if algorithm not in _ALGORITHMS:
        raise ValueError(f"quant_algo {algorithm!r} is not understood; {', '.join(_ALGORITHMS)} are")
    return (_with_group(_ALGORITHMS[algorithm], entry),)


def _with_group(scheme: Scheme, entry: Mapping[str, Any]) -> Scheme:
    """Return a scheme with the group size of a config; schemes whose scales belong to something else have none."""
    if entry.get("group_size") is None or scheme.scale == "float":
        return scheme
    return replace(scheme, block=_group_block(entry, "group_size"))


def _compressed_tensors_schemes(config: Mapping[str, Any]) -> SchemesOf:
    """Read config_groups of compressed-tensors: the group whose targets name a module best, else all of them.

    Targets are names, then regular expressions, then classes of modules.
    """
    groups = [g for g in (config.get("config_groups") or {}).values() if g.get("weights")]
    if not groups:
        raise ValueError("config_groups in quantization_config names no weights")
    names: dict[str, list[Scheme]] = {}
    patterns: list[tuple[str, Scheme]] = []
    classes: list[Scheme] = []
    for group in groups:
        scheme = _compressed_weights(group, config)
        for target in group.get("targets") or ():
            if not isinstance(target, str):
                raise ValueError(f"targets in quantization_config cannot hold {target!r}")
            if target.startswith("re:"):
                patterns.append((target[3:], scheme))
            elif target[:1].isupper() and "." not in target:
                classes.append(scheme)
            else:
                names.setdefault(text_name(target), []).append(scheme)
    every = [_compressed_weights(group, config) for group in groups]

    def of(module: str) -> tuple[Scheme, ...]:
        named = names.get(text_name(module))
        found = named or [s for pattern, s in patterns if _is_regex_match(pattern, module)] or classes or every
        return tuple(dict.fromkeys(found))

    return of


def _compressed_weights(group: Mapping[str, Any], config: Mapping[str, Any]) -> Scheme:
    weights = group["weights"]
    if not isinstance(weights, Mapping):
        raise ValueError(f"weights in config_groups cannot be {weights!r:.80}")
    format = str(group.get("format") or config.get("format") or "")
    fixed = {"mxfp4-pack-quantized": MXFP4, "nvfp4-pack-quantized": _ALGORITHMS["NVFP4"], "mxfp8-quantized": MXFP8}
    if format in fixed:
        return _with_group(fixed[format], weights)
    bits = whole_number(weights, "num_bits", default=8)
    kind = str(weights.get("type") or ("float" if format.startswith("float") else "int")).lower()
    if kind not in ("int", "float") or bits > 8:
        raise ValueError(f"weights of type {kind!r} with {bits} bits are not understood")
    ordered = weights.get("actorder") in ("group", "dynamic", True)
    return Scheme(
        kind, bits, _strategy_block(weights), "float", _optional_flag(weights, "symmetric"), in_order=not ordered
    )


def _strategy_block(weights: Mapping[str, Any]) -> Block | None:
    """Return what shares a scale by the strategy of compressed-tensors, or by what implies one."""
    strategy, structure = weights.get("strategy"), weights.get("block_structure")
    if strategy == "block" or (strategy is None and structure is not None):
        if isinstance(structure, str):
            structure = [int(n) if n.isdigit() else 0 for n in structure.split("x")]
        return _checked_block(structure, "block_structure")
    if strategy in ("group", "tensor_group") or (strategy is None and weights.get("group_size") is not None):
        return _group_block(weights, "group_size")
    if strategy not in (None, "channel", "tensor"):
        raise ValueError(f"strategy {strategy!r} of weights is not understood")
    return {None: None, "channel": WHOLE_ROW, "tensor": WHOLE_TENSOR}[strategy]


def _gptq_schemes(config: Mapping[str, Any]) -> SchemesOf:
    dynamic = config.get("dynamic")
    if dynamic is not None and not isinstance(dynamic, Mapping):
        raise ValueError(f"dynamic in quantization_config cannot be {dynamic!r:.80}")
    own = lru_cache(maxsize=None)(lambda values: _gptq_scheme({**config, **dict(values)}))

    def of(module: str) -> tuple[Scheme, ...]:
        values = _dynamic_values(dynamic, module) if dynamic else {}
        return (own(tuple((key, values[key]) for key in ("bits", "group_size", "sym", "desc_act") if key in values)),)

    return of


def gptq_format(config: Mapping[str, Any]) -> str:
    """Return the version of GPTQ's layout: tools write it as `checkpoint_format` or as `format`, or not at all."""
    found = {str(config[key]).lower() for key in ("checkpoint_format", "format") if config.get(key)}
    return " and ".join(sorted(found)) or "gptq"


def _gptq_scheme(config: Mapping[str, Any]) -> Scheme:
    format = gptq_format(config)
    return _integer_scheme(
        config, "gptq", _optional_flag(config, "sym"), format == "gptq", not _optional_flag(config, "desc_act")
    )


def _integer_scheme(
    config: Mapping[str, Any], layout: str, symmetric: bool | None, less_one: bool = True, in_order: bool = True
) -> Scheme:
    bits, group = whole_number(config, "bits", "w_bit"), _group_block(config, "group_size", "q_group_size")
    return Scheme("int", bits, group, "float", symmetric, layout, less_one, in_order)


def _dynamic_values(patterns: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """Return what GPTQModel's `dynamic` says of a module: the first pattern that matches from the start of its name.

    `-:` stands before a pattern of modules that stay unquantized, `+:` or nothing before one whose values are others.
    """
    for pattern, values in patterns.items():
        if not _compiled_pattern(pattern.removeprefix("-:").removeprefix("+:")).match(module):
            continue
        if pattern.startswith("-:"):
            raise Unquantized(f"the pattern {pattern!r} of `dynamic`")
        if not isinstance(values, Mapping):
            raise ValueError(f"dynamic[{pattern!r}] in quantization_config cannot be {values!r:.80}")
        return values
    return {}


def _awq_schemes(config: Mapping[str, Any]) -> SchemesOf:
    points = _optional_flag(config, "zero_point")
    given = config if "w_bit" in config else {"bits": 4, **config}
    return _same_schemes(_integer_scheme(given, "awq", None if points is None else not points))


def _auto_round(config: Mapping[str, Any]) -> SchemesOf:
    """Read AutoRound's config: GPTQ's layout with its zero points (auto_round:auto_gptq) or as they are, or AWQ's.

    `extra_config` has other values for modules, by name or by pattern; 16 bits are a module that is not quantized.
    """
    layout, less_one = _autoround_packing(config)
    extra = config.get("extra_config") or {}
    if not isinstance(extra, Mapping) or not all(isinstance(values, Mapping) for values in extra.values()):
        raise ValueError("extra_config in quantization_config is not a table of tables")
    named = {text_name(name): values for name, values in extra.items()}
    patterns = {name: values for name, values in extra.items() if not re.fullmatch(r"[\w.-]+", name)}

    def of(module: str) -> tuple[Scheme, ...]:
        own = dict(config)
        for pattern, values in patterns.items():
            own |= values if _compiled_pattern(pattern).search(module) else {}
        own |= named.get(text_name(module), {})
        if whole_number(own, "bits") >= 16:
            raise Unquantized("`extra_config`, which gives it 16 bits")
        if str(own.get("data_type") or "int") != "int":
            raise ValueError(f"data_type {own['data_type']!r} is not understood; int is")
        return (_integer_scheme(own, layout, _optional_flag(own, "sym"), less_one),)

    return of


def _autoround_packing(config: Mapping[str, Any]) -> tuple[str, bool]:
    """Return the layout of AutoRound's codes and whether zero points are stored less one, as the packing format says.

    Older configs say it as the backend; without either codes are packed as GPTQ's.
    """
    packing = config.get("packing_format") or config.get("backend") or "auto"
    words = set(str(packing).split(":"))
    rest = words - {"auto_round", "exllamav2", "triton", "tritonv2", "marlin"}
    if rest and rest <= {"awq", "auto_awq", "gemm"}:
        return "awq", False
    if rest and rest <= {"gptq", "auto_gptq", "auto"}:
        return "gptq", True
    if rest <= {"gptqmodel"}:
        return "gptq", False
    raise ValueError(
        f"packing_format {packing!r} is not understood; auto_round, auto_round:auto_gptq and :auto_awq are"
    )


_READERS: Mapping[str, Callable[[Mapping[str, Any]], SchemesOf]] = {
    "fp8": _fp8_schemes,
    "mxfp4": lambda config: _same_schemes(MXFP4),
    "mxfp8": lambda config: _same_schemes(MXFP8),
    "modelopt": _modelopt_schemes,
    "compressed-tensors": _compressed_tensors_schemes,
    "gptq": _gptq_schemes,
    "awq": _awq_schemes,
    "auto-round": _auto_round,
}
METHODS = tuple(_READERS)
