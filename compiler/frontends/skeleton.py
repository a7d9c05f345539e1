"""A transformers model without weights: parameters on the meta device, small computed buffers with their values."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..errors import MoecError
from ..errors.json_files import no_contradiction, read_json
from .transformers.capture import NAME, register_interfaces
from .transformers.config_checks import check_config, check_sizes
from .transformers.config_names import check_names
from .transformers.config_types import known_config, refuse_adapter
from .transformers.model_errors import CODE_ERRORS, model_error

_FACTORIES = {
    torch.empty, torch.zeros, torch.ones, torch.full, torch.randn, torch.rand, torch.empty_like, torch.zeros_like,
    torch.ones_like,
}  # fmt: skip


# models of several: which of them reads and writes text; its tensors' names begin with this too
PARTS = {"qwen3_omni_moe": "thinker"}

_BESIDE_LOGITS = ("output_router_logits", "output_hidden_states", "output_attentions")


class _LargeTensorsOnMeta(TorchFunctionMode):
    """Sends large new tensors to the meta device, and leaves small ones and all arithmetic (rope tables) on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _FACTORIES and kwargs.get("device") is None and _count_elements(args, kwargs) > 65536:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _count_elements(args: Any, kwargs: Any) -> int:
    if args and isinstance(args[0], torch.Tensor):
        return args[0].numel()
    size = kwargs.get("size", args[0] if args and isinstance(args[0], (tuple, list)) else args)
    numbers = [n for n in size if isinstance(n, int)]
    return math.prod(numbers) if numbers else 0


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device, the buffers that no checkpoint holds, and which names share one tensor."""

    model: Any
    config: Any
    buffers: dict[str, torch.Tensor]
    tied: dict[str, tuple[str, ...]]  # a parameter's name -> the other names of the same tensor


def read_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """Return the transformers config of a folder; MoecError says what is wrong with it."""
    path = folder / "config.json"
    refuse_adapter(folder)
    if not path.is_file():
        raise MoecError("there is no config.json", where=str(folder), todo="give a Hugging Face checkpoint folder")
    raw = read_json(path, object_pairs_hook=no_contradiction)
    if not isinstance(raw.get("model_type"), str):
        raise MoecError(
            "config.json has no model_type", where=str(path), todo="add the key that names the architecture"
        )
    check_config(raw, str(path))
    import transformers
    from transformers import AutoConfig

    known = known_config(raw)
    renamed, raw = known != raw and known["model_type"] in transformers.CONFIG_MAPPING, known
    remote = raw.get("auto_map") and raw["model_type"] not in transformers.CONFIG_MAPPING
    if remote and not trust_remote_code:
        raise MoecError(
            f"model_type {raw['model_type']!r} comes with code of its own, which is not run",
            where=str(path),
            todo="if you trust that code, pass --trust-remote-code",
        )
    if raw["model_type"] not in transformers.CONFIG_MAPPING and not remote:
        raise MoecError(
            f"model_type {raw['model_type']!r} is not known to transformers {transformers.__version__}", where=str(path)
        )
    try:
        if renamed:
            config = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=bool(remote), local_files_only=True)
    except Exception as error:
        raise _refused_config(error, path) from error
    check_names(raw, decoder_config(config), str(path))
    check_sizes(decoder_config(config).to_dict(), str(path))
    return config


def decoder_config(config: Any) -> Any:
    """Return the config of the part of a model that reads and writes text."""
    whole = getattr(config, f"{PARTS[config.model_type]}_config") if config.model_type in PARTS else config
    return whole.get_text_config(decoder=True)


def _refused_config(error: Exception, path: Path) -> MoecError:
    """Return the MoecError for what transformers raises about a config."""
    what = "transformers does not accept this config"
    if isinstance(error, KeyError) and (missing := re.search(r"`(\w+)`.*?\{(.*?)\}", str(error))):
        return MoecError(f"{what}: {missing[1]} lacks {missing[2]}", where=str(path), todo=f"add {missing[2]}")
    # a ValueError, or one of huggingface_hub's strict dataclasses (they share no public base), is an explanation
    if isinstance(error, ValueError) or "Strict" in type(error).__name__:
        return MoecError(f"{what}: {_explain_refusal(error)}", where=str(path))
    return replace(model_error(error, what, None, "as it stands"), where=str(path))


def _explain_refusal(error: Exception) -> str:
    """Return why a config is refused, without the classes that it went through."""
    text = _first_line(error)
    field = re.search(r"[Ff]ield '(\w+)'", text)
    if "TypeError: " in text and field is None:
        return "a value has a wrong type"
    if field and "<class" in text:
        return f"{field[1]} has a value of a wrong type"
    return re.sub(r"^.*?(Value|Type|Key)Error: ", "", text)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__


def model_class(config: Any) -> Any:
    """Return the class of a config's causal LM: AutoModelForCausalLM, or one that it does not list.

    These are Mistral 4, and models of text and images, whose path for text alone is the causal LM.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoModelForCausalLM

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)]
    return AutoModelForCausalLM


def make_model(config: Any, trust_remote_code: bool = False, **options: Any) -> Any:
    """Build a config's causal LM with random weights; `options` are those of from_config."""
    cls = model_class(config)
    if hasattr(cls, "_from_config"):
        return cls._from_config(config, **options)
    return cls.from_config(config, trust_remote_code=trust_remote_code, **options)


def build_skeleton(config: Any, trust_remote_code: bool = False) -> Skeleton:
    """Build the causal LM of a config in float32 without memory for its weights."""
    register_interfaces()
    if part := PARTS.get(config.model_type):
        config = getattr(config, f"{part}_config")
    if hasattr(config, "quantization_config"):
        # the weights' storage is the recipes' affair; the traced arithmetic is float32
        del config.quantization_config
    # where there are several models in one, only the decoder is told: see adopt
    alone = config.get_text_config(decoder=True) is config
    options = {"attn_implementation": NAME} if alone else {}
    return adopt_model(make_empty(config, trust_remote_code, **options))


def make_empty(config: Any, trust_remote_code: bool = False, **options: Any) -> Any:
    """Build a config's causal LM in float32, its large tensors on the meta device; `options` as in `make_model`."""
    try:
        with _LargeTensorsOnMeta(), torch.no_grad():
            return make_model(config, trust_remote_code=trust_remote_code, dtype=torch.float32, **options)
    except CODE_ERRORS as error:
        kind = config.get_text_config(decoder=True).model_type
        raise model_error(error, f"a causal LM of model_type {kind!r}", config, "cannot be built") from error


def adopt_model(model: Any) -> Skeleton:
    """Move a model to the meta device, keeping the values of its non-persistent buffers."""
    use_moec_ops(model)
    persistent = set(model.state_dict(keep_vars=True))
    buffers = {name: b.detach().clone() for name, b in model.named_buffers() if name not in persistent}
    for name, buffer in buffers.items():
        if not buffer.is_meta and buffer.is_floating_point() and buffer.isnan().any():
            what = f"the model computes NaN for {name}, from values of its config that contradict each other"
            raise MoecError(what, todo="look at rope_parameters and head_dim in config.json")
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = {n: tuple(o for o in group if o != n) for group in names.values() if len(group) > 1 for n in group}
    return Skeleton(model.to("meta").eval(), model.config, buffers, tied)


def use_moec_ops(model: Any) -> None:
    """Route the decoder's attention, and every experts module that transformers can dispatch, through moec's ops.

    What a config makes a model return beside its logits is for training.
    """
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        for name in _BESIDE_LOGITS:
            if getattr(config, name, False) is not False:
                setattr(config, name, False)
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module.config, "_experts_implementation"):
            module.config._experts_implementation = NAME
            module.config._experts_implementation_internal = NAME
    for module in model.get_decoder().modules():
        if hasattr(module, "config") and hasattr(module.config, "_attn_implementation"):
            module.config._attn_implementation_internal = NAME
