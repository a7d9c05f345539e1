"""moec as a contender: an artifact, run through the public API as `moec run` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import moec
import worker


class Compiled:
    """An artifact with one session."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.artifact = moec.Artifact.open(folder)
        self.session = self.artifact.session(threads=threads)

    def prefill(self, prompt: Sequence[int]) -> float:
        """Generate one token."""
        return self._run(prompt, 1).prefill_seconds

    def decode(self, prompt: Sequence[int], steps: int) -> float:
        """Generate greedily; the first new token belongs to the prefill."""
        return self._run(prompt, steps + 1).decode_seconds

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
