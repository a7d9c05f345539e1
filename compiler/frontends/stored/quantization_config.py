"""How a checkpoint says that it is quantized: the quantization_config of config.json, or ModelOpt's own file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import MoecError
from ...weights.sources.safetensors_header import parse_json
from .schemes import METHODS, gptq_format

_CT_FORMATS = (
    "dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision",
)  # fmt: skip
# tools that write folders of their own kind: what is in them, and what to give in their place
_MLX = (
    "this is a folder of MLX (`quantization` in config.json; weights in uint32 with scales and biases), which is not read",
    "give the Hugging Face checkpoint that it was made from, or a GGUF file",
)
_MSMODELSLIM = (
    "this is a folder of msModelSlim, whose tensors (weight_offset, deq_scale, quant_bias) are not read",
    "give the checkpoint that it was made from",
)


def read_quantization(config: Any, folder: Path) -> dict[str, Any] | None:
    """Return how a checkpoint says that it is quantized, None if it is not; MoecError for what is not understood.

    `quant_method` of the result is a key of METHODS.
    """
    where = folder / "config.json"
    raw = _config_value(config, "quantization_config")
    _refuse_other_tools(raw if raw is not None else _config_value(config, "quantization"), folder)
    if raw is None and (folder / "hf_quant_config.json").is_file():
        where = folder / "hf_quant_config.json"
        raw = _read_modelopt_file(where)
    if raw is None:
        return None
    found = dict(raw if isinstance(raw, dict) else raw.to_dict())
    if not isinstance(found.get("quant_method"), str):
        raise MoecError(
            "quantization_config has no quant_method", where=str(where), todo=f"it can be {', '.join(METHODS)}"
        )
    method = str(found.get("quant_method")).replace("_", "-").removeprefix("intel/")
    found["quant_method"] = method.removesuffix("-fp4").removesuffix("-mxfp8").removesuffix("-mixed")
    reason = _not_understood(found)
    if reason:
        raise MoecError(reason[0], where=str(where), todo=reason[1])
    return found


def _config_value(config: Any, key: str) -> Any:
    """Return a key of a config, or of the config of the model that writes text."""
    found = getattr(config, key, None)
    return found if found is not None else getattr(config.get_text_config(decoder=True), key, None)


def _refuse_other_tools(raw: Any, folder: Path) -> None:
    """Raise MoecError for a folder that a tool wrote whose layout is not read, with its name."""
    if isinstance(raw, Mapping) and "quant_method" not in raw and {"group_size", "bits"} <= raw.keys():
        raise MoecError(_MLX[0], where=str(folder / "config.json"), todo=_MLX[1])
    description = next(iter(sorted(folder.glob("quant_model_description*.json"))), None)
    if description is not None:
        raise MoecError(_MSMODELSLIM[0], where=str(description), todo=_MSMODELSLIM[1])


def _read_modelopt_file(file: Path) -> dict[str, Any]:
    """Return what ModelOpt's own file says."""
    try:
        content = parse_json(file.read_bytes(), file, "the file")
    except OSError as error:
        raise MoecError(f"cannot read the file: {error.strerror}", str(file)) from None
    own = content.get("quantization") if isinstance(content, dict) else None
    if not isinstance(own, dict):
        raise MoecError("the file has no `quantization`", where=str(file), todo="remove or repair it")
    return {"quant_method": "modelopt", **own}


def _not_understood(found: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return what in a quantization_config is not understood, and what to do; None if all is."""
    method = found["quant_method"]
    if method not in METHODS:
        return (
            f"weights quantized with {method!r} are not understood",
            f"quant_method can be {', '.join(METHODS)}; or give an unquantized checkpoint",
        )
    if method == "awq":
        versions = [str(found[key]) for key in ("version", "checkpoint_format", "format") if found.get(key)]
        strange = [version for version in versions if version.lower() != "gemm"]
        return (f"AWQ weights of version {strange[0]!r} are not understood", "version gemm is") if strange else None
    format = gptq_format(found)
    if method == "gptq" and format not in ("gptq", "gptq_v2"):
        return f"GPTQ weights with checkpoint_format {format!r} are not understood", "gptq and gptq_v2 are"
    return _compressed_tensors_problem(found) if method == "compressed-tensors" else None


def _compressed_tensors_problem(found: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return what in a config of compressed-tensors is not understood."""
    groups = found.get("config_groups") or {}
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        return "config_groups in quantization_config is not a table of tables", "repair config.json"
    formats = [found.get("format"), *(group.get("format") for group in groups.values())]
    strange = [f for f in formats if f not in (None, *_CT_FORMATS)]
    if strange:
        return (
            f"compressed tensors with format {strange[0]!r} are not understood",
            f"there are {', '.join(_CT_FORMATS)}",
        )
    sparsity = (found.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        return f"sparsity_config {sparsity!r} is not understood", "save the model as dense"
    if found.get("transform_config"):
        return "transform_config is not understood: weights were rotated", "save the model without transforms"
    return None
