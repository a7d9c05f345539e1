"""Rope types whose frequencies hang on the length: transformers' numbers below the trained length, beyond it, and across."""

from copy import deepcopy

import pytest
import torch
from moec.compiler.check.interpret import interpret
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.frontends.load import load
from moec.compiler.weights.evaluate import evaluate_recipe
from tiny_models import random_model

TRAINED = 12
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
LONG = {
    "rope_type": "longrope", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": TRAINED,
    "short_factor": [1.0 + i / 10 for i in range(8)], "long_factor": [1.0 + i for i in range(8)],
}  # fmt: skip
HALF = {**DYNAMIC, "partial_rotary_factor": 0.5, "factor": 2.5}
MIXED = {"full_attention": DYNAMIC, "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}
CASES = {
    "dynamic": ("qwen3_moe", DYNAMIC),
    "longrope": ("qwen3_moe", LONG),
    "half of the head": ("glm4_moe", HALF),
    "one of two types of layers": ("gemma3_text", MIXED),
}


@pytest.mark.parametrize(
    "case",
    ["dynamic", "longrope", "one of two types of layers", pytest.param("half of the head", marks=pytest.mark.long)],
)
def test_numbers_equal_transformers(case):
    family, rope = CASES[case]
    length = 512 if rope is LONG else TRAINED
    model = random_model(FAMILIES[family], rope_parameters=deepcopy(rope), max_position_embeddings=length)
    loaded = load(model)
    sizes = {"B": 1, "P": 0}
    empty = [
        torch.zeros([sizes.get(str(s), s) if s.is_Symbol else int(s) for s in p.type.shape])
        for p in loaded.module.main.params
        if p.type.state
    ]
    tokens = torch.randint(3, 128, (1, 20), generator=torch.Generator().manual_seed(3))
    cut = [(0, n) for n in (5, TRAINED, TRAINED + 1, 20)]  # whole prompts
    cut += [(n, n + 1) for n in range(9, 16)]  # single tokens behind a prompt of nine, over the trained length
    with torch.no_grad():
        ours, theirs = list(empty), None
        fresh = deepcopy(model)  # transformers keeps the frequencies of the longest sequence yet
        _, *ours = step(loaded, tokens[:, :9], 0, ours)
        theirs = fresh(input_ids=tokens[:, :9], use_cache=True).past_key_values
        for start, end in cut:
            if start == 0:
                got, *_ = step(loaded, tokens[:, :end], 0, empty)
                want = deepcopy(model)(input_ids=tokens[:, :end]).logits
            else:
                got, *ours = step(loaded, tokens[:, start:end], start, ours)
                made = fresh(input_ids=tokens[:, start:end], past_key_values=theirs, use_cache=True)
                want, theirs = made.logits, made.past_key_values
            assert ((got - want).abs().max() / want.abs().max()).item() < 2e-5, (start, end)


def step(loaded, ids, past, states):
    """Run tokens behind `past` others; return the logits and the states."""
    total = past + ids.shape[1]
    inputs = [ids, torch.ones(1, total, dtype=torch.int64), torch.arange(past, total)[None], *states]
    return interpret(loaded.module, inputs, lambda recipe: evaluate_recipe(recipe, loaded.weights))


def test_other_models_are_left_alone():
    assert not any("rope" in s.replaces for s in load(random_model(FAMILIES["qwen3_moe"])).replaced)
    found = load(random_model(FAMILIES["qwen3_moe"], rope_parameters=dict(DYNAMIC))).replaced
    assert [s.replaces for s in found] == ["modeling_rope_utils.dynamic_rope_update"] and found[0].checked
