"""llama.cpp as a contender: convert the checkpoint to GGUF, quantize it, and time it through its C API.

Needs a Python with llama-cpp-python and gguf, the former built from its source package for this processor:

    python -m venv llama
    CMAKE_ARGS="-DGGML_NATIVE=ON" llama/bin/pip install --no-binary llama-cpp-python llama-cpp-python gguf
    llama/bin/python tests/bench/llama.py convert CHECKPOINT model-bf16.gguf
    llama/bin/python tests/bench/llama.py quantize model-bf16.gguf model-q4_0.gguf --threads 2
    llama/bin/python tests/bench/llama.py serve model-q4_0.gguf --threads 2

The conversion is what convert_hf_to_gguf.py of llama.cpp writes for OlmoeForCausalLM: matrices as they are (bfloat16),
router and norms in float32, the experts of a layer stacked.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import worker

Kind = gguf.GGMLQuantizationType

GLOBAL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.gate",
}  # fmt: skip
EXPERTS = ("gate", "up", "down")
ARCHITECTURES = ("olmoe", "qwen3moe")
BATCH = 512  # tokens that are evaluated at once


def convert(checkpoint: Path, out: Path, architecture: str) -> None:
    """Write a checkpoint of OlmoeForCausalLM as GGUF, a tensor at a time.

    As `qwen3moe` it is another model of the same sizes, for programs without OLMoE: its norms of queries and keys are those
    of one head, of which the first one's is taken.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    tensors = Checkpoint(checkpoint)
    writer = gguf.GGUFWriter(out, architecture)
    _write_settings(writer, config)
    head = config["hidden_size"] // config["num_attention_heads"]
    if architecture == "qwen3moe":
        writer.add_key_length(head)
        writer.add_value_length(head)
        writer.add_expert_feed_forward_length(config["intermediate_size"])
    _write_tokenizer(writer, json.loads((checkpoint / "tokenizer.json").read_text()), config)
    plan = list(_plan(config))
    for name, sources in plan:
        shape = (head,) if _cut_to_a_head(name, architecture) else tensors.shape(sources[0])
        wide = len(shape) == 1 or "ffn_gate_inp" in name
        shape = (len(sources), *shape) if name.endswith("_exps.weight") else shape
        count = int(np.prod(shape))
        kind, size = (Kind.F32, 4) if wide else (Kind.BF16, 2)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), count * size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, sources in plan:
        data = np.stack([tensors.read(s) for s in sources]) if len(sources) > 1 else tensors.read(sources[0])
        if data.ndim == 1 or "ffn_gate_inp" in name:
            data = (data.astype(np.uint32) << 16).view(np.float32)
        writer.write_tensor_data(data[:head] if _cut_to_a_head(name, architecture) else data)
    writer.close()


def _cut_to_a_head(name: str, architecture: str) -> bool:
    return architecture == "qwen3moe" and name.split(".")[-2] in ("attn_q_norm", "attn_k_norm")


def _plan(config: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Yield the name of each GGUF tensor and those of the checkpoint's tensors that it is stacked of."""
    for ours, theirs in GLOBAL.items():
        yield f"{ours}.weight", [f"{theirs}.weight"]
    for layer in range(config["num_hidden_layers"]):
        place = f"model.layers.{layer}"
        for ours, theirs in LAYER.items():
            yield f"blk.{layer}.{ours}.weight", [f"{place}.{theirs}.weight"]
        for part in EXPERTS:
            names = [f"{place}.mlp.experts.{e}.{part}_proj.weight" for e in range(config["num_experts"])]
            yield f"blk.{layer}.ffn_{part}_exps.weight", names


class Checkpoint:
    """The bfloat16 tensors of safetensors files, as uint16."""

    def __init__(self, folder: Path) -> None:
        self.places: dict[str, tuple[Path, int, tuple[int, ...]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                assert entry["dtype"] == "BF16", name
                self.places[name] = (path, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self.places[name][2]

    def read(self, name: str) -> np.ndarray:
        """Return the bits of a tensor."""
        path, offset, shape = self.places[name]
        return np.fromfile(path, np.uint16, int(np.prod(shape)), offset=offset).reshape(shape)


def _write_settings(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_name("olmoe")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    """Write a byte-level BPE tokenizer with GPT-2's pre-tokenizer."""
    model = tokenizer["model"]
    special = {entry["id"] for entry in tokenizer["added_tokens"] if entry["special"]}
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    kinds = [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_add_bos_token(False)


def quantize(source: Path, out: Path, threads: int) -> None:
    """Quantize a GGUF file to Q4_0 with llama.cpp's own defaults (the output matrix becomes Q6_K)."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.nthread = threads
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(settings))
    if status != 0:
        raise SystemExit(f"llama_model_quantize failed ({status})")


def sizes(path: Path) -> dict[str, Any]:
    """Return bytes of the file, bytes that a token reads (experts: those chosen; one embedding row), types by role."""
    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    keys = (f"{architecture}.{key}" for key in ("expert_count", "expert_used_count"))
    experts, chosen = (int(reader.fields[key].contents()) for key in keys)
    read, kinds = 0.0, {}
    for tensor in reader.tensors:
        share = 1.0
        if "_exps" in tensor.name:
            share = chosen / experts
        elif tensor.name == "token_embd.weight":
            share = 1 / int(tensor.shape[1])
        read += int(tensor.n_bytes) * share
        kinds[tensor.name.split(".")[-2]] = tensor.tensor_type.name
    return {"weights_bytes": path.stat().st_size, "bytes_per_token": round(read), "types": kinds}


class Llama:
    """A GGUF file in llama.cpp, its tokens given and its logits read without Python in between.

    The cache is in float16; `flash` computes attention in one pass over it.
    """

    def __init__(self, path: Path, threads: int, context: int, sequences: int, flash: bool) -> None:
        import llama_cpp

        self.path, self.api = path, llama_cpp
        _quiet(llama_cpp)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = context
        settings.n_seq_max, settings.kv_unified = sequences, True
        settings.flash_attn_type = int(flash)  # LLAMA_FLASH_ATTN_TYPE_DISABLED and _ENABLED
        settings.n_batch = settings.n_ubatch = BATCH
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.model or not self.context:
            raise SystemExit(f"llama.cpp cannot load {path}")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch, self.past = llama_cpp.llama_batch_init(BATCH, 0, 1), 0

    def prefill(self, prompt: Sequence[int]) -> float:
        """Evaluate a prompt of at most 512 tokens at once; the logits are those of its last token."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        start = time.perf_counter()
        self._evaluate(prompt)
        self._likeliest()
        return time.perf_counter() - start

    def decode(self, prompt: Sequence[int], steps: int) -> float:
        """Take greedy steps; choosing the token is a maximum over llama.cpp's own buffer."""
        self.prefill(prompt)
        token = self._likeliest()
        start = time.perf_counter()
        for _ in range(steps):
            self._evaluate([token])
            token = self._likeliest()
        return time.perf_counter() - start

    def fill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Evaluate prompts, each a sequence of its own."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        self.past = len(prompts[0])
        for row, prompt in enumerate(prompts):
            for start in range(0, self.past, BATCH):
                part = prompt[start : start + BATCH]
                self._together([(token, start + i, row) for i, token in enumerate(part)], logits=False)

    def steps(self, tokens: Sequence[Sequence[int]]) -> float:
        """Take a step for the first tokens and time the others, behind the prompts: later tokens are forgotten before."""
        memory = self.api.llama_get_memory(self.context)
        for row in range(len(tokens[0])):
            self.api.llama_memory_seq_rm(memory, row, self.past, -1)
        start = 0.0
        for number, column in enumerate(tokens):
            if number == 1:
                start = time.perf_counter()
            self._together([(token, self.past + number, row) for row, token in enumerate(column)], logits=True)
            for row in range(len(column)):
                self._likeliest(row)
        return time.perf_counter() - start

    def _together(self, entries: Sequence[tuple[int, int, int]], logits: bool) -> None:
        """Evaluate tokens at positions of sequences in one step."""
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (token, position, row) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, logits
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
        if self.api.llama_decode(self.context, batch) != 0:
            raise SystemExit("llama_decode failed")

    def facts(self) -> dict[str, Any]:
        """Return sizes, and how llama.cpp was built."""
        system = self.api.llama_print_system_info().decode()
        return {**sizes(self.path), "version": version("llama-cpp-python"), "system": system}

    def _evaluate(self, tokens: Sequence[int]) -> None:
        array = (self.api.llama_token * len(tokens))(*tokens)
        if self.api.llama_decode(self.context, self.api.llama_batch_get_one(array, len(tokens))) != 0:
            raise SystemExit("llama_decode failed")

    def _likeliest(self, place: int = -1) -> int:
        logits = self.api.llama_get_logits_ith(self.context, place)  # waits until they are there
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())


def _quiet(llama_cpp: Any) -> None:
    """Drop llama.cpp's log below errors."""

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, _: Any) -> None:
        if level >= 4:  # GGML_LOG_LEVEL_ERROR
            print(text.decode(errors="replace"), end="")

    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    llama_cpp.kept_log = log  # ctypes does not keep it


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("convert", "quantize", "serve", "sizes"))
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="olmoe", help="of convert (default olmoe)")
    parser.add_argument("--context", type=int, default=worker.CONTEXT, help="slots of the cache, of all sequences")
    parser.add_argument("--sequences", type=int, default=1, help="sequences that are evaluated together")
    parser.add_argument("--flash", action="store_true", help="compute attention in one pass over the cache")
    given = parser.parse_args()
    match given.action:
        case "convert":
            convert(given.source, given.out, given.architecture)
        case "quantize":
            quantize(given.source, given.out, given.threads)
        case "sizes":
            print(json.dumps(sizes(given.source), indent=2))
        case "serve":
            import llama_cpp  # noqa: F401 - importing is not loading

            reader = gguf.GGUFReader(given.source)
            architecture = reader.fields["general.architecture"].contents()
            vocabulary = int(reader.fields[f"{architecture}.vocab_size"].contents())
            settings = (given.threads, given.context, given.sequences, given.flash)
            worker.serve(lambda: Llama(given.source, *settings), vocabulary)


if __name__ == "__main__":
    main()
