"""How often the top-1 tokens of a small model in bf16 agree: of artifacts, of transformers, and of transformers with itself.

    python tests/bench/agreement.py examples/tiny-moe ARTIFACT...

Prints the share of equal tokens of the sample text, each with each, and for every token that an artifact and transformers
choose otherwise how far apart the two choices are in f32, beside the step of a bf16 of the size of the largest logit.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from moec.compiler.runtime.artifact import Artifact
from moec.compiler.runtime.compare import SAMPLE
from moec.compiler.runtime.reference import Reference
from transformers import AutoModelForCausalLM

TOKENS = 200


def read_logits(runner, tokens):
    """Return the logits [tokens, vocabulary] of a runner."""
    ids = np.array([tokens])
    return runner.step(ids, np.ones_like(ids), np.arange(len(tokens))[None])[0][0]


def source_logits(source, tokens, dtype, attention):
    """Return the logits of the source model in a dtype, with an implementation of attention of transformers."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation=attention).eval()
    return read_logits(Reference.of(model, source), tokens)


def print_flips(name, found, other, exact):
    """Print the tokens that two choose otherwise."""
    print(f"\n{name} and transformers in bf16 with eager attention choose otherwise:")
    ours, theirs = found.argmax(-1), other.argmax(-1)
    for i in np.nonzero(ours != theirs)[0]:
        largest = exact[i].max()
        step = 2.0 ** (np.floor(np.log2(abs(largest))) - 7)
        apart = [logits[i, ours[i]] - logits[i, theirs[i]] for logits in (exact, found, other)]
        print(
            f"token {i}: {apart[0]:+.4f} apart in f32, {apart[1]:+.4f} here, {apart[2]:+.4f} there; a step is {step:.4f}"
        )


def main():
    """Read the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("artifacts", nargs="+", type=Path)
    given = parser.parse_args()
    opened = {path.name: Artifact.open(path) for path in given.artifacts}
    tokens = next(iter(opened.values())).tokenizer.encode(SAMPLE.read_text("utf-8"))[:TOKENS]
    exact = source_logits(given.source, tokens, torch.float32, "eager")
    logits = {"f32": exact, "f32, logits in bf16": torch.from_numpy(exact).bfloat16().float().numpy()}
    logits |= {f"bf16, {a}": source_logits(given.source, tokens, torch.bfloat16, a) for a in ("eager", "sdpa")}
    logits |= {name: read_logits(artifact.session(threads=1), tokens) for name, artifact in opened.items()}
    logits = {name: found[:-1] for name, found in logits.items()}  # nothing follows the last token
    print("| |", " | ".join(logits), "|")
    for name, found in logits.items():
        shares = [np.mean(found.argmax(-1) == other.argmax(-1)) for other in logits.values()]
        print(f"| {name} |", " | ".join(f"{share:.2%}" for share in shares), "|")
    for name in opened:
        print_flips(name, logits[name], logits["bf16, eager"], logits["f32"])


if __name__ == "__main__":
    main()
