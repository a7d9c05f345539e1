"""Compiled artifacts equal transformers: prefill and cached decoding, left padding, lengths that were not traced."""

import moec
import numpy as np
import pytest
import torch
from moec.compiler.frontends.families import FAMILIES
from tiny_models import padded_batch, random_model, save

ALWAYS = ("olmoe", "mixtral", "qwen2_moe", "qwen3_moe")  # the others belong to the long matrix
CHECKED = [pytest.param(n, marks=() if n in ALWAYS else pytest.mark.long) for n in FAMILIES]
LENGTHS = (1, 7, 64, 200)
STEPS = 32
TOLERANCE = 1e-4  # relative to the largest logit


@pytest.fixture(scope="module", params=CHECKED)
def family(request, tmp_path_factory):
    """Return (reference model, {source: (artifact, its session)}): compiled from the folder, and from the live model."""
    folder = tmp_path_factory.mktemp(request.param)
    model = random_model(FAMILIES[request.param])
    save(model, folder / "checkpoint")
    sources = {"folder": folder / "checkpoint", "live": model}
    made = {name: moec.compile(source, out=folder / name) for name, source in sources.items()}
    # threads of ONNX Runtime that spin would fight those of torch
    return model, {name: (artifact, artifact.session(spinning=False)) for name, artifact in made.items()}


def prefill_and_decode(model, session, length):
    """Yield (compiled logits, reference logits, mask) of a padded prompt and of each cached step after it."""
    padding = FAMILIES[model.config.model_type].padding
    ids, mask, positions = padded_batch(128, length, padding=padding)
    states = session.start(3)
    cache = None
    for _ in range(STEPS + 1):
        with torch.no_grad():
            expected = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
        cache = expected.past_key_values
        logits, states = session.step(ids.numpy(), mask.numpy(), positions.numpy(), states)
        yield logits, expected.logits.numpy(), mask[:, -ids.shape[1] :].bool().numpy()
        ids = expected.logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.int64)], 1)
        positions = positions[:, -1:] + 1


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("source", ["folder", "live"])
def test_logits(family, length, source):
    model, made = family
    session = made[source][1]
    for logits, expected, real in prefill_and_decode(model, session, length):
        assert np.abs(logits - expected)[real].max() <= TOLERANCE * np.abs(expected[real]).max()


@pytest.mark.parametrize("source", ["folder", "live"])
def test_greedy_tokens(family, source):
    model, made = family
    prompt = torch.randint(3, 128, (1, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False, eos_token_id=None
        )
    artifact, session = made[source]
    found = artifact.run(tokens=prompt[0].tolist(), max_new_tokens=64, greedy=True, eos=(), session=session)
    assert list(found.tokens[0]) == expected[0, 9:].tolist()
