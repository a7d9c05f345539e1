"""Check artifacts for accelerators on the GPU that is here: numbers, decode speed, and the kernels of routed experts.

    python tests/bench/gpu_check.py --json result.json --work /tmp/gpu --checkpoint examples/tiny-moe

What is run, each part by itself and none after --seconds:

- experts: the kernels that moec chooses for the routed experts of OLMoE and Qwen3-30B-A3B at 1 to 8192 tokens, compiled
  and launched as in an artifact: the median of 20 runs by CUDA events with a cold L2, kernel by kernel and together
  as a CUDA graph, beside torch's grouped product, with what was predicted; the largest difference from the reference in
  f32, relative to its largest number.
- tiny: the checkpoint compiled for this GPU with objects; `moec verify` on it, greedy tokens, prefill and decode speed;
  the same greedy tokens with the sources compiled by Triton when they are launched; decode speed and the same tokens
  launch by launch, where steps of one token run as a CUDA graph.
- olmoe: an OLMoE-shaped checkpoint of random weights (checkpoint.py), likewise, against transformers in bf16 on the GPU.

Results are written after every part, so that what breaks or takes too long leaves the rest. --dry-run takes small sizes
and runs everything on the CPU, in Triton's interpreter and the simulator: to see that the script itself works.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PROFILES = {  # by a part of the GPU's name; the first that fits is taken
    "H200": "nvidia-h200", "H20-3e": "nvidia-h20-3e", "H100": "nvidia-h100", "H800": "nvidia-h800", "H20": "nvidia-h20",
    "GB200": "nvidia-gb200", "GB300": "nvidia-gb300", "B200": "nvidia-b200", "B300": "nvidia-b300", "GB10": "nvidia-gb10",
    "A100": "nvidia-a100", "L40S": "nvidia-l40s", "RTX 6000 Ada": "nvidia-rtx6000ada", "RTX PRO 6000": "nvidia-rtxpro6000",
    "5090": "nvidia-rtx5090", "4090": "nvidia-rtx4090", "MI300X": "amd-mi300x", "MI325X": "amd-mi325x",
    "MI350X": "amd-mi350x", "MI355X": "amd-mi355x", "8060S": "amd-strixhalo",
}  # fmt: skip
PROMPT = "def main():\n    import os\n"
PREFILL, STEPS = 512, 64


@dataclass
class Run:
    """What the parts share: options, results so far, and when to stop."""

    options: argparse.Namespace
    target: str
    device: str
    results: dict[str, Any]
    end: float

    @property
    def left(self) -> float:
        """Seconds until nothing more is begun."""
        return self.end - time.monotonic()

    def write(self) -> None:
        """Write what there is so far."""
        self.options.json.parent.mkdir(parents=True, exist_ok=True)
        self.options.json.write_text(json.dumps(self.results, indent=1, default=str) + "\n")

    def part(self, name: str, make: Callable[[Run, dict[str, Any]], None]) -> None:
        """Run a part; what it raises is kept in its place."""
        if self.left < 5:
            self.results[name] = {"left out": "no time was left"}
            return self.write()
        found: dict[str, Any] = {}
        self.results[name] = found
        begin = time.monotonic()
        try:
            make(self, found)
        except Exception as error:  # the other parts go on
            found["error"] = f"{type(error).__name__}: {error}"
            found["trace"] = traceback.format_exc().splitlines()[-12:]
        found["seconds"] = round(time.monotonic() - begin, 1)
        print(f"{name}: {found.get('error', 'done')} in {found['seconds']} s", flush=True)
        return self.write()


def compile_for(run: Run, source: Path, out: Path) -> float:
    """Compile a checkpoint with objects (dry: sources only) and return the seconds."""
    import moec

    begin = time.monotonic()
    moec.compile(
        source, target=run.target, out=out, options={"kernels": "source" if run.options.dry_run else "objects"}
    )
    return round(time.monotonic() - begin, 1)


def tiny(run: Run, found: dict[str, Any]) -> None:
    """Compile, verify and time the trained model."""
    import moec
    from moec.compiler.runtime.measure import verify

    out = run.options.work / "tiny"
    found["compile"] = compile_for(run, run.options.checkpoint, out)
    small = {"tokens": 40, "lengths": (1, 7), "steps": 2} if run.options.dry_run else {}
    comparison = verify(out, run.options.checkpoint, device=run.device, **small)
    found["verify"] = {"passed": comparison.passed, "lines": comparison.lines()}
    run.write()
    artifact = moec.compiler.runtime.artifact.Artifact.open(out)
    session = artifact.session(device=run.device)
    found["runs on"] = session.runs
    found["tokens"] = artifact.run(PROMPT, greedy=True, max_new_tokens=16, session=session).tokens[0]
    speeds(run, found, session)
    run.write()
    other = artifact.session(device="simulator" if run.options.dry_run else "triton")
    found["other"] = {
        "runs on": other.runs, "tokens": artifact.run(PROMPT, greedy=True, max_new_tokens=16, session=other).tokens[0],
    }  # fmt: skip
    found["other"]["equal"] = found["other"]["tokens"] == found["tokens"]
    if session.graphs:  # a graph may have failed by now: what runs says so
        found["graphs"] = session.runs
        single = replace(session, graphs=None)
        tokens = artifact.run(PROMPT, greedy=True, max_new_tokens=16, session=single).tokens[0]
        found["launch by launch"] = {"equal": tokens == found["tokens"]}
        speeds(run, found["launch by launch"], single)


def olmoe(run: Run, found: dict[str, Any]) -> None:
    """Compile an OLMoE-shaped checkpoint and compare it with transformers on the GPU."""
    import moec
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    sys.path.insert(0, str(HERE))
    from checkpoint import Sizes, write

    sizes = Sizes(layers=1, hidden=128, expert=64, experts=8, chosen=2, heads=2, vocabulary=1024)
    sizes = sizes if run.options.dry_run else Sizes(layers=run.options.layers)
    source, out = run.options.work / "olmoe-checkpoint", run.options.work / "olmoe"
    begin = time.monotonic()
    write(source, sizes)
    found["write"] = round(time.monotonic() - begin, 1)
    found["layers"], found["compile"] = sizes.layers, compile_for(run, source, out)
    session = moec.compiler.runtime.artifact.Artifact.open(out).session(device=run.device)
    found["runs on"] = session.runs
    device = "cpu" if run.options.dry_run else "cuda"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, attn_implementation="eager")
    model = model.to(device).eval()
    ids = np.random.default_rng(0).integers(0, sizes.vocabulary, (1, 5 if run.options.dry_run else 64))
    logits, _ = session.step(ids, np.ones_like(ids), np.arange(ids.shape[1])[None])
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids).to(device)).logits.float().cpu().numpy()
    off = np.abs(logits - wanted).max(-1)[0] / np.abs(wanted).max()
    found["relative difference"] = {"median": float(np.median(off)), "most": float(off.max())}
    found["top-1 agreement"] = float((logits.argmax(-1) == wanted.argmax(-1)).mean())
    run.write()
    speeds(run, found, session)


def speeds(run: Run, found: dict[str, Any], session: Any) -> None:
    """Time a prefill and cached steps of one sequence, wall clock, with the logits copied to the host."""
    import numpy as np

    length, steps = (4, 2) if run.options.dry_run else (PREFILL, STEPS)
    ids = np.arange(3, 3 + length)[None] % session.vocabulary
    mask, positions = np.ones_like(ids), np.arange(length)[None]
    times = []
    for _ in range(1 if run.options.dry_run else 5):  # the first one loads the kernels
        begin = time.perf_counter()
        _, states = session.step(ids, mask, positions, last=1)
        times.append(time.perf_counter() - begin)
    found["prefill"] = {"tokens": length, "seconds": min(times), "tokens/s": length / min(times)}
    times = []
    for count in range(steps):
        mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        begin = time.perf_counter()
        _, states = session.step(np.array([[5]]), mask, np.array([[length + count]]), states, last=1)
        times.append(time.perf_counter() - begin)
    middle = sorted(times)[len(times) // 2]
    found["decode"] = {"behind": length, "steps": steps, "median seconds": middle, "tokens/s": 1 / middle}


def main() -> None:
    """Run the parts and write their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out = Path(os.environ.get("OUT", "."))
    parser.add_argument("--json", type=Path, default=out / "gpu_check.json")
    parser.add_argument("--work", type=Path, default=Path("/tmp/moec-gpu-check"))
    parser.add_argument("--checkpoint", type=Path, default=HERE.parent.parent / "examples/tiny-moe")
    parser.add_argument("--target", help="The profile of the GPU.  [default: by its name]")
    parser.add_argument("--layers", type=int, default=4, help="Of the OLMoE-shaped checkpoint.")
    parser.add_argument("--seconds", type=float, default=240.0, help="After which no part is begun.")
    parser.add_argument("--parts", default="experts,tiny,olmoe")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    there = torch.cuda.is_available()
    if not there and not options.dry_run:
        sys.exit("no GPU is here: torch.cuda.is_available() says False (--dry-run tries the script without one)")
    name = torch.cuda.get_device_name() if there else "none"
    named = next((profile for key, profile in PROFILES.items() if key in name), "nvidia-h200")
    options.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"gpu": name, "target": options.target or named, "torch": torch.__version__}
    results["python"] = sys.version.split()[0]
    run = Run(
        options, options.target or named, "simulator" if options.dry_run else "cuda", results,
        time.monotonic() + options.seconds,
    )  # fmt: skip
    from gpu_experts import experts

    parts = {"experts": experts, "tiny": tiny, "olmoe": olmoe}
    for part in options.parts.split(","):
        run.part(part, parts[part])
    print(json.dumps({key: value for key, value in run.results.items() if key != "experts"}, indent=1, default=str))


if __name__ == "__main__":
    main()
