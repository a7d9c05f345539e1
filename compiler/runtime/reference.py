"""The source model in transformers as a runner: float32, eager attention, on the CPU, no remote code.

What stands against an artifact is a forward that moec did not compute: the modules of transformers. Unquantized
checkpoints are loaded by transformers too, unless their tensors have names that it does not know. Of quantized ones the library of the format makes the numbers that the codes
stand for; where it is not installed moec's recipes do, and `decoding` says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import MoecError
from ..errors.hub import find_cached

if TYPE_CHECKING:
    from ..frontends.stored.decoded import Decoding


@dataclass(frozen=True)
class Reference:
    """A transformers causal LM that runs step by step; its states are the model's own cache, changed in place."""

    model: Any
    name: str
    takes: frozenset[str]  # the keywords of its forward
    decoding: Decoding | None = None  # who decoded its weights, if they are quantized

    @staticmethod
    def of(model: Any, name: str, decoding: Decoding | None = None) -> Reference:
        """Return the runner of a model."""
        return Reference(model, name, frozenset(inspect.signature(model.forward).parameters), decoding)

    @property
    def context(self) -> int:
        """The most tokens that a sequence may have, as the config says."""
        config = self.model.config.get_text_config(decoder=True)
        return int(getattr(config, "max_position_embeddings", None) or 1 << 31)

    @property
    def vocabulary(self) -> int:
        """The number of tokens that the embedding knows."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def step(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        position_ids: np.ndarray,
        states: Any = None,
        last: int = 0,
    ) -> tuple[np.ndarray, Any]:
        """Run new tokens after those in `states`; see generate.Runner. The model makes its own kind of cache."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        tensors = {key: torch.from_numpy(np.array(a, np.int64)) for key, a in given.items() if key in self.takes}
        from ..frontends.transformers.cache import cache_argument, returned_cache

        with torch.no_grad():
            found = self.model(**tensors, **cache_argument(self.model, states), use_cache=True)
        return found.logits[:, -last:].float().numpy(), returned_cache(found)


@contextmanager
def open_reference(source: Any) -> Iterator[Reference]:
    """Open a checkpoint folder, or borrow a live model: its mode and attention are put back afterwards.

    Raises MoecError if the folder is not there, or transformers cannot load all of it.
    """
    if isinstance(source, (str, Path)):
        model, decoding = _load_source_model(Path(source))
        yield Reference.of(model, str(source), decoding)
        return
    if not hasattr(source, "forward") or not hasattr(source, "config"):
        raise MoecError(
            f"a {type(source).__name__} cannot be compared with", todo="give a folder or a transformers model"
        )
    model = source if _is_float32(source) else deepcopy(source).float()
    training, attention = model.training, model.config._attn_implementation
    try:
        model.eval()
        model.set_attn_implementation("eager")
        yield Reference.of(model, f"python:{type(source).__name__}")
    finally:
        model.train(training)
        model.set_attn_implementation(attention)


def reference_in_bf16(reference: Reference) -> Reference:
    """Return the same model with its parameters and what it computes in bfloat16, as its weights mostly are stored.

    Its attention is that which transformers takes unasked, where the model has it: eager attention in bf16 rounds the
    scores and the weights of tokens as well. Its buffers stay f32, as transformers keeps angles and routing biases,
    unless it does not run so.
    """
    model = deepcopy(reference.model)
    if getattr(model, "_supports_sdpa", False):
        model.set_attn_implementation("sdpa")
    found = Reference.of(model, f"{reference.name} in bf16")
    one = np.zeros((1, 1), np.int64)
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(torch.bfloat16)
        try:
            found.step(one, one + 1, one)
        except RuntimeError:  # numbers of two dtypes meet
            continue
        return found
    raise MoecError("transformers does not run the source model in bf16", where=reference.name, exit_code=1)


def _is_float32(model: Any) -> bool:
    return all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters())


def _load_source_model(folder: Path) -> tuple[Any, Decoding | None]:
    """Load a checkpoint folder or a GGUF file in float32; MoecError also for weights that would be made up."""
    from ..frontends.skeleton import model_class, read_config
    from ..frontends.transformers.dequantized import dequantized_model, placed_model

    folder = folder if folder.exists() else find_cached(folder) or folder
    if not folder.exists():
        raise MoecError(
            "the source model is not there", where=str(folder), todo="name its folder: moec verify DIR --against SOURCE"
        )
    with _no_progress_bars():
        if (found := dequantized_model(folder)) is not None:
            return found
    config = read_config(folder)
    try:
        with _no_progress_bars():
            loaded: Any = model_class(config).from_pretrained(
                folder, config=config, dtype=torch.float32, attn_implementation="eager", local_files_only=True,
                output_loading_info=True,
            )  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise MoecError(f"transformers cannot load the source model: {lines[0]}", where=str(folder)) from error
    model, info = loaded  # info: what output_loading_info asks for
    lacking = sorted(str(name) for name in (*info["missing_keys"], *info["mismatched_keys"]))
    if lacking:
        return placed_model(folder, f"transformers finds no tensor for {lacking[0]} by the names that it knows")
    return model.eval(), None


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silence the bars and warnings of loading; what went wrong is raised."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
