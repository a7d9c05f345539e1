"""What quantization costs on examples/tiny-moe: KL to float32, top-1 agreement and perplexity on its held-out text.

    python tests/bench/quality.py --work DIR --compile '--quantize int4' --llama-python llama/bin/python

moec's rows are artifacts compiled with the given options and run by the target's runtime; what their activations cost is
in them. The rows of Q4_0 are the same weights put through gguf.quants and back (under the python that has gguf), then
evaluated by transformers in float32: every matrix but the router, and once more without the tied embedding, which
llama.cpp itself keeps at Q6_K. float32 is transformers' for all rows.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_formats import write_importance
from process import measured, moec_compile

HERE = Path(__file__).resolve().parent
MODEL = HERE.parents[1] / "examples" / "tiny-moe"
FORMATS = HERE / "llama_formats.py"
ROUTER, EMBEDDING = "mlp.gate.weight", "embed_tokens.weight"
WINDOW, TOKENS = 256, 20_000


def measure(
    variants: Sequence[str],
    work: Path,
    llama_python: Path | None = None,
    tokens: int = TOKENS,
    llama_types: Sequence[str] = (),
    calibration: Path | None = None,
) -> list[dict[str, Any]]:
    """Return a row for each variant, and for Q4_0 where there is a python with gguf.

    A variant is options of `moec compile`, such as `--quantize int4`. A row has `name`, `bits` (stored bits a weight, scales
    included), `kl_mean`, `kl_max`, `top1`, `perplexity_ratio`, `perplexity`, `reference_perplexity` and `tokens`.
    """
    import moec
    from moec.compiler.runtime.reference import open_reference
    from moec.compiler.runtime.text_score import score_text

    with open_reference(MODEL) as reference:
        windows = _windows(tokens)
        parameters = sum(p.numel() for p in reference.model.parameters())

        def row(name: str, runner: Any, stored: int) -> dict[str, Any]:
            score = score_text(runner, reference, windows, "held-out text")
            facts = {key: getattr(score, key) for key in ("kl_mean", "kl_max", "top1", "perplexity", "tokens")}
            facts |= {"reference_perplexity": score.reference_perplexity}
            ratio = score.perplexity / score.reference_perplexity
            return {"name": name, "bits": 8 * stored / parameters, "perplexity_ratio": ratio, **facts}

        rows = []
        for number, options in enumerate(variants):
            folder = work / f"moec-{number}"
            measured(moec_compile(MODEL, folder, options), work / f"moec-{number}.log")
            artifact = moec.Artifact.open(folder)
            stored = sum(p.stat().st_size for p in artifact.folder.glob("model.onnx.data*"))
            # torch computes between the steps: threads that spin meanwhile would take the cores
            rows.append(row(f"moec {options}".strip(), artifact.session(spinning=False), stored))
        for name, kept in (("Q4_0", ()), ("Q4_0, embedding kept", (EMBEDDING,))) if llama_python else ():
            folder = work / name.replace(", ", "-").replace(" ", "-")
            command = [llama_python, Path(__file__), "--round-trip", folder, "--keep", ROUTER, *kept]
            stored = int(subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout)
            with open_reference(folder) as model:
                rows.append(row(name, model, stored))
        if llama_types and calibration:
            write_importance(calibration, work / "importance.npz")
        for kind in llama_types:
            folder = work / f"llama-{kind}"
            command = [llama_python, FORMATS, work / "importance.npz", kind, folder]
            done = subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True)
            with open_reference(folder) as model:
                rows.append(row(f"llama.cpp {kind}", model, int(done.stdout.split()[-1])))
    return rows


def _windows(tokens: int) -> list[Any]:
    """Return the held-out text in windows of tokens."""
    import numpy as np
    from moec.compiler.runtime.tokenizer import load_tokenizer

    ids = load_tokenizer(MODEL).encode((MODEL / "heldout.txt").read_text(encoding="utf-8"))[:tokens]
    return [np.array(ids[i : i + WINDOW]) for i in range(0, len(ids) - 1, WINDOW)]


def round_trip(out: Path, kept: Sequence[str]) -> int:
    """Write the model with its matrices put through Q4_0 and back, but for names that end in one of `kept`.

    Returns the bytes that it takes as stored: Q4_0 where it was applied, else those of the source. Needs gguf.
    """
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize
    from llama import Checkpoint

    source, stored, made = Checkpoint(MODEL), 0, {}
    for name, (_, _, shape) in source.places.items():
        bits = source.read(name)
        values = (bits.astype(np.uint32) << 16).view(np.float32)
        if len(shape) > 1 and not name.endswith(tuple(kept)):
            packed = quantize(values, GGMLQuantizationType.Q4_0)
            values = dequantize(packed, GGMLQuantizationType.Q4_0)
            stored += packed.nbytes
        else:
            stored += bits.nbytes
        made[name] = values.astype("<f4")
    write_checkpoint(out, made)
    return stored


def write_checkpoint(out: Path, made: Mapping[str, Any]) -> None:
    """Write the model with other tensors, in f32."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(MODEL, out, ignore=shutil.ignore_patterns("*.safetensors"))
    header, offset = {}, 0
    for name, values in made.items():
        offsets = [offset, offset + values.nbytes]
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": offsets}
        offset += values.nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with (out / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for values in made.values():
            file.write(values.tobytes())


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="a folder for artifacts")
    parser.add_argument("--compile", action="append", default=[], help="options of moec compile; may be given again")
    parser.add_argument("--llama-python", type=Path, help="a python with gguf, for the rows of Q4_0")
    parser.add_argument("--llama-types", nargs="*", default=[], help="formats of llama.cpp's quantizer, such as IQ4_XS")
    parser.add_argument("--calibration", type=Path, help="the text of the importance matrix for those")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of the held-out text (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write the rows here, else they are printed")
    parser.add_argument("--round-trip", type=Path, help="only write the model after Q4_0 (under --llama-python)")
    parser.add_argument("--keep", nargs="*", default=[], help="ends of names that --round-trip leaves as they are")
    given = parser.parse_args()
    if given.round_trip:
        print(round_trip(given.round_trip, given.keep))
        return
    if not given.work:
        parser.error("--work is needed")
    given.work.mkdir(parents=True, exist_ok=True)
    if given.llama_types and not (given.llama_python and given.calibration):
        parser.error("--llama-types needs --llama-python and --calibration")
    types = (given.llama_types, given.calibration)
    text = json.dumps(measure(given.compile, given.work, given.llama_python, given.tokens, *types), indent=2)
    if given.json:
        given.json.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
