"""Compiled artifacts equal transformers: prefill and cached decoding, left padding, lengths that were not traced."""

import moec
import numpy as np
import pytest
import torch
from moec.compiler.frontends.families import FAMILIES
from tiny_models import INSTALLED, padded_batch, random_model, save, stepped

LIVE = ("olmoe", "mixtral", "qwen2_moe", "qwen3_moe")  # compiled from the live model too
ALWAYS = (*LIVE, "lfm2_moe", "kimi_linear", "granitemoehybrid")  # the others belong to the long matrix
SOURCES = [(name, "folder") for name in INSTALLED] + [(name, "live") for name in LIVE]
CHECKED = [
    pytest.param(pair, marks=() if pair[0] in ALWAYS else pytest.mark.long, id="-".join(pair)) for pair in SOURCES
]
LENGTHS = (1, 7, 33, 130)
STEPS = 20
TOLERANCE = 1e-4  # relative to the largest logit


@pytest.fixture(scope="module", params=CHECKED)
def family(request, tmp_path_factory):
    """Return (reference model, artifact, its session)."""
    name, source = request.param
    folder = tmp_path_factory.mktemp(name)
    model = random_model(FAMILIES[name])
    artifact = moec.compile(
        save(model, folder / "checkpoint") if source == "folder" else model, out=folder / "artifact"
    )
    # threads of ONNX Runtime that spin would fight those of torch
    return model, artifact, artifact.session(spinning=False)


def prefill_and_decode(model, session, length):
    """Yield (compiled logits, reference logits, mask) of a padded prompt and of each cached step after it."""
    padding = FAMILIES[model.config.model_type].padding
    ids, mask, positions = padded_batch(128, length, batch=2, padding=padding)
    states = session.start(len(ids))
    cache = None
    for _ in range(STEPS + 1):
        expected, cache = stepped(model, cache, input_ids=ids, attention_mask=mask, position_ids=positions)
        logits, states = session.step(ids.numpy(), mask.numpy(), positions.numpy(), states)
        yield logits, expected.numpy(), mask[:, -ids.shape[1] :].bool().numpy()
        ids = expected[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones(len(ids), 1, dtype=torch.int64)], 1)
        positions = positions[:, -1:] + 1


@pytest.mark.parametrize("length", LENGTHS)
def test_logits(family, length):
    model, _, session = family
    for logits, expected, real in prefill_and_decode(model, session, length):
        assert np.abs(logits - expected)[real].max() <= TOLERANCE * np.abs(expected[real]).max()


def test_greedy_tokens(family):
    model, artifact, session = family
    prompt = torch.randint(3, 128, (1, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False, eos_token_id=None
        )
    found = artifact.run(tokens=prompt[0].tolist(), max_new_tokens=40, greedy=True, eos=(), session=session)
    assert list(found.tokens[0]) == expected[0, 9:].tolist()
