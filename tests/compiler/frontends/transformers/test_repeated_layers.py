"""Layers that a model runs through more than once in a step, each time with states of their own."""

import moec
import numpy as np
import pytest
import torch
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.frontends.transformers.cache import cache_argument, returned_cache
from tiny_models import padded_batch
from transformers import DynamicCache, LlamaForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

LAYERS, PASSES = 3, 3  # the second and the third layer are run through three times


class Layer(LlamaDecoderLayer):
    """A layer that may keep its keys and values in another place of the cache than its own."""

    def forward(self, hidden_states, offset=0, **kwargs):
        own = self.self_attn.layer_idx
        self.self_attn.layer_idx = own + offset
        try:
            return super().forward(hidden_states * (1 + 0.25 * bool(offset)), **kwargs)
        finally:
            self.self_attn.layer_idx = own


class Looped(LlamaForCausalLM):
    """A Llama of three layers that take seven turns; `apart` says whether every turn has states of its own."""

    def __init__(self, config, apart=True):
        super().__init__(config)
        self.model.layers = torch.nn.ModuleList(Layer(config, i) for i in range(LAYERS))
        self.apart = apart
        self.post_init()

    def forward(self, input_ids, attention_mask=None, position_ids=None, cache=None, use_cache=True, **kwargs):
        model = self.model
        cache = DynamicCache() if cache is None else cache
        x = model.embed_tokens(input_ids)
        mask = create_causal_mask(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask, position_ids=position_ids,
            **cache_argument(model, cache),
        )  # fmt: skip
        given = {"attention_mask": mask, "position_ids": position_ids, **cache_argument(model, cache)}
        given["position_embeddings"] = model.rotary_emb(x, position_ids=position_ids)
        x = model.layers[0](x, **given)
        for turn in range(PASSES):
            for layer in model.layers[1:]:
                x = layer(x, offset=turn * (LAYERS - 1) if self.apart else 0, **given)
        return CausalLMOutputWithPast(logits=self.lm_head(model.norm(x)), **cache_argument(model, cache))


def looped(**options):
    torch.manual_seed(0)
    return Looped(FAMILIES["llama"].config(), **options).eval()


def test_each_turn_has_its_own_states_and_equals_transformers(tmp_path):
    model = looped()
    artifact = moec.compile(model, out=tmp_path / "artifact")
    turns = LAYERS + (PASSES - 1) * (LAYERS - 1)
    assert len(artifact.manifest["states"]) == 2 * turns
    # weights are stored once, whatever the number of turns
    stored = sum(p.numel() for p in model.parameters()) * 4
    assert (tmp_path / "artifact" / "model.onnx.data").stat().st_size < 1.05 * stored
    session = artifact.session(spinning=False)
    ids, mask, positions = padded_batch(128, 9, batch=2)
    states, cache = session.start(2), None
    for _ in range(5):
        with torch.no_grad():
            expected = model(ids, mask, positions, cache)
        cache = returned_cache(expected)
        found, states = session.step(ids.numpy(), mask.numpy(), positions.numpy(), states)
        real = mask[:, -ids.shape[1] :].bool().numpy()
        assert np.abs(found - expected.logits.numpy())[real].max() <= 1e-4 * expected.logits.abs().max()
        ids = expected.logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
        positions = positions[:, -1:] + 1


def test_turns_that_share_a_state_are_refused():
    with pytest.raises(moec.MoecError, match="layer 1 updates the key state 1 of its cache, which an earlier call"):
        moec.compile(looped(apart=False), stop_after="graph")
