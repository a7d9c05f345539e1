"""Tiny DeepSeek-V4 models: their rope, random tokens, and a runner of the imported program, step by step."""

import torch
from moec.compiler.check.interpret import interpret
from moec.compiler.ir.dims import evaluate
from moec.compiler.weights.evaluate import evaluate_recipe

SPARSE, HEAVY = "compressed_sparse_attention", "heavily_compressed_attention"
PUBLISHED = {"compress_rates": {SPARSE: 4, HEAVY: 128}, "sliding_window": 128, "max_position_embeddings": 1024}
YARN = {
    "rope_type": "yarn", "factor": 16, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
    "attention_factor": 1.0, "rope_theta": 160000.0, "partial_rotary_factor": 0.25,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}


class Interpreted:
    """Runs a loaded module step by step, its weights made once."""

    def __init__(self, loaded):
        self.module, self.kept, self.source = loaded.module, {}, loaded.weights
        self.states = [p for p in self.module.main.params if p.type.state]

    def weights(self, recipe):
        return self.kept.setdefault(repr(recipe), evaluate_recipe(recipe, self.source))

    def start(self, batch):
        dims = {"B": batch, "P": 0}
        return [torch.zeros([evaluate(n, dims) for n in p.type.shape]) for p in self.states]

    def step(self, ids, past, states):
        mask = torch.ones(len(ids), past + ids.shape[1], dtype=torch.int64)
        logits, *states = interpret(self.module, [ids, mask, *states], self.weights)
        return logits, states


def difference(found, expected):
    """Return the largest difference relative to the largest number expected."""
    return float((found - expected).abs().max() / expected.abs().max())


def tokens(batch, length, seed=0):
    """Return random ids of the tiny vocabulary."""
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


# wide enough that blocks of 128 are cut at edges and rows hold several groups of 32
WIDE = {
    **PUBLISHED, "hidden_size": 192, "moe_intermediate_size": 160, "q_lora_rank": 160,
    "rope_parameters": {"main": PLAIN, "compress": YARN},
}  # fmt: skip
