"""A whole model as an artifact runs it, step by step, beside the model in transformers in f32 and in bf16."""

import numpy as np
from moec.compiler.runtime.compare import ROUNDING, token_differences
from moec.compiler.runtime.generate import left_pad
from moec.compiler.runtime.reference import Reference, reference_in_bf16

LEAST = 1e-3  # a difference that counts as none, where the model in bf16 happens to be nearer


def takes_padding(artifact):
    """Return whether rows of a batch may have different lengths."""
    return "position_ids" in {i["name"] for i in artifact.manifest["inputs"]}


def run_beside(model, family, session, lengths, steps):
    """Run a prefill of rows of some lengths and cached steps; return the logits' differences by step: found, and in bf16."""
    model.set_attn_implementation("eager")
    exact = Reference.of(model, family)
    runners = (session, exact, reference_in_bf16(exact))
    generator = np.random.default_rng(0)
    ids, mask, positions = left_pad([generator.integers(3, session.vocabulary, n).tolist() for n in lengths])
    states = [None] * len(runners)
    far: list[list[np.ndarray]] = [[], []]
    for _ in range(1 + steps):
        both = [r.step(ids, mask, positions, s) for r, s in zip(runners, states, strict=True)]
        (found, wanted, bf16), states = zip(*both, strict=True)
        real = mask[:, -ids.shape[1] :].astype(bool)
        for rows, logits in zip(far, (found, bf16), strict=True):
            rows.append(token_differences(logits[real], wanted[real]))
        ids = wanted[:, -1:].argmax(-1)
        mask, positions = np.pad(mask, ((0, 0), (0, 1)), constant_values=1), positions[:, -1:] + 1
    return far


def check_near(far, parts=(slice(1), slice(1, None))):
    """Assert that most tokens of the prefill and of the steps are about as far off as those of the model in bf16."""
    for part in parts:
        off, allowed = (np.median(np.concatenate(rows[part])) for rows in far)
        assert off <= ROUNDING * allowed + LEAST, (off, allowed)
