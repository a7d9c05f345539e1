"""moec as a contender: an artifact, run through the public API as `moec run` does."""

from __future__ import annotations

import argparse
import json
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


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    import onnxruntime  # noqa: F401 - importing is not loading

    vocabulary = json.loads((given.source / "config.json").read_text())["vocab_size"]
    worker.serve(lambda: Compiled(given.source, given.threads), vocabulary)


if __name__ == "__main__":
    main()
