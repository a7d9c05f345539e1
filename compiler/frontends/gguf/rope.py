"""Rotary embeddings as a GGUF file says them: the keys under `rope.`, and the tensor `rope_freqs.weight`.

llama.cpp divides the angle of each pair by `rope_freqs`, then scales as `rope.scaling.type` says; a scaling without a
type is linear. Here both become `rope_parameters` of transformers, or an error that names the key or the tensor.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...errors import MoecError
from ...weights.sources.gguf import Gguf
from .metadata import Keys

FREQUENCIES = "rope_freqs.weight"
_PRECISION = 1e-5  # relative: the factors are f32, and were computed in f32
_LENGTH = 8192  # what llama3 scaling starts from; only its ratios to the two factors matter
_AS_CONFIG = "put a config.json with rope_parameters beside the file, or give the safetensors checkpoint"


def rope_parameters(keys: Keys, opened: Gguf, head: int, context: int) -> dict[str, Any]:
    """Return rope_parameters of transformers for heads of `head` channels; MoecError where there are none."""
    theta = keys.real("rope.freq_base", 10000.0)
    assert theta is not None
    for key in ("rope.dimension_count", "attention.value_length"):
        value = keys.count(key, default=head)
        keys.check(value == head, key, f"is {value}, and heads have {head} channels: that is not supported")
    scaling = _rope_scaling(keys, context)
    factors = read_factors(opened, head)
    if factors is not None:
        if scaling["rope_type"] != "default":
            raise _no_factors(keys, f"stands beside rope.scaling.type {scaling['rope_type']!r}")
        scaling = _of_factors(keys, factors, theta)
    return {**scaling, "rope_theta": theta}


def _rope_scaling(keys: Keys, context: int) -> dict[str, Any]:
    """Return what the keys under rope.scaling say."""
    kind = keys.text("rope.scaling.type", "linear")
    old = "rope.scaling.factor" not in keys and "rope.scale_linear" in keys
    factor = keys.real("rope.scale_linear" if old else "rope.scaling.factor")
    length = keys.count("rope.scaling.original_context_length", default=context)
    attention = keys.real("rope.scaling.attn_factor", 1.0)
    fast, slow = keys.real("rope.scaling.yarn_beta_fast", 32.0), keys.real("rope.scaling.yarn_beta_slow", 1.0)
    if kind not in ("none", "linear", "yarn"):
        raise keys.error("rope.scaling.type", f"is {kind!r}, which is not supported", todo=_AS_CONFIG)
    if kind != "yarn":
        keys.check(attention == 1, "rope.scaling.attn_factor", f"is {attention}: that is supported with yarn only")
        stretched = kind == "linear" and factor not in (None, 1.0)
        return {"rope_type": "linear", "factor": factor} if stretched else {"rope_type": "default"}
    if factor is None or attention is None:
        raise keys.error("rope.scaling.type", "is yarn, but there is no rope.scaling.factor", todo=_AS_CONFIG)
    if "rope.scaling.yarn_attn_factor" in keys:
        # converters write transformers' attention_factor there, and llama.cpp puts its own in place of it
        raise keys.error("rope.scaling.yarn_attn_factor", "is not understood", todo=_AS_CONFIG)
    extrapolation = keys.real("rope.scaling.yarn_ext_factor", 1.0)
    keys.check(extrapolation == 1, "rope.scaling.yarn_ext_factor", f"is {extrapolation}: only 1 is supported")
    own = 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1
    return {
        "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length, "beta_fast": fast,
        "beta_slow": slow, "attention_factor": own * attention,
    }  # fmt: skip


def read_factors(opened: Gguf, head: int) -> np.ndarray | None:
    """Return what each pair's frequency is divided by; None where that is 1 everywhere."""
    info = opened.checkpoint.tensors.get(FREQUENCIES)
    if info is None:
        return None
    where = str(info.file)
    if FREQUENCIES in opened.kinds or info.type.dtype not in ("f32", "f16", "bf16", "f64"):
        raise MoecError(f"{FREQUENCIES} has no plain numbers", where=where, todo=_AS_CONFIG)
    if info.type.sizes != (head // 2,):
        raise MoecError(
            f"{FREQUENCIES} has the shape {list(info.type.sizes)}; heads of {head} channels have {head // 2} pairs",
            where=where,
        )
    factors = opened.checkpoint.read(FREQUENCIES).double().numpy()
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise MoecError(f"{FREQUENCIES} has numbers that are not finite and above 0", where=where)
    return None if (factors == 1).all() else factors


def check_config(keys: Keys, opened: Gguf, config: Any) -> None:
    """Raise MoecError where a config.json beside the file has other frequencies than the file's factors make."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if FREQUENCIES not in opened.checkpoint.tensors:
        return
    factors = read_factors(opened, head)
    told = _frequencies_of(config)
    theta = config.rope_parameters["rope_theta"]
    wanted = _default_frequencies(theta, head // 2) / (1 if factors is None else factors)
    if not np.allclose(told, wanted, rtol=_PRECISION, atol=0):
        raise MoecError(
            f"{FREQUENCIES} and the rope_parameters of config.json make different frequencies",
            where=str(keys.file.parent / "config.json"),
            todo="remove it, or bring those that belong together",
        )


def _frequencies_of(config: Any) -> np.ndarray:
    """Return the frequencies that transformers computes for a config."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return _default_frequencies(config.rope_parameters["rope_theta"], head // 2)
    return np.asarray(ROPE_INIT_FUNCTIONS[kind](config, "cpu")[0], np.float64)


def _default_frequencies(theta: float, pairs: int) -> np.ndarray:
    return np.asarray(theta ** -(np.arange(pairs) / pairs), np.float64)


def _of_factors(keys: Keys, factors: np.ndarray, theta: float) -> dict[str, Any]:
    """Return the scaling that factors mean: linear where they are equal, otherwise llama3's."""
    largest = float(factors.max())
    if np.ptp(factors) <= _PRECISION * largest:
        return {"rope_type": "linear", "factor": largest}
    found = _fit_llama3_scaling(factors, _default_frequencies(theta, len(factors)))
    if found is None:
        raise _no_factors(keys, "holds no frequencies of llama3 scaling")
    return found


def _fit_llama3_scaling(factors: np.ndarray, frequencies: np.ndarray) -> dict[str, Any] | None:
    """Return the parameters of llama3 scaling that make these factors; None if there are none.

    There, short waves keep their frequency and long ones are divided by `factor`; in between the share `s` of a kept
    frequency, 1 / factors = (1 - s) / factor + s, is linear in the frequency.
    """
    largest = float(factors.max())
    shares = (1 / factors - 1 / largest) / (1 - 1 / largest) if largest > 1 else np.full_like(factors, np.nan)
    between = (shares > _PRECISION) & (shares < 1 - _PRECISION)
    if largest <= 1 or (np.diff(shares) > _PRECISION).any():
        return None
    if between.sum() > 1:
        slope, start = np.polyfit(frequencies[between], shares[between], 1)
    else:
        slope, start = _steepest_line(frequencies, shares, between)
    if not (slope > 0 > start):
        return None
    width = _LENGTH / (2 * math.pi * slope)
    low = -start * width
    made = _llama3_factors(frequencies, largest, low, low + width)
    if not np.allclose(made, factors, rtol=_PRECISION, atol=0):
        return None
    return {
        "rope_type": "llama3", "factor": largest, "low_freq_factor": low, "high_freq_factor": low + width,
        "original_max_position_embeddings": _LENGTH,
    }  # fmt: skip


def _steepest_line(frequencies: np.ndarray, shares: np.ndarray, between: np.ndarray) -> tuple[float, float]:
    """Return a line that crosses all of 0 to 1 between the last whole and the first divided frequency."""
    last_whole = frequencies[shares >= 1 - _PRECISION].min(initial=np.inf)
    first_divided = frequencies[shares <= _PRECISION].max(initial=0.0)
    if between.any():
        at, share = float(frequencies[between][0]), float(shares[between][0])
        slope = max((1 - share) / (last_whole - at), share / (at - first_divided)) * 1.01
        return slope, share - slope * at
    slope = 1.02 / (last_whole - first_divided)
    return slope, -slope * (first_divided + 0.01 * (last_whole - first_divided))


def _llama3_factors(frequencies: np.ndarray, factor: float, low: float, high: float) -> np.ndarray:
    waves = _LENGTH * frequencies / (2 * math.pi)  # how often each turns within the original length
    shares = np.clip((waves - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - shares) / factor + shares))


def _no_factors(keys: Keys, why: str) -> MoecError:
    return MoecError(f"{FREQUENCIES} {why}", where=str(keys.file), todo=_AS_CONFIG)
