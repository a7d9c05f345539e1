"""Train examples/tiny-moe: a small Qwen3-MoE language model of Python source, made from the standard library.

The text is the standard library of the Python that runs this script, without its tests; one file in sixteen, chosen
by a hash of its path, is held out. The tokenizer (byte-level BPE), the data order and the initial weights follow from
the seed, so that a number of steps gives the same model on the same machine and Python.

    python examples/train_tiny_moe.py --out examples/tiny-moe --steps 2200

takes about 40 minutes on one core. It prints bits per byte on the held-out files and the load of the experts.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

END = "<|endoftext|>"
VOCABULARY = 2048
CONTEXT = 256
SKIPPED = {"test", "tests", "idle_test", "site-packages", "pydoc_data", "lib2to3", "turtledemo", "__pycache__", "ensurepip"}


def read_files() -> tuple[list[str], list[str]]:
    """Return the texts of the training files and of the held-out files, in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train: list[str] = []
    held_out: list[str] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        # codec tables are numbers, not prose of a programmer
        if SKIPPED & set(relative.parts) or relative.parts[0] == "encodings" or path.stat().st_size > 300_000:
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        chosen = hashlib.sha256(relative.as_posix().encode()).digest()[0] < 16
        (held_out if chosen else train).append(text)
    return train, held_out


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer; every text can be encoded, and decoding gives it back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=2048
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Return all texts as one line of tokens, each text begun with the end token."""
    end = tokenizer.convert_tokens_to_ids(END)
    backend = tokenizer.backend_tokenizer
    return torch.tensor([token for text in texts for token in [end, *backend.encode(text).ids]])


def make_model() -> Qwen3MoeForCausalLM:
    """Return the untrained model: 4 layers of 16 experts, 2 of them chosen."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, num_experts=16, num_experts_per_tok=2, moe_intermediate_size=128, intermediate_size=512,
        norm_topk_prob=True, tie_word_embeddings=True, max_position_embeddings=2048, bos_token_id=0, eos_token_id=0,
        pad_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, use_sliding_window=False,
        router_aux_loss_coef=0.02, initializer_range=0.04,
    )  # fmt: skip
    ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts)
    return AutoModelForCausalLM.from_config(config, experts_implementation="sorted", attn_implementation="sdpa")


def sorted_experts(module: torch.nn.Module, x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Run each expert once, on the rows that chose it: on a CPU quicker than one batched product."""
    order = ids.flatten().argsort(stable=True)
    token = order // ids.shape[1]
    counts = ids.flatten().bincount(minlength=module.num_experts).tolist()
    results = []
    for expert, rows in enumerate(x[token].split(counts)):
        gate, up = functional.linear(rows, module.gate_up_proj[expert]).chunk(2, dim=-1)
        results.append(functional.linear(functional.silu(gate) * up, module.down_proj[expert]))
    weighted = torch.cat(results) * gates.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, token, weighted.to(x.dtype))


def balance_loss(router_logits: tuple[torch.Tensor, ...], k: int) -> torch.Tensor:
    """Return the load-balancing loss of each layer, averaged (Fedus et al. 2021): experts x sum(share x probability)."""
    losses = []
    for logits in router_logits:
        probability = logits.float().softmax(-1)
        share = functional.one_hot(probability.topk(k).indices, logits.shape[-1]).sum(1).float().mean(0) / k
        losses.append(logits.shape[-1] * (share * probability.mean(0)).sum())
    return torch.stack(losses).mean()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return a warmup of 100 steps, then half a cosine down to a fiftieth of the peak."""
    if step < 100:
        return peak * (step + 1) / 100
    progress = (step - 100) / max(1, steps - 100)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: Qwen3MoeForCausalLM, tokens: torch.Tensor, steps: int, batch: int, peak: float, seed: int) -> None:
    """Train for a number of steps on random windows of the text."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(seed)
    begun = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        starts = torch.randint(len(tokens) - CONTEXT - 1, (batch,), generator=generator)
        windows = torch.stack([tokens[s : s + CONTEXT + 1] for s in starts.tolist()])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(windows[:, :-1], output_router_logits=False)
            loss = functional.cross_entropy(output.logits.flatten(0, 1).float(), windows[:, 1:].flatten())
            balance = balance_loss(tuple(ROUTER_LOGITS), model.config.num_experts_per_tok)
        ROUTER_LOGITS.clear()
        (loss + 0.02 * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            speed = (step + 1) * batch * CONTEXT / (time.time() - begun)
            print(f"step {step:5d}  loss {loss.item():.3f}  balance {balance.item():.3f}  {speed:.0f} tokens/s", flush=True)


ROUTER_LOGITS: list[torch.Tensor] = []  # filled by a hook on every router, emptied after each step


def watch_routers(model: Qwen3MoeForCausalLM) -> None:
    """Collect the router logits of every forward pass."""
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, output: ROUTER_LOGITS.append(output[0]))


@torch.no_grad()
def evaluate(folder: Path, texts: list[str]) -> tuple[float, float]:
    """Return (bits per byte, lowest load of any expert over the mean load) of a saved checkpoint, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    watch_routers(model)
    ROUTER_LOGITS.clear()
    nats, count, loads = 0.0, 0, torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    for text in texts:
        tokens = encode(tokenizer, [text])
        for start in range(0, len(tokens) - 1, CONTEXT):
            window = tokens[start : start + CONTEXT + 1]
            logits = model(window[None, :-1]).logits[0]
            nats += functional.cross_entropy(logits, window[1:], reduction="sum").item()
            for layer, router in enumerate(ROUTER_LOGITS):
                chosen = router.topk(model.config.num_experts_per_tok).indices
                loads[layer] += chosen.flatten().bincount(minlength=model.config.num_experts)
            ROUTER_LOGITS.clear()
        count += len(text.encode())
    return nats / math.log(2) / count, (loads.amin(1) / loads.mean(1)).min().item()


def sample(texts: list[str], size: int) -> str:
    """Return about `size` characters of held-out text: the beginnings of files, cut at a line."""
    pieces: list[str] = []
    for text in texts:
        piece = text[:4000]
        pieces.append(piece[: piece.rfind("\n") + 1])
        if sum(map(len, pieces)) > size:
            break
    return "\n".join(pieces)


def main() -> None:
    """Train, save in bfloat16, load again and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny-moe")
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--batch", type=int, default=16, help="windows of 256 tokens a step")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    texts, held_out = read_files()
    tokenizer = train_tokenizer(texts)
    tokens = encode(tokenizer, texts)
    print(f"{len(texts)} files, {sum(map(len, texts)) / 1e6:.1f} MB, {len(tokens) / 1e6:.2f} M tokens; "
          f"{len(held_out)} held-out files, {sum(map(len, held_out)) / 1e6:.2f} MB", flush=True)  # fmt: skip
    model = make_model()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    watch_routers(model)
    train(model, tokens, options.steps, options.batch, options.rate, options.seed)
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    (options.out / "heldout.txt").write_text(sample(held_out, 80_000), encoding="utf-8")
    bits, load = evaluate(options.out, held_out)
    print(f"held-out files: {bits:.3f} bits per byte; least used expert: {load:.2f} of the mean load")


if __name__ == "__main__":
    main()
