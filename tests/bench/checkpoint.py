"""Make the OLMoE-shaped checkpoint of the benchmark: random bfloat16 weights, a tokenizer, no download.

    python tests/bench/checkpoint.py OUT --layers 4

Written a layer at a time, a shard each, so that memory stays at one layer (0.9 GB) whatever the number of layers. A
tensor's values follow from its name alone: a model of 8 layers begins with the layers of the model of 4. The standard
deviation of a matrix is 1 / sqrt(inputs), which keeps hidden states and router logits at the scale of a trained model;
experts are then chosen by the token, and no layer's output collapses.
"""

from __future__ import annotations

import argparse
import json
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

END = "<|endoftext|>"
BYTES = 256


@dataclass(frozen=True)
class Sizes:
    """The shape of the model; the defaults are OLMoE-1B-7B's, with fewer layers."""

    layers: int = 4
    hidden: int = 2048
    expert: int = 1024
    experts: int = 64
    chosen: int = 8
    heads: int = 16
    vocabulary: int = 50304
    context: int = 32768  # of OLMoE-1B-7B 4096: no weight depends on it

    def config(self) -> dict[str, Any]:
        """Return config.json."""
        return {
            "architectures": ["OlmoeForCausalLM"],
            "model_type": "olmoe",
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.expert,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "num_experts": self.experts,
            "num_experts_per_tok": self.chosen,
            "norm_topk_prob": False,
            "max_position_embeddings": self.context,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "attention_bias": False,
            "clip_qkv": None,
            "tie_word_embeddings": False,
            "vocab_size": self.vocabulary,
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": 0,
        }


Shapes = dict[str, tuple[int, ...]]


def shards(sizes: Sizes) -> Iterator[Shapes]:
    """Yield the tensors of each file: the embedding and the head, then a layer each."""
    hidden = sizes.hidden
    yield {
        "model.embed_tokens.weight": (sizes.vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (sizes.vocabulary, hidden),
    }
    for layer in range(sizes.layers):
        name = f"model.layers.{layer}"
        found: Shapes = {f"{name}.self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"}
        norms = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
        found |= {f"{name}.{norm}.weight": (hidden,) for norm in norms}
        found[f"{name}.mlp.gate.weight"] = (sizes.experts, hidden)
        for expert in range(sizes.experts):
            place = f"{name}.mlp.experts.{expert}"
            found |= {f"{place}.{part}_proj.weight": (sizes.expert, hidden) for part in ("gate", "up")}
            found[f"{place}.down_proj.weight"] = (hidden, sizes.expert)
        yield found


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the float32 values of a tensor; they follow from its name."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    if len(shape) == 1:  # a norm's weights lie around 1
        return 1 + 0.1 * noise
    return noise if "embed" in name else noise / np.float32(np.sqrt(shape[-1]))


def tokenizer(vocabulary: int) -> dict[str, Any]:
    """Return a byte-level BPE tokenizer.json: an end token, the 256 bytes, then pairs of bytes as far as they go."""
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [256 + i for i in range(BYTES - len(letters))]  # GPT-2's letters of the bytes that do not print
    alphabet = [chr(c) for c in letters + others]
    space = chr(256 + 32)
    alphabet.sort(key=lambda c: (c != space, not c.islower(), c))  # pairs that occur in text come first
    merges = [(a, b) for a in alphabet for b in alphabet if b != space][: vocabulary - BYTES - 1]
    tokens = [END, *alphabet, *(a + b for a, b in merges)]
    if len(tokens) != vocabulary:
        raise SystemExit(f"a vocabulary of {vocabulary} cannot be made, {BYTES + 1} to {len(tokens)} can")
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 0, "content": END, **special}],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [list(pair) for pair in merges],
        },
    }


def write(folder: Path, sizes: Sizes) -> Path:
    """Write the checkpoint, unless the folder holds this one already; return the folder."""
    config = json.dumps(sizes.config(), indent=2) + "\n"
    done = folder / "config.json"  # written last
    if done.is_file() and done.read_text() == config:
        return folder
    words = json.dumps(tokenizer(sizes.vocabulary), ensure_ascii=False)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    places, total = {}, 0
    for number, shapes in enumerate(shards(sizes)):
        file = f"model-{number:05d}-of-{sizes.layers + 1:05d}.safetensors"
        total += _write_shard(folder / file, shapes)
        places |= dict.fromkeys(shapes, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    (folder / "tokenizer.json").write_text(words)
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=2) + "\n")
    done.write_text(config)
    return folder


def _write_shard(path: Path, shapes: Shapes) -> int:
    import torch
    from safetensors.torch import save_file

    tensors = {name: torch.from_numpy(values(name, shape)).to(torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return sum(t.nbytes for t in tensors.values())


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name, default in vars(Sizes()).items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default {default}")
    given = vars(parser.parse_args())
    print(write(given.pop("out"), Sizes(**given)))


if __name__ == "__main__":
    main()
