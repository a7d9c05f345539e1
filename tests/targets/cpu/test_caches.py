"""KV caches in buffers: in place, growing, and old states that others still hold; logits of the last tokens only."""

import moec
import numpy as np
import pytest
from moec.compiler.frontends.families import FAMILIES
from moec.targets.cpu.run.caches import STEP
from tiny_models import random_model


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3"])
def session(request, tmp_path_factory):
    """Return a session whose caches are kept in place (qwen3_moe), and one whose are not (latent attention)."""
    artifact = moec.compile(random_model(FAMILIES[request.param]), out=tmp_path_factory.mktemp(request.param) / "a")
    return artifact.session(spinning=False)


def step(session, tokens, states=None, **options):
    past = states.length if states else 0
    ids = np.array([tokens])
    where = np.arange(past, past + len(tokens))[None]
    return session.step(ids, np.ones((1, past + len(tokens))), where, states, **options)


def test_which_caches_stay_in_place(session):
    latent = any(not state.in_place for state in session.states)
    _, states = step(session, [5, 6])
    assert len(states) == len(session.states) and states.length == 2
    assert (len(states.buffers.arrays) == 0) == latent == (len(states.others) > 0)
    if not latent:
        place = [a.ctypes.data for a in states.buffers.arrays]
        _, after = step(session, [7], states)
        assert [a.ctypes.data for a in after.buffers.arrays] == place and after.buffers.room % STEP == 0


def test_growing_past_the_room(session):
    tokens = np.random.default_rng(0).integers(3, 128, 3 * STEP).tolist()
    whole, _ = step(session, tokens)
    logits, states = step(session, tokens[: STEP - 2])
    parts = [logits]
    for token in tokens[STEP - 2 : STEP + 3]:  # one by one over the end of the first buffer
        logits, states = step(session, [token], states)
        parts.append(logits)
    parts.append(step(session, tokens[STEP + 3 :], states)[0])
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-4 * np.abs(whole).max())


def test_old_states_are_never_changed(session):
    """Two continuations of the same states, taken in turns, see their own tokens only."""
    _, begun = step(session, [9, 4, 33])
    first, left = step(session, [11], begun)
    second, right = step(session, [77], begun)
    left_after, _ = step(session, [50], left)
    right_after, _ = step(session, [50], right)
    for logits, tokens in ((first, [11]), (second, [77]), (left_after, [11, 50]), (right_after, [77, 50])):
        wanted = step(session, [9, 4, 33, *tokens])[0][:, -1:]
        np.testing.assert_allclose(logits, wanted, atol=1e-4 * np.abs(wanted).max())


def test_logits_of_the_last_tokens(session):
    assert session.keeps
    whole, _ = step(session, [9, 4, 33, 12, 5])
    for last in (1, 2, 5, 9):
        some, states = step(session, [9, 4, 33, 12, 5], last=last)
        assert some.shape[1] == min(last, 5) and states.length == 5
        np.testing.assert_allclose(some, whole[:, -last:], atol=1e-5 * np.abs(whole).max())
