"""Tiny random checkpoints of the families, with every weight random and routing that is decisive."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from moec.compiler import driver
from moec.compiler.check.interpret import interpret
from moec.compiler.frontends.families import FAMILIES, Family
from moec.compiler.frontends.load import load
from moec.compiler.frontends.skeleton import make_model
from moec.compiler.frontends.transformers.cache import cache_argument, returned_cache
from moec.compiler.weights.evaluate import evaluate_recipe

INSTALLED = tuple(name for name, family in FAMILIES.items() if hasattr(transformers, family.config_class))
ROUTER = re.compile(r"(\.(mlp|feed_forward|mixer)\.gate|\.gate\.wg|router(_gate)?(\.\w+)?)\.weight$")
COMPUTED = ("slope_rate", "_decay")  # buffers that a model computes from its config and saves all the same


def random_model(family: Family, **changes) -> torch.nn.Module:
    """Return a tiny causal LM of a family in float32, evaluated, with random weights.

    Constants of the initialisation (norms, biases) would hide mistakes, so they are random too; router weights are
    scaled up, so that which experts are chosen does not hang on the last bits, but not so far that sigmoids become 1.
    """
    torch.manual_seed(0)
    config = family.config(**changes)
    model = make_model(config, dtype=torch.float32).eval()
    constant = {name for name, p in model.named_parameters() if p.unique().numel() == 1}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("tid2eid"):  # hash routing: every token's experts differ
                shape = (parameter.shape[0], config.n_routed_experts)
                parameter.copy_(torch.rand(shape, generator=generator).argsort(-1)[:, : parameter.shape[1]])
            if not parameter.is_floating_point() or name not in model.state_dict() or name.endswith(COMPUTED):
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(
                "A_log"
            ):  # as it is initialised, a state is forgotten at once and rounding is what remains
                parameter.copy_(0.5 * noise - 1)
            elif name in constant or parameter.dim() == 1:
                parameter.copy_(parameter + 0.1 * noise)
            elif ROUTER.search(name):
                parameter.copy_(4 * noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model


def save(model: torch.nn.Module, folder: Path) -> Path:
    """Save as a checkpoint folder with the family's own tensor names."""
    model.save_pretrained(folder)
    return folder


def stepped(model: torch.nn.Module, cache: Any = None, **inputs) -> tuple[torch.Tensor, Any]:
    """Return what transformers computes for new tokens behind those of a cache: the logits and the cache after them."""
    given = cache_argument(model, cache)
    with torch.no_grad():
        found = model(**inputs, **given, use_cache=True)
    return found.logits, returned_cache(found)


def padded_batch(
    vocabulary: int, length: int, batch: int = 3, seed: int = 0, padding: bool = True
) -> tuple[torch.Tensor, ...]:
    """Return (input_ids, attention_mask, position_ids) of a batch with left padding in all rows but the first.

    Without `padding`, for models that take none, all rows are whole.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(1, batch if padding else 1):
        mask[row, : (length * row) // (batch + 1)] = 0
    ids = ids * mask
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def meaning(model, spec, target="cpu", stage="moe"):
    """Return a function that runs the quantized program of a model with torch: what its codes stand for.

    At stage kernel activations are rounded as the target's kernels round them.
    """
    module = driver.compile(model, target, quantize=spec, stop_after=stage)
    source = load(model).weights
    made = {}

    def weights(recipe):
        if repr(recipe) not in made:
            made[repr(recipe)] = evaluate_recipe(recipe, source)
        return made[repr(recipe)]

    return lambda inputs: interpret(module, inputs, weights)
