"""Keys of a config.json that mean a number under a name which the model's code does not read.

A config class takes any key, and takes a default for those of its own that are not there: a number that a tool wrote under
another family's name would be dropped without a word. Sizes show in the weights; numbers of this kind do not.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...errors import MoecError
from .config_checks import CHOSEN, EXPERTS, GROUPS, SCALINGS

# names of one meaning in the configs of the families
_MEANINGS: tuple[tuple[str, ...], ...] = (
    (*CHOSEN, "top_k", "num_activated_experts", "n_activated_experts"),
    GROUPS,
    ("topk_group", "topk_groups", "n_limited_groups"),
    ("routed_scaling_factor", "router_scaling_factor", "moe_routed_scaling_factor", "route_scale"),
    ("norm_topk_prob", "norm_topk", "moe_renormalize", "normalize_expert_weights"),
    ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_eps", "norm_epsilon", "rms_norm_epsilon"),
    ("rope_theta", "rotary_emb_base", "rope_base", "rotary_base"),
    ("partial_rotary_factor", "rotary_pct", "rotary_percent"),
    ("tie_word_embeddings", "tie_embeddings", "tie_lm_head"),
)  # fmt: skip
# how experts are chosen and weighed; no size shows it
_ROUTING = ("scoring_func", "norm_topk_prob", "topk_group", *GROUPS, "routed_scaling_factor", *CHOSEN)


def check_names(raw: Mapping[str, Any], config: Any, where: str) -> None:
    """Raise MoecError for a number that config.json gives under a name which the config's class does not know.

    `config` is that of the part of the model that reads and writes text. The value is no matter where the class knows
    another name of the meaning that stands there too, or has the same value under it.
    """
    known = _known_keys(type(config))
    if known is None:
        return
    for scope in _config_scopes(raw, config.model_type):
        chosen = [name for name in CHOSEN if name in known]
        experts = next((key for key in EXPERTS if isinstance(scope.get(key), int) and scope[key] > 1), None)
        if experts and chosen and not any(name in scope for name in _MEANINGS[0]):
            raise MoecError(
                f"config.json has {experts} {scope[experts]} and does not say {chosen[0]}: {_config_value(config, chosen[0])} would be "
                "a guess",
                where=where,
                todo=f"add {chosen[0]}: to how many experts a token goes",
            )
        for names in _MEANINGS:
            own = [name for name in names if name in known]
            other = next((n for n in names if n not in known and isinstance(scope.get(n), (int, float))), None)
            if other is None or not own or any(name in scope for name in own):
                continue
            values = [value for name in own if (value := _config_value(config, name)) is not None]
            if values and scope[other] not in values:
                raise MoecError(
                    f"config.json has {other} {scope[other]}, which the code of {config.model_type} does not read: it would "
                    f"compute with {own[0]} {values[0]}",
                    where=where,
                    todo=f"write it as {own[0]}",
                )


def keys_of(config: Any, found: Sequence[int], wanted: Sequence[int]) -> str:
    """Return a text that names the keys of a config with the sizes that a tensor's shape should have and has not, as `vocab_size is 128`."""
    other = {n for n, own in zip(wanted, found, strict=True) if n != own} if len(wanted) == len(found) else set()
    values = config.get_text_config(decoder=True).to_dict().items()
    same = [f"{key} is {n}" for key, n in values if type(n) is int and n in other and not key.endswith("_id")]
    return f": {', '.join(same[:4])} in config.json" if same else ""


def check_read(raw: Mapping[str, Any], model: Any, where: str) -> None:
    """Raise MoecError for a rule of routing in config.json that the code of a model does not read and does not follow.

    The code does what its config's default says of a key that it never reads. It follows `scoring_func` softmax or
    sigmoid where it computes that, whether it reads the key or not.
    """
    config = model.config.get_text_config(decoder=True)
    code = _modelling_code(model)
    known = _default_values(type(config)) or {}
    synonyms = dict(getattr(type(config), "attribute_map", None) or {})
    for scope in _config_scopes(raw, config.model_type) if code else ():
        for key in _ROUTING:
            names = {key, synonyms.get(key, key), *(n for n, other in synonyms.items() if other == key)}
            value = scope.get(key)
            if value is None or any(re.search(rf"\b{name}\b", code) for name in names):
                continue
            other = {"softmax": "sigmoid", "sigmoid": "softmax"}.get(value) if key == "scoring_func" else None
            wrong = other and f"{other}(" in (router := _router_code(code)) and f"{value}(" not in router
            if wrong or (key in known and value != known[key]):
                does = f"it computes a {other}" if wrong else f"it computes what {known[key]} means"
                raise MoecError(
                    f"{key} is {value!r}, which the code of {config.model_type} in transformers does not read: {does}",
                    where=where,
                    todo=f"this model is not one of {config.model_type}, or {key} is wrong",
                )


def _modelling_code(model: Any) -> str:
    """Return the modelling code of a model's text part, empty where there is none to read."""
    try:
        return inspect.getsource(inspect.getmodule(type(model.get_decoder())) or type(model))
    except (OSError, TypeError):
        return ""


def _router_code(code: str) -> str:
    """Return the lines around where experts are chosen."""
    lines = code.split("\n")
    at = [i for i, line in enumerate(lines) if "topk(" in line]
    return "\n".join(line for i in at for line in lines[max(0, i - 40) : i + 10])


def _config_scopes(raw: Mapping[str, Any], model_type: str) -> Iterator[Mapping[str, Any]]:
    """Yield the parts of config.json that a config of this model_type was made of, with what rope_parameters hold."""
    own = [raw] if raw.get("model_type") == model_type else []
    own += [v for v in raw.values() if isinstance(v, Mapping) and v.get("model_type") == model_type]
    for scope in own:
        ropes = [scope[key] for key in SCALINGS if isinstance(scope.get(key), Mapping)]
        yield {**{key: value for rope in ropes for key, value in rope.items()}, **scope}


def _config_value(config: Any, name: str) -> Any:
    """Return a value of a config, or of its rotary embeddings."""
    rope = getattr(config, "rope_parameters", None)
    found = getattr(config, name, None)
    return rope.get(name) if found is None and isinstance(rope, Mapping) else found


def _known_keys(cls: Any) -> frozenset[str] | None:
    """Return the keys that a class of configs has of its own, None for one that cannot be made without values."""
    defaults = _default_values(cls)
    if defaults is None:
        return None
    rope = defaults.get("rope_parameters")
    return frozenset(
        {*defaults, *(getattr(cls, "attribute_map", None) or {}), *(rope if isinstance(rope, Mapping) else ())}
    )


def _default_values(cls: Any) -> Mapping[str, Any] | None:
    """Return the values of a class of configs that is given none, None for one that cannot be made so."""
    try:
        return dict(cls().to_dict())
    except Exception:  # code of a checkpoint: whatever it raises, its keys are not known
        return None
