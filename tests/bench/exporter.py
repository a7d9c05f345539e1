"""transformers' ONNX exporter as a contender: float32 export with a key-value cache, run in ONNX Runtime.

Needs a Python with transformers, onnxruntime and onnxscript, the last of which moec does without:

    python -m venv exporter
    exporter/bin/pip install -c constraints.txt torch transformers onnx onnxruntime onnxscript
    exporter/bin/python tests/bench/exporter.py export CHECKPOINT OUT --layers 4
    exporter/bin/python tests/bench/exporter.py serve OUT --threads 2

The exporter's own settings are kept (--experts asks for another implementation of the experts), and of its graphs the one that takes new tokens after past ones is used for both
prefill and decode. It has no quantization of experts, and every weight is in memory several times while it works: 16 GB
and minutes for 4 layers.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import worker

PAST, PRESENT = "input.past_key_values.", "output.past_key_values."


def export(checkpoint: Path, out: Path, layers: int, experts: str | None) -> None:
    """Export the first layers of a checkpoint; the folder holds export.done when it is whole.

    `experts` is an implementation of transformers (`batched_mm`, `grouped_mm`); None leaves its choice.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
    from transformers.exporters.utils import decompose_for_generation

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, num_hidden_layers=layers).eval()
    if experts:
        model.set_experts_implementation(experts)
    ids = torch.arange(3, 19)[None]
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    parts = decompose_for_generation(model, sample, multi_token_decode=True)
    submodel, inputs = parts["decode"]
    exported = OnnxExporter().export(submodel, inputs, config=OnnxConfig(dynamic=True))
    exported.save_pretrained(out)
    facts = {"layers": layers, "experts": str(model.get_experts_implementation())}
    facts |= {"vocabulary": model.config.vocab_size}
    (out / "export.done").write_text(json.dumps(facts))


class Exported:
    """An exported graph in ONNX Runtime; caches stay its own values from step to step."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime

        self.folder, self.made = folder, json.loads((folder / "export.done").read_text())
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            str(next(folder.glob("*.onnx"))), settings, providers=["CPUExecutionProvider"]
        )
        self.caches = [i for i in self.session.get_inputs() if i.name.startswith(PAST)]
        self.empty = [
            onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((1, int(i.shape[1]), 0, int(i.shape[3])), np.float32))
            for i in self.caches
        ]

    def prefill(self, prompt: Sequence[int]) -> float:
        """Evaluate a prompt at once; the graph computes the logits of every token."""
        start = time.perf_counter()
        self._step(prompt, 0, self.empty)
        return time.perf_counter() - start

    def decode(self, prompt: Sequence[int], steps: int) -> float:
        """Take greedy steps, the present caches bound as the next past ones."""
        token, caches = self._step(prompt, 0, self.empty)
        start = time.perf_counter()
        for past in range(len(prompt), len(prompt) + steps):
            token, caches = self._step([token], past, caches)
        return time.perf_counter() - start

    def facts(self) -> dict[str, Any]:
        """Return sizes, and what was exported."""
        data = sum(p.stat().st_size for p in self.folder.glob("*.onnx.data"))
        return {"weights_bytes": data, **self.made}

    def _step(self, tokens: Sequence[int], past: int, caches: Sequence[Any]) -> tuple[int, list[Any]]:
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", np.array([tokens], np.int64))
        binding.bind_cpu_input("position_ids", np.arange(past, past + len(tokens), dtype=np.int64)[None])
        binding.bind_output("logits", "cpu")
        for entry, value in zip(self.caches, caches, strict=True):
            binding.bind_ortvalue_input(entry.name, value)
            binding.bind_output(PRESENT + entry.name.removeprefix(PAST), "cpu")
        self.session.run_with_iobinding(binding)
        logits, *following = binding.get_outputs()
        return int(logits.numpy()[0, -1].argmax()), following


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("export", "serve"))
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", help="the experts' implementation (default: transformers' choice)")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    if given.action == "export":
        export(given.source, given.out, given.layers, given.experts)
    else:
        import onnxruntime  # noqa: F401 - importing is not loading

        vocabulary = json.loads((given.source / "export.done").read_text())["vocabulary"]
        worker.serve(lambda: Exported(given.source, given.threads), vocabulary)


if __name__ == "__main__":
    main()
