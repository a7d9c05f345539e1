"""Imports a Hugging Face checkpoint folder, or a live transformers model."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...errors import MoecError
from ...errors.json_files import read_json
from ...ir.dtypes import dtype_name, find_dtype
from ...ir.module import Module
from ...ir.recipes import Recipe, Tensor, rename_tensors
from ...ir.types import TensorType
from ...weights.sources.checkpoint import Checkpoint, open_checkpoint
from ..deepseek_v4 import model as deepseek_v4
from ..deepseek_v4.weights import Weights
from ..replaced.stand_ins import StandIn, stand_in_for_file
from ..skeleton import PARTS, adopt_model, build_skeleton, read_config
from ..stored.expected import expected_quantized, expected_storage
from ..stored.quantization_config import read_quantization
from ..stored.stored import Decoded, decode_checkpoint
from ..stored.unread import check_unread, read_tensors, unread_tensors
from .capture import register_interfaces
from .checkpoint_layers import check_adapter, check_count, layer_prefixes, layer_storage, missing_parameter
from .config_names import check_read
from .config_types import known_config
from .layers import find_layers
from .model import import_model
from .names import expected_tensors, map_parameters


def import_folder(
    folder: Path, name: str, *, trust_remote_code: bool = False, replaced: list[StandIn] | None = None
) -> tuple[Module, Checkpoint | None, Mapping[str, TensorType]]:
    """Return the module of a checkpoint folder, its opened weights (None where there is only a config.json), and the
    tensors that the program leaves out.

    `name` is the folder as the user gave it; it goes into the module. `replaced` gets what code of transformers functions
    of moec stand for. Reads no weight data.
    """
    config = read_config(folder, trust_remote_code)
    quantization = read_quantization(config, folder)
    checkpoint = open_checkpoint(folder) if has_weights(folder) else None
    dtype: Any = getattr(config.get_text_config(decoder=True), "dtype", None) or getattr(config, "dtype", None)
    if config.model_type == deepseek_v4.MODEL_TYPE:
        types = {name: info.type for name, info in checkpoint.tensors.items()} if checkpoint else None
        weights = Weights(types, quantization or {}, find_dtype(dtype) or "bf16")
        _note_deepseek_v4(replaced)
        module = deepseek_v4.build(config, weights, name)
        if checkpoint is not None:
            prefixes = {weights.prefix.removesuffix("{layer}.")}
            check_count(config, config.num_hidden_layers, checkpoint.tensors, prefixes, str(folder))
            check_unread(check_weights(module, checkpoint), checkpoint)
        return module, checkpoint, deepseek_v4.left_out(config, weights)
    decoded = decode_checkpoint(checkpoint, quantization) if checkpoint is not None else Decoded({}, {})
    skeleton = build_skeleton(config, trust_remote_code)
    check_read(known_config(read_json(folder / "config.json")), skeleton.model, str(folder / "config.json"))

    def mapper(wanted: list[str]) -> Mapping[str, Recipe]:
        if checkpoint is None:
            state = {k: v for k, v in skeleton.model.state_dict().items() if k in set(wanted)}
            # a config that names no dtype is taken for bfloat16, which most checkpoints are stored in
            stored = expected_tensors(skeleton.model, state, find_dtype(dtype) or "bf16")
            available = stored
            if quantization:
                available = expected_quantized(skeleton.model, state, stored, quantization, folder / "config.json")
        else:
            available = decoded.of_layers(wanted)
        if checkpoint is not None:
            return map_parameters(skeleton.model, wanted, available, checkpoint.lacks)
        if part := PARTS.get(config.model_type):
            available = {name: rename_tensors(r, lambda own: f"{part}.{own}") for name, r in available.items()}
        return map_parameters(skeleton.model, wanted, available)

    if checkpoint is None:
        place, _ = find_layers(skeleton.model)
        stored_as = expected_storage(skeleton.model, quantization, place) if quantization else None
        return import_model(skeleton, mapper, name, replaced, stored_as), None, {}
    missing = partial(missing_parameter, skeleton.model, checkpoint)
    prefixes = layer_prefixes(skeleton.model, checkpoint.tensors)
    layers = len(find_layers(skeleton.model)[1])
    check_count(skeleton.config, layers, checkpoint.tensors, prefixes, str(folder), skeleton.model)
    # layers may differ in nothing but how they are stored
    module = import_model(skeleton, mapper, name, replaced, layer_storage(decoded.alike, prefixes), missing)
    read = check_weights(module, checkpoint)
    left = unread_tensors(read, checkpoint)
    check_adapter(left, str(folder))
    check_unread(read, checkpoint, skeleton.model)
    # a model of text and images is compiled for text: towers for images are left out on purpose
    whole = config.get_text_config(decoder=True) is not config
    return module, checkpoint, left if whole else {}


def import_live(model: Any, replaced: list[StandIn] | None = None) -> tuple[Module, dict[str, torch.Tensor]]:
    """Return the module of a live transformers model and its tensors by name; the model itself is left alone.

    `replaced` gets what code of transformers functions of moec stand for.
    """
    live = {name: t.detach() for name, t in model.state_dict(keep_vars=True).items()}
    if model.config.model_type == deepseek_v4.MODEL_TYPE:
        _note_deepseek_v4(replaced)
        weights = Weights({name: _tensor_type(t) for name, t in live.items()})
        return deepseek_v4.build(model.config, weights, f"python:{type(model).__name__}"), live
    shell = _without_data(model)
    mapper = lambda wanted: {n: Tensor(n, _tensor_type(live[n])) for n in wanted}  # noqa: E731
    return import_model(adopt_model(shell), mapper, f"python:{type(model).__name__}", replaced), live


def _note_deepseek_v4(replaced: list[StandIn] | None) -> None:
    if replaced is not None:
        replaced.append(stand_in_for_file(deepseek_v4.build, "transformers.models.deepseek_v4.modeling_deepseek_v4"))


def _without_data(model: Any) -> Any:
    """Copy a model with its parameters on the meta device; it will be traced with the functions of `capture`."""
    register_interfaces()
    memo: dict[int, Any] = {}
    persistent = set(model.state_dict(keep_vars=True))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in persistent or isinstance(tensor, torch.nn.Parameter):
            empty = torch.empty(tensor.shape, dtype=_computed_dtype(tensor.dtype), device="meta")
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            memo[id(tensor)] = torch.nn.Parameter(empty, requires_grad=False) if is_parameter else empty
    return deepcopy(model, memo)


def _computed_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point else dtype


def _tensor_type(tensor: torch.Tensor) -> TensorType:
    return TensorType.of(dtype_name(tensor.dtype), *tensor.shape)


def has_weights(folder: Path) -> bool:
    """Return whether a folder holds weights in any format, readable or not."""
    patterns = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth")
    return any(next(folder.glob(p), None) for p in patterns)


def check_weights(module: Module, checkpoint: Checkpoint) -> Mapping[str, TensorType]:
    """Return what any call of any function reads, checked to be there with the dtype and shape that it should have."""
    read = read_tensors(module)
    for name, type_ in read.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            raise checkpoint.lacks(name)
        if info.type != type_:
            raise MoecError(f"the tensor {name} is {info.type}, {type_} is wanted", where=str(info.file))
    return read
