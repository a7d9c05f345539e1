"""DeepSeek-V4: the program that is built from config and weights equals DeepseekV4ForCausalLM."""

import moec
import numpy as np
import pytest
import torch
from deepseek_v4_models import PLAIN, PUBLISHED, YARN, Interpreted, difference, tokens
from moec.compiler.errors import MoecError
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.frontends.load import load
from moec.compiler.ir.dims import evaluate
from moec.compiler.ops.verify import verify_module
from moec.compiler.runtime.generate import generate
from tiny_models import random_model, save, stepped

FAMILY = FAMILIES["deepseek_v4"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return (model, its checkpoint loaded) with entries of 4 and 8 tokens, a window of 8, and YaRN."""
    model = random_model(FAMILY, rope_parameters={"main": PLAIN, "compress": YARN})
    return model, load(save(model, tmp_path_factory.mktemp("v4")))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Return the same with entries of 4 and 128 tokens and a window of 128, as the released models have them."""
    model = random_model(FAMILY, **PUBLISHED)
    return model, load(save(model, tmp_path_factory.mktemp("v4")))


def prefill(case, length, batch=2):
    model, loaded = case
    with torch.no_grad():
        expected = model(input_ids=tokens(batch, length), use_cache=True).logits
    runner = Interpreted(loaded)
    return difference(runner.step(tokens(batch, length), 0, runner.start(batch))[0], expected)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 15, 16, 17, 33, 64, 130])
def test_prefill(small, length):
    assert prefill(small, length) < 1e-5


@pytest.mark.parametrize("length", [1, 127, 128, 129, 255, 256, 257])
def test_prefill_with_published_ratios(published, length):
    assert prefill(published, length) < 1e-5


def decode(case, length, steps):
    """Return the largest difference of cached steps behind a prompt, and of the prompt."""
    model, loaded = case
    runner, states, cache, worst = Interpreted(loaded), None, None, 0.0
    ids, past = tokens(2, length, seed=1), 0
    states = runner.start(2)
    for i in range(steps + 1):
        expected, cache = stepped(model, cache, input_ids=ids)
        found, states = runner.step(ids, past, states)
        worst = max(worst, difference(found, expected))
        past, ids = past + ids.shape[1], tokens(2, 1, seed=2 + i)
    return worst


def test_cached_steps(small):
    assert decode(small, 5, 40) < 1e-5


def test_cached_steps_across_a_published_window(published):
    assert decode(published, 120, 20) < 1e-5
    assert decode(published, 250, 10) < 1e-5


@pytest.mark.parametrize("parts", [(3, 1, 9, 4), (8, 8, 8), (1, 30), (13, 2, 2, 2)])
def test_a_prompt_in_parts(small, parts):
    model, loaded = small
    runner, past, found = Interpreted(loaded), 0, []
    states, ids = runner.start(2), tokens(2, sum(parts))
    for part in parts:
        logits, states = runner.step(ids[:, past : past + part], past, states)
        found.append(logits)
        past += part
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=True).logits
    assert difference(torch.cat(found, 1), expected) < 1e-5


def test_states_are_as_long_as_their_types_say(small):
    _, loaded = small
    runner = Interpreted(loaded)
    _, states = runner.step(tokens(2, 21), 0, runner.start(2))
    for param, state in zip(runner.states, states, strict=True):
        assert list(state.shape) == [evaluate(n, {"B": 2, "P": 21}) for n in param.type.shape]


def test_layers_of_a_kind_are_one_function(small):
    module = small[1].module
    verify_module(module)
    assert module.stage == "moe"
    assert [op.callee for op in module.main.ops if op.callee] == ["layer_0", "layer_1", "layer_2", "layer_3"]


@pytest.fixture(scope="module")
def session(small, tmp_path_factory):
    """Return the session of the small model's artifact."""
    made = moec.compile(small[1].folder, out=tmp_path_factory.mktemp("v4") / "made")
    return made.session(spinning=False)


def step(session, ids, past, states):
    """Run a step of the artifact; return logits as a tensor and the states."""
    rows, new = ids.shape
    positions = np.tile(np.arange(past, past + new), (rows, 1))
    logits, states = session.step(ids.numpy(), np.ones((rows, past + new), np.int64), positions, states)
    return torch.from_numpy(logits), states


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15, 16, 17, 31, 32, 33, 130])
def test_prefill_of_the_artifact(small, session, length):
    with torch.no_grad():
        expected = small[0](input_ids=tokens(2, length), use_cache=True).logits
    assert difference(step(session, tokens(2, length), 0, None)[0], expected) < 1e-4


def test_three_hundred_cached_steps_of_the_artifact(small, session):
    """Cross the window's end once and the ends of compressed windows many times."""
    cache, states, past, worst, ids = None, None, 0, 0.0, tokens(2, 6, seed=1)
    for i in range(301):
        expected, cache = stepped(small[0], cache, input_ids=ids)
        found, states = step(session, ids, past, states)
        worst = max(worst, difference(found, expected))
        past, ids = past + ids.shape[1], tokens(2, 1, seed=2 + i)
    assert worst < 1e-4


def test_greedy_tokens_of_the_artifact(small, session):
    prompt = tokens(1, 9)
    with torch.no_grad():
        expected = small[0].generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False, eos_token_id=None
        )
    found = generate(session, [prompt[0].tolist()], max_new_tokens=40, greedy=True)
    assert found.tokens[0] == expected[0, 9:].tolist()


def test_padding_is_refused(session):
    with pytest.raises(MoecError, match="takes no padding"):
        generate(session, [[5, 6, 7], [8]], max_new_tokens=2, greedy=True)


def test_states_may_be_gone_on_from_twice(session):
    """Earlier states stay as they are when a step goes on from them."""
    _, states = step(session, tokens(1, 10), 0, None)
    first, _ = step(session, tokens(1, 3, seed=4), 10, states)
    again, _ = step(session, tokens(1, 3, seed=4), 10, states)
    assert torch.equal(first, again)


def test_a_table_of_experts_may_name_one_twice(tmp_path):
    """No MoE op can tell equal ids apart: they become one expert with the sum of their weights."""
    model = random_model(FAMILY)
    with torch.no_grad():
        table = model.model.layers[0].mlp.gate.tid2eid
        table[::2, 1] = table[::2, 0]
        expected = model(input_ids=tokens(2, 9), use_cache=True).logits
    artifact = moec.compile(model, out=tmp_path / "made")
    assert artifact.manifest["unfused"] == []
    assert difference(step(artifact.session(spinning=False), tokens(2, 9), 0, None)[0], expected) < 1e-4
