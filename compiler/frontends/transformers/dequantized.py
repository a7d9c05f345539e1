"""A quantized checkpoint as a model of transformers in float32: its weights are the numbers that the codes stand for.

transformers opens such checkpoints through one package a format, and some not at all on a CPU. Here the model is built
from its config and filled a tile at a time, so that memory is that of the model. The numbers of the codes come from the
formats' own libraries where these are installed (decoded.py); which parameter is made of which tensors, from moec.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from ...errors import MoecError
from ...ir.recipes import Recipe
from ...weights.evaluate import evaluate_recipe
from ...weights.sources.checkpoint import open_checkpoint
from ...weights.sources.source import WeightSource
from ...weights.tiles import tile_boxes
from ..deepseek_v4.model import MODEL_TYPE
from ..deepseek_v4.weights import Weights
from ..gguf.model import gguf_config, gguf_parameters
from ..load import gguf_file
from ..skeleton import make_empty, read_config
from ..stored.decoded import Decoding, gguf_source, safetensors_source
from ..stored.quantization_config import read_quantization
from ..stored.stored import decode_checkpoint
from .names import map_parameters

_TILE = 16 << 20  # bytes of f32


def dequantized_model(path: Path) -> tuple[Any, Decoding] | None:
    """Return the causal LM of a checkpoint folder or GGUF file, evaluated, with eager attention, and who decoded its
    weights; None for a checkpoint that is not quantized.

    Raises MoecError for what an import would refuse, for parameters that the checkpoint does not have, and (exit code
    1) for a weight that moec decodes otherwise than its format's library.
    """
    if (file := gguf_file(path)) is not None:
        from ...weights.sources.gguf import open_gguf

        opened = open_gguf(file)
        with opened.checkpoint:
            config = gguf_config(opened, file)
            model = _empty_model(config)
            decoded = gguf_source(opened)
            shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
            recipes = gguf_parameters(shapes, opened, config, file)
            recipes = {name: decoded.with_decoded_weights(recipe) for name, recipe in recipes.items()}
            return _fill_model(model, recipes, decoded, path), decoded.decoding
    config = read_config(path)
    quantization = read_quantization(config, path)
    if quantization is None:
        return None
    model = _empty_model(config)
    with open_checkpoint(path) as source:
        decoded = safetensors_source(source, quantization)
        if config.model_type == MODEL_TYPE:
            types = {name: info.type for name, info in source.tensors.items()}
            shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
            recipes = Weights(types, quantization).parameter_recipes(shapes)
            recipes = {name: decoded.with_decoded_weights(recipe) for name, recipe in recipes.items()}
            return _fill_model(model, recipes, decoded, path), decoded.decoding
        wanted = list(model.state_dict())
        stored = decode_checkpoint(source, quantization).of_layers(wanted)
        recipes = map_parameters(
            model, wanted, {name: decoded.decoded_tensor(recipe) for name, recipe in stored.items()}
        )
        return _fill_model(model, recipes, decoded, path), decoded.decoding


def placed_model(path: Path, reason: str) -> tuple[Any, Decoding]:
    """Return the causal LM of a checkpoint that is not quantized, and that moec says which tensor is which parameter.

    `reason` says why transformers does not. Raises MoecError for parameters that the checkpoint does not have.
    """
    model = _empty_model(read_config(path))
    with open_checkpoint(path) as source:
        wanted = list(model.state_dict())
        recipes = map_parameters(model, wanted, decode_checkpoint(source, None).of_layers(wanted), source.lacks)
        return _fill_model(model, recipes, source, path), Decoding({}, len(recipes), reason)


def _empty_model(config: Any) -> Any:
    config = deepcopy(config)
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return make_empty(config, attn_implementation="eager")


def _fill_model(model: Any, recipes: Mapping[str, Recipe], source: WeightSource, path: Path) -> Any:
    """Assign the evaluated recipes to the parameters of a model; MoecError names a parameter that has none."""
    state = model.state_dict(keep_vars=True)
    same: dict[int, list[str]] = {}
    for name, tensor in state.items():
        same.setdefault(id(tensor), []).append(name)
    lacking = [names[0] for names in same.values() if not recipes.keys() & names]
    if lacking:
        raise MoecError(f"the source model lacks {len(lacking)} tensors, such as {lacking[0]}", where=str(path))
    made = {name: _dequantized_tensor(recipes[name], state[name].dtype, source) for name in state if name in recipes}
    for names in same.values():  # parameters that the model ties: one that the checkpoint holds is not another's
        there = next(name for name in names if name in made)
        made |= {name: made[there] for name in names if name not in made}
    model.load_state_dict(made, strict=False, assign=True)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise MoecError(f"{left[0]} is computed by the model but too large to keep", where=str(path))
    return model.eval()


def _dequantized_tensor(recipe: Recipe, dtype: torch.dtype, source: WeightSource) -> torch.Tensor:
    """Return what a recipe makes."""
    found = torch.empty(recipe.type.sizes, dtype=dtype)
    for box in tile_boxes(recipe.type, _TILE):
        found[tuple(slice(*span) for span in box)] = evaluate_recipe(recipe, source, box).to(dtype)
    return found
