"""A whole model in Triton's interpreter: the tokens and logits that the simulator gives, by the same session.

Not collected by itself: tests/targets/accelerator/test_families.py runs it with the interpreter on, before triton is imported.
"""

import moec
import numpy as np
import pytest
from moec.compiler.frontends.families import FAMILIES
from tiny_models import random_model


@pytest.mark.parametrize(
    ("family", "count", "changes"),
    [
        ("gpt_oss", 3, {}),
        ("deepseek_v3", 33, {"kv_lora_rank": 32, "num_hidden_layers": 2}),
        ("deepseek_v32", 9, {"num_hidden_layers": 1}),
    ],
)
def test_a_prefill_and_a_cached_step(family, count, changes, tmp_path):
    """Latent attention is expanded for a prompt of so many tokens, and absorbed in the step behind it; or reads chosen tokens."""
    options = {"kernels": "source", "buckets": "4,64" if count > 4 else "4"}
    model = random_model(FAMILIES[family], **changes)
    artifact = moec.compile(model, target="nvidia-h200", out=tmp_path / "a", options=options)
    interpreted, simulated = (artifact.session(device=name, threads=1) for name in ("interpreter", "simulator"))
    assert interpreted.runs == "Triton's interpreter" and simulated.runs == "the simulator of nvidia-h200"
    ids, states = np.array([[5, 9, 17] * (count // 3)]), (None, None)
    for past in (0, count):
        mask, positions = np.ones((1, past + ids.shape[1]), np.int64), past + np.arange(ids.shape[1])[None]
        pairs = [s.step(ids, mask, positions, held) for s, held in zip((interpreted, simulated), states, strict=True)]
        (found, wanted), states = zip(*pairs, strict=True)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-3 * np.abs(wanted).max())
        ids = wanted[:, -1:].argmax(-1)
