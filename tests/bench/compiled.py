"""moec as a contender: an artifact, run through the public API as `moec run` does."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import moec
import numpy as np
import worker
from moec.compiler.runtime.generate import run_prefill


class Compiled:
    """An artifact with one session."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.artifact = moec.Artifact.open(folder)
        self.session = self.artifact.session(threads=threads)
        self.past, self.filled = 0, None

    def prefill(self, prompt: Sequence[int]) -> float:
        """Generate one token."""
        return self._run(prompt, 1).prefill_seconds

    def decode(self, prompt: Sequence[int], steps: int) -> float:
        """Generate greedily; the first new token belongs to the prefill."""
        return self._run(prompt, steps + 1).decode_seconds

    def fill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Evaluate prompts; their caches stay as they are, since a step from older ones copies them."""
        ids = np.array(prompts)
        self.past = ids.shape[1]
        positions = np.tile(np.arange(self.past), (len(ids), 1))
        self.filled = run_prefill(self.session, ids, np.ones_like(ids), positions)[1]
        self.steps([[0] * len(ids)] * 2)

    def steps(self, tokens: Sequence[Sequence[int]]) -> float:
        """Take a step for the first tokens, which copies the caches, and time the others."""
        states, start = self.filled, 0.0
        for number, column in enumerate(np.array(tokens)):
            if number == 1:
                start = time.perf_counter()
            mask = np.ones((len(column), self.past + number + 1), np.int64)
            positions = np.full((len(column), 1), self.past + number)
            logits, states = self.session.step(column[:, None], mask, positions, states, last=1)
            logits[:, -1].argmax(-1)
        return time.perf_counter() - start

    def facts(self) -> dict[str, Any]:
        """Return sizes as they lie in the folder and as moec.json counts them."""
        counted = self.artifact.manifest["figures"]["counted"]["per_token"]
        return {
            "weights_bytes": sum(p.stat().st_size for p in self.artifact.folder.glob("model.onnx.data*")),
            "bytes_per_token": counted["compiled_bytes_read"],
            "pipeline": self.artifact.manifest["pipeline"],
        }

    def _run(self, prompt: Sequence[int], tokens: int) -> Any:
        return self.artifact.run(tokens=prompt, max_new_tokens=tokens, greedy=True, eos=(), session=self.session)


if __name__ == "__main__":
    import onnxruntime  # noqa: F401 - importing is not loading

    worker.main(__doc__, Compiled)
