"""Make a checkpoint of DeepSeek-V4-Flash's width with few layers: the released files' names and formats, random codes.

    python tests/bench/checkpoint_v4.py OUT --layers 3

FP4 experts with E8M0 scales for 32 codes, FP8 linears with E8M0 scales for 128 x 128, the rest bfloat16 and float32; of
three layers one attends to its window alone, one to compressed entries of 4 tokens that an indexer chooses, one to those
of 128 tokens, and the first two route by the token's hash. Written a tensor at a time, a shard for each layer (3.6 GB);
a tensor's bytes follow from its name. Codes are uniform, scales such that a matrix has a standard deviation of about
1 / sqrt(inputs).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint import END, tokenizer

CONFIG = Path(__file__).parent.parent / "configs" / "DeepSeek-V4-Flash" / "config.json"
RATIOS = (0, 4, 128)  # tokens of a compressed entry, in turn
HASHED = 2  # layers that route by the token
FP4_GROUP, BLOCK = 32, 128
NAMED_TOKENS = 50304  # those with a text; the others of the vocabulary are left nameless
# uniform codes: the root of the mean square of E2M1, and of E4M3 below 2^-1 (codes 0..47 of either sign)
E2M1_SIZE, E4M3_SIZE, E4M3_CODES = 2.93, 0.17, 48
AT_ONCE = 1 << 22  # elements that are made at once
ITEMS = {"BF16": 2, "F32": 4, "I64": 8, "I8": 1, "F8_E4M3": 1, "F8_E8M0": 1}

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # name -> safetensors dtype, shape


def config(layers: int) -> dict[str, Any]:
    """Return config.json: that of the released model with fewer layers, and without multi-token prediction."""
    ratios = [RATIOS[n % len(RATIOS)] for n in range(layers)]
    return {
        **json.loads(CONFIG.read_text()),
        "num_hidden_layers": layers, "num_hash_layers": min(HASHED, layers), "compress_ratios": [*ratios, 0],
    }  # fmt: skip


def shards(c: dict[str, Any]) -> Iterator[Tensors]:
    """Yield the tensors of each file: those around the layers, then a layer each."""
    hidden, streams = c["hidden_size"], c["hc_mult"]
    yield {
        "embed.weight": ("BF16", (c["vocab_size"], hidden)),
        "head.weight": ("BF16", (c["vocab_size"], hidden)),
        "norm.weight": ("BF16", (hidden,)),
        **_hyper_connection("hc_head_", streams, streams, hidden, 1),
    }
    for number, ratio in enumerate(c["compress_ratios"][: c["num_hidden_layers"]]):
        found = {**_attention(c, ratio), **_feed_forward(c, number < c["num_hash_layers"])}
        yield {f"layers.{number}.{name}": type_ for name, type_ in found.items()}


def _hyper_connection(prefix: str, rows: int, streams: int, hidden: int, scales: int) -> Tensors:
    sizes: dict[str, tuple[int, ...]] = {"fn": (rows, streams * hidden), "base": (rows,), "scale": (scales,)}
    return {prefix + leaf: ("F32", shape) for leaf, shape in sizes.items()}


def _attention(c: dict[str, Any], ratio: int) -> Tensors:
    hidden, heads, head, rank = c["hidden_size"], c["num_attention_heads"], c["head_dim"], c["q_lora_rank"]
    wide, streams = c["o_groups"] * c["o_lora_rank"], c["hc_mult"]
    found: Tensors = {
        "attn_norm.weight": ("BF16", (hidden,)),
        "ffn_norm.weight": ("BF16", (hidden,)),
        **_hyper_connection("hc_attn_", (2 + streams) * streams, streams, hidden, 3),
        **_hyper_connection("hc_ffn_", (2 + streams) * streams, streams, hidden, 3),
        **_blocks("attn.wq_a", rank, hidden),
        **_blocks("attn.wq_b", heads * head, rank),
        **_blocks("attn.wkv", head, hidden),
        **_blocks("attn.wo_a", wide, heads * head // c["o_groups"]),
        **_blocks("attn.wo_b", hidden, wide),
        "attn.q_norm.weight": ("BF16", (rank,)),
        "attn.kv_norm.weight": ("BF16", (head,)),
        "attn.attn_sink": ("F32", (heads,)),
    }
    compressors = {"attn.compressor": head} if ratio else {}
    if ratio == 4:
        compressors["attn.indexer.compressor"] = c["index_head_dim"]
        found |= _blocks("attn.indexer.wq_b", c["index_n_heads"] * c["index_head_dim"], rank)
        found["attn.indexer.weights_proj.weight"] = ("BF16", (c["index_n_heads"], hidden))
    for place, width in compressors.items():
        rows = width * (2 if ratio == 4 else 1)
        found |= {f"{place}.{leaf}.weight": ("BF16", (rows, hidden)) for leaf in ("wkv", "wgate")}
        found |= {f"{place}.ape": ("F32", (ratio, rows)), f"{place}.norm.weight": ("BF16", (width,))}
    return found


def _feed_forward(c: dict[str, Any], hashed: bool) -> Tensors:
    hidden, inner, experts = c["hidden_size"], c["moe_intermediate_size"], c["n_routed_experts"]
    found: Tensors = {"ffn.gate.weight": ("BF16", (experts, hidden))}
    if hashed:
        found["ffn.gate.tid2eid"] = ("I64", (c["vocab_size"], c["num_experts_per_tok"]))
    else:
        found["ffn.gate.bias"] = ("F32", (experts,))
    shapes = {"w1": (inner, hidden), "w2": (hidden, inner), "w3": (inner, hidden)}
    for name, (rows, width) in shapes.items():
        found |= _blocks(f"ffn.shared_experts.{name}", rows, width)
    for expert in range(experts):
        for name, (rows, width) in shapes.items():
            place = f"ffn.experts.{expert}.{name}"
            found[f"{place}.weight"] = ("I8", (rows, width // 2))
            found[f"{place}.scale"] = ("F8_E8M0", (rows, width // FP4_GROUP))
    return found


def _blocks(name: str, rows: int, width: int) -> Tensors:
    scales = (math.ceil(rows / BLOCK), math.ceil(width / BLOCK))
    return {f"{name}.weight": ("F8_E4M3", (rows, width)), f"{name}.scale": ("F8_E8M0", scales)}


def content(name: str, dtype: str, shape: tuple[int, ...], count: int) -> Iterator[np.ndarray]:
    """Yield the elements of a tensor, a few rows at a time; they follow from its name.

    `count` is the number of experts, which a token's hash names.
    """
    random = np.random.Generator(np.random.SFC64(zlib.crc32(name.encode())))
    rows = max(1, AT_ONCE // math.prod(shape[1:]))
    for start in range(0, shape[0], rows):
        part = (min(rows, shape[0] - start), *shape[1:])
        if dtype in ("I8", "F8_E4M3", "F8_E8M0"):
            yield _codes(random, dtype, part, experts=".experts." in name)
        elif dtype == "I64":  # distinct ids in a row: a first one, and steps that do not come round
            first = random.integers(0, count, (part[0], 1))
            yield (first + np.arange(shape[1]) * random.integers(1, count // shape[1], (part[0], 1))) % count
        else:
            values = random.standard_normal(part, np.float32)
            if len(shape) == 1:  # norms and scales lie around 1, biases and sinks around 0
                values = 0.1 * values + np.float32(0 if name.endswith(("bias", "base", "sink")) else 1)
            elif "embed" not in name and not name.endswith("ape"):
                values /= np.float32(math.sqrt(shape[-1]))
            yield values if dtype == "F32" else _bf16(values)


def _codes(random: np.random.Generator, dtype: str, shape: tuple[int, ...], experts: bool) -> np.ndarray:
    """Return codes, or scales of codes: those of experts lie in groups, the others in blocks."""
    if dtype == "F8_E8M0":
        group, size = (FP4_GROUP, E2M1_SIZE) if experts else (BLOCK, E4M3_SIZE)
        least = 127 + math.floor(math.log2(1 / (size * math.sqrt(shape[-1] * group))))
        return random.integers(least, least + 2, shape, np.uint8)
    codes = np.frombuffer(random.bytes(math.prod(shape)), np.uint8)
    return codes if dtype == "I8" else codes % E4M3_CODES | codes & 0x80


def _bf16(values: np.ndarray) -> np.ndarray:
    """Return the bits of the nearest bfloat16 numbers, as u16."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def write(folder: Path, wanted: dict[str, Any]) -> Path:
    """Write the checkpoint of a config, unless the folder holds this one already; return the folder."""
    layers, text = wanted["num_hidden_layers"], json.dumps(wanted, indent=2) + "\n"
    done = folder / "config.json"  # written last
    if done.is_file() and done.read_text() == text:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    places, total = {}, 0
    for number, found in enumerate(shards(wanted)):
        file = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        total += _write_shard(folder / file, found, wanted["n_routed_experts"])
        places |= dict.fromkeys(found, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    words = tokenizer(min(NAMED_TOKENS, wanted["vocab_size"]))
    (folder / "tokenizer.json").write_text(json.dumps(words, ensure_ascii=False))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=2) + "\n")
    done.write_text(text)
    return folder


def _write_shard(path: Path, found: Tensors, count: int) -> int:
    """Write a safetensors file (8 bytes of length, a header in JSON, the tensors) and return the bytes of its tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in found.items():
        start, end = end, end + math.prod(shape) * ITEMS[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in found.items():
            for part in content(name, dtype, shape, count):
                file.write(part.data)
    return end


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=3, metavar="N", help="default 3")
    given = parser.parse_args()
    print(write(given.out, config(given.layers)))


if __name__ == "__main__":
    main()
