"""torch in bfloat16 through transformers as a contender, with the experts' implementation that transformers chooses."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import worker


class Eager:
    """A checkpoint in transformers, logits of the last token only."""

    def __init__(self, folder: Path, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch, self.folder = torch, folder
        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True).eval()
        known = inspect.signature(self.model.forward).parameters
        self.cache = "cache" if "cache" in known else "past_key_values"  # its name up to transformers 5.23

    def prefill(self, prompt: Sequence[int]) -> float:
        """Evaluate a prompt at once."""
        start = time.perf_counter()
        self._step(self.torch.tensor([prompt]), None)
        return time.perf_counter() - start

    def decode(self, prompt: Sequence[int], steps: int) -> float:
        """Take greedy steps with transformers' growing cache."""
        token, cache = self._step(self.torch.tensor([prompt]), None)
        start = time.perf_counter()
        for _ in range(steps):
            token, cache = self._step(token, cache)
        return time.perf_counter() - start

    def facts(self) -> dict[str, Any]:
        """Return sizes, the bytes that a token reads (of the experts those chosen, one embedding row), and settings."""
        config = self.model.config
        read = 0.0
        for name, parameter in self.model.named_parameters():
            share = 1.0
            if "experts" in name:
                share = config.num_experts_per_tok / config.num_experts
            elif "embed" in name:
                share = 1 / config.vocab_size
            read += parameter.nbytes * share
        return {
            "weights_bytes": sum(p.stat().st_size for p in self.folder.glob("*.safetensors")),
            "bytes_per_token": round(read),
            "experts": str(self.model.get_experts_implementation()),
            "attention": config._attn_implementation,
        }

    def _step(self, ids: Any, cache: Any) -> tuple[Any, Any]:
        with self.torch.inference_mode():
            found = self.model(ids, **{self.cache: cache}, use_cache=True, logits_to_keep=1)
        return found.logits[:, -1].argmax(-1, keepdim=True), found[self.cache]


if __name__ == "__main__":
    import transformers.models.olmoe.modeling_olmoe  # noqa: F401 - importing is not loading

    worker.main(__doc__, Eager)
