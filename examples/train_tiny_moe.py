"""Train examples/tiny-moe: a small Qwen3-MoE language model of Python source, made from the standard library.

The text is the standard library of the Python that runs this script, without its tests and tables; one file in
sixteen, chosen by a hash of its path, is held out. The tokenizer (byte-level BPE), the order of the data and the
initial weights follow from the seed, so a number of steps gives the same model on the same machine and Python.

    python examples/train_tiny_moe.py --out examples/tiny-moe

It takes about half an hour on one core. The script ends by loading what it saved with transformers, in float32, and
prints the bits per byte of the held-out files and the load of every layer's experts on them.

The training step does not go through the forward pass of transformers, which was half as fast on a CPU: it reads the
parameters of the transformers model and computes the same function in bfloat16, with the rows of each expert sorted
together. The two are compared before training starts.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

END = "<|endoftext|>"
VOCABULARY = 2048
EXPERTS = 16
CHOSEN = 2
HEAD_SIZE = 64
EPSILON = 1e-6
THETA = 10000.0
TOKENS_PER_STEP = 4096
# tokens of a window: few while the model learns the words, many at the end, when it learns to look back
SHORT, LONG, LONG_FROM = 256, 1024, 0.7
DECAY_FROM = 0.6  # the part of the training after which the learning rate falls
PROMPT = "def read_lines(path):"  # completed by the report; its end is no space, which would begin the next token
# encodings are tables of numbers, and pydoc_data is one file of documentation
SKIPPED = {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data", "__pycache__"}


# ---------------------------------------------------------------------------------------------------------------- text


def read_files() -> tuple[dict[str, str], dict[str, str]]:
    """Return the training files and the held-out files, text by path, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    train: dict[str, str] = {}
    held_out: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED & set(relative.parts):
            continue
        chosen = hashlib.sha256(relative.as_posix().encode()).digest()[0] < 16
        texts = held_out if chosen else train
        texts[relative.as_posix()] = path.read_text(encoding="utf-8", errors="ignore")
    return train, held_out


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer; every text can be encoded, and decoding gives it back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Return all texts as one line of tokens: the end token before each text, so that it also begins one."""
    end = tokenizer.convert_tokens_to_ids(END)
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in (end, *ids)])


# --------------------------------------------------------------------------------------------------- the training step


def make_model() -> Qwen3MoeForCausalLM:
    """Return the untrained model."""
    settings: dict[str, Any] = dict(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_SIZE,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        moe_intermediate_size=128,
        intermediate_size=512,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        rms_norm_eps=EPSILON,
        router_aux_loss_coef=0.01,
        initializer_range=0.03,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Return x over its root mean square, in bfloat16."""
    x = x.float()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * weight).bfloat16()


def norm_rotate(x: Tensor, weight: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Return the normed and rotated heads of (batch, time, heads x size) as (batch, heads, time, size)."""
    x = x.unflatten(-1, (-1, HEAD_SIZE)).transpose(1, 2).float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * weight
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).bfloat16()


def route(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gates and numbers of the chosen experts of each row, and the loss of an uneven choice.

    The loss is that of Fedus et al. (2021): experts x sum over experts of (share of the choices x mean probability).
    """
    probability = logits.float().softmax(-1)
    top, ids = probability.topk(CHOSEN, dim=-1)
    share = functional.one_hot(ids, EXPERTS).sum((0, 1)) / ids.numel()
    return top / top.sum(-1, keepdim=True), ids, EXPERTS * (share * probability.mean(0)).sum()


def gated(x: Tensor) -> Tensor:
    """Return silu(first half) x second half."""
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


def rotation(length: int) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of the rotary embedding, (time, head size / 2)."""
    frequency = THETA ** (-torch.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)
    angle = torch.arange(length)[:, None] * frequency
    return angle.cos(), angle.sin()


def attend(q: Tensor, k: Tensor, v: Tensor, block: int = 128) -> Tensor:
    """Return causal attention, (batch, heads, time, size), a block of queries at a time.

    Plain products are twice as fast in bfloat16 on a CPU as scaled_dot_product_attention, and a block of queries need
    not look at the keys after it. Query heads that share a key head are rows of the same product.
    """
    batch, heads, time_, size = q.shape
    groups = k.shape[1]
    q = q.reshape(batch * groups, heads // groups, time_, size)
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    results = []
    for start in range(0, time_, block):
        end = min(start + block, time_)
        mask = torch.full((end - start, end), -math.inf, dtype=q.dtype).triu(start + 1)
        mask = mask.repeat(heads // groups, 1).expand(batch * groups, -1, -1)
        rows = q[:, :, start:end].flatten(1, 2)
        scores = torch.baddbmm(mask, rows, k[:, :end].transpose(1, 2), alpha=size**-0.5)
        results.append((scores.softmax(-1) @ v[:, :end]).unflatten(1, (heads // groups, -1)))
    return torch.cat(results, dim=2).view(batch, heads, time_, size)


def attention(layer: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Return the attention of one layer, (batch, time, hidden)."""
    at = layer.self_attn
    q = norm_rotate(functional.linear(x, at.q_proj.weight.bfloat16()), at.q_norm.weight, cosine, sine)
    k = norm_rotate(functional.linear(x, at.k_proj.weight.bfloat16()), at.k_norm.weight, cosine, sine)
    v = functional.linear(x, at.v_proj.weight.bfloat16()).unflatten(-1, (-1, HEAD_SIZE)).transpose(1, 2)
    mixed = attend(q, k, v).transpose(1, 2).flatten(2)
    return functional.linear(mixed, at.o_proj.weight.bfloat16())


def each_expert(rows: Tensor, counts: list[int], weight: Tensor) -> Tensor:
    """Return the product of each expert's weight, (experts, out, in), with its own run of rows."""
    runs = zip(rows.split(counts), weight.bfloat16().unbind(), strict=True)
    return torch.cat([functional.linear(run, matrix) for run, matrix in runs])


def experts(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the experts' result for rows (tokens, hidden), and the loss of an uneven choice."""
    gates, ids, balance = route(functional.linear(x, layer.mlp.gate.weight.bfloat16()))
    order = ids.flatten().argsort(stable=True)
    counts = ids.flatten().bincount(minlength=EXPERTS).tolist()
    rows = x.index_select(0, order // CHOSEN)
    rows = gated(each_expert(rows, counts, layer.mlp.experts.gate_up_proj))
    rows = each_expert(rows, counts, layer.mlp.experts.down_proj)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    rows = rows.index_select(0, back).unflatten(0, (-1, CHOSEN))
    return torch.einsum("tkh,tk->th", rows, gates.bfloat16()), balance


def hidden_states(model: Qwen3MoeForCausalLM, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the last norm gives for tokens (batch, time), in bfloat16, and the mean balance loss."""
    cosine, sine = rotation(tokens.shape[1])
    x = functional.embedding(tokens, model.model.embed_tokens.weight)
    balances = []
    for layer in model.model.layers:
        x = x + attention(layer, rms_norm(x, layer.input_layernorm.weight), cosine, sine)
        rows, balance = experts(layer, rms_norm(x, layer.post_attention_layernorm.weight).flatten(0, 1))
        x = x + rows.view_as(x)
        balances.append(balance)
    return rms_norm(x, model.model.norm.weight), torch.stack(balances).mean()


class HeadLoss(torch.autograd.Function):
    """Mean cross entropy of a linear head, a few rows at a time: the logits never leave the cache."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        """Compute the loss and, since its own gradient is a number, all gradients along with it."""
        weight = weight.bfloat16()
        row_gradient, weight_gradient = torch.empty_like(rows), torch.zeros(weight.shape)
        total = torch.zeros(())
        for start in range(0, len(rows), 512):
            part, target = rows[start : start + 512], targets[start : start + 512, None]
            logits = (part @ weight.T).float()
            logits -= logits.amax(-1, keepdim=True)
            total -= logits.gather(1, target).sum()
            sums = logits.exp_().sum(-1, keepdim=True)
            total += sums.log().sum()
            logits /= sums
            logits.scatter_add_(1, target, torch.full(target.shape, -1.0))
            gradient = logits.bfloat16()
            row_gradient[start : start + 512] = gradient @ weight
            weight_gradient += gradient.T @ part
        ctx.save_for_backward(row_gradient / len(rows), weight_gradient / len(rows))
        return total / len(rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        """Scale the gradients kept by forward."""
        rows, weight = ctx.saved_tensors
        return rows * gradient, weight * gradient, None


def losses(model: Qwen3MoeForCausalLM, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean cross entropy of windows (batch, time + 1), and the balance loss."""
    hidden, balance = hidden_states(model, windows[:, :-1])
    return HeadLoss.apply(hidden.flatten(0, 1), model.lm_head.weight, windows[:, 1:].flatten()), balance


# ------------------------------------------------------------------------------------------------------------- training


def orthogonal(matrices: Tensor) -> Tensor:
    """Return matrices (n, rows, columns) with singular values brought near 1 (the Newton-Schulz steps of Muon)."""
    x = matrices.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


class Muon:
    """The Muon optimizer (Jordan et al. 2024) for weight matrices: the momentum, made orthogonal, is the update.

    Its authors find that it needs fewer steps than AdamW; making the updates orthogonal costs a sixth of a step here.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], weight_decay: float) -> None:
        """Take parameters of shape (out, in) or (experts, out, in)."""
        self.parameters = list(parameters.values())
        self.parts = {parameter: 2 if "gate_up" in name else 1 for name, parameter in parameters.items()}
        self.weight_decay = weight_decay
        self.momentum = [torch.zeros_like(parameter) for parameter in self.parameters]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update the parameters from their gradients, and forget the gradients."""
        for parameter, momentum in zip(self.parameters, self.momentum, strict=True):
            assert parameter.grad is not None
            momentum.lerp_(parameter.grad, 0.05)
            update = parameter.grad.lerp(momentum, 0.95)
            parameter.grad = None
            # of a gate_up_proj, (experts, 2 x inner, hidden), the gates and the ups are made orthogonal apart
            matrices = update.view(-1, update.shape[-2] // self.parts[parameter], update.shape[-1])
            wide = matrices.shape[1] <= matrices.shape[2]
            matrices = orthogonal(matrices if wide else matrices.mT)
            matrices = matrices if wide else matrices.mT
            parameter.mul_(1 - rate * self.weight_decay)
            parameter.add_(matrices.reshape(parameter.shape), alpha=-rate)


def split_parameters(model: Qwen3MoeForCausalLM) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Return the matrices of attention and experts, for Muon, and all other parameters, for Adam."""
    named = dict(model.named_parameters())
    matrices = {name: parameter for name, parameter in named.items() if "_proj" in name}
    return matrices, {name: parameter for name, parameter in named.items() if name not in matrices}


def windows(tokens: Tensor, length: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Return batches of windows (batch, length + 1) without end; an epoch has every token once, in a random order."""
    while True:
        first = int(torch.randint(length, (), generator=generator))
        starts = torch.arange(first, len(tokens) - length, length)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        for batch in starts.split(TOKENS_PER_STEP // length):
            yield tokens[batch[:, None] + torch.arange(length + 1)]


def schedule(step: int, steps: int) -> float:
    """Return the part of the peak learning rate: a warmup, a steady stage, then a line down to zero."""
    return min(1.0, (step + 1) / 100, (1 - step / steps) / (1 - DECAY_FROM))


def train(
    model: Qwen3MoeForCausalLM, tokens: Tensor, held_out: Tensor, folder: Path, options: argparse.Namespace
) -> None:
    """Train for options.steps, saving the model in the folder now and then."""
    matrices, others = split_parameters(model)
    muon = Muon(matrices, weight_decay=0.05)
    adam = torch.optim.AdamW(others.values(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(options.seed)
    batches = {length: windows(tokens, length, generator) for length in (SHORT, LONG)}
    begun = time.perf_counter()
    for step in range(options.steps):
        length = SHORT if step < LONG_FROM * options.steps else LONG
        loss, balance = losses(model, next(batches[length]))
        (loss + options.balance * balance).backward()
        part = schedule(step, options.steps)
        muon.step(options.muon_rate * part)
        adam.param_groups[0]["lr"] = options.adam_rate * part
        adam.step()
        adam.zero_grad()
        if step % 50 == 0 or step == options.steps - 1:
            speed = (step + 1) * TOKENS_PER_STEP / (time.perf_counter() - begun)
            print(f"step {step:5d}  loss {loss:.3f}  balance {balance:.3f}  {speed:5.0f} tokens/s", flush=True)
        if step % 500 == 499:
            print(f"step {step:5d}  held-out loss {quick_loss(model, held_out):.3f}", flush=True)
            model.save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------- figures


@torch.no_grad()
def quick_loss(model: Qwen3MoeForCausalLM, tokens: Tensor) -> float:
    """Return the mean cross entropy of some windows of the held-out files, nats per token."""
    starts = torch.arange(0, len(tokens) - SHORT, 4 * SHORT)
    return losses(model, tokens[starts[:, None] + torch.arange(SHORT + 1)])[0].item()


def check_step(model: Qwen3MoeForCausalLM, tokens: Tensor) -> None:
    """Compare the loss of the training step with that of transformers."""
    window = tokens[None, : SHORT + 1]
    with torch.no_grad():
        expected = functional.cross_entropy(model(window[:, :-1]).logits[0], window[0, 1:]).item()
        got = losses(model, window)[0].item()
    if abs(got - expected) > 0.01:
        raise RuntimeError(f"the training step computes {got:.4f}, transformers {expected:.4f}")


@torch.no_grad()
def evaluate(folder: Path, texts: list[str]) -> tuple[float, Tensor]:
    """Return (bits per byte, choices of each expert by layer) of a saved checkpoint, by transformers in float32."""
    model = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    loads = torch.zeros(len(model.model.layers), EXPERTS)

    def count(layer: int, logits: Tensor) -> None:
        loads[layer] += logits.topk(CHOSEN, dim=-1).indices.flatten().bincount(minlength=EXPERTS)

    for number, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_hook(lambda module, args, output, number=number: count(number, output[0]))
    nats = 0.0
    for text in texts:
        tokens = encode(tokenizer, [text])
        for start in range(0, len(tokens) - 1, LONG):
            window = tokens[start : start + LONG + 1]
            logits = model(window[None, :-1]).logits[0]
            nats += functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return nats / math.log(2) / sum(len(text.encode()) for text in texts), loads


@torch.no_grad()
def complete(folder: Path, prompt: str, length: int) -> str:
    """Return the prompt and the tokens that the saved checkpoint finds most likely after it."""
    model: Any = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokens = encode(tokenizer, [prompt])[None]
    result = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=length, do_sample=False)
    return str(tokenizer.decode(result[0, 1:]))


def sample(held_out: dict[str, str], least: int = 60_000, most: int = 90_000) -> str:
    """Return whole held-out files, in the order of the hashes of their paths, of `least` to `most` bytes in all."""
    chosen = ""
    for path in sorted(held_out, key=lambda path: hashlib.sha256(path.encode()).digest()):
        if len(chosen.encode()) < least and len((chosen + held_out[path]).encode()) <= most:
            chosen += held_out[path]
    return chosen


def report(folder: Path, held_out: list[str]) -> None:
    """Print the figures of a saved checkpoint."""
    bits, loads = evaluate(folder, held_out)
    print(f"held-out files: {bits:.4f} bits per byte")
    for layer, load in enumerate(loads):
        low, high = (load.min() / load.mean()).item(), (load.max() / load.mean()).item()
        print(f"layer {layer}: load of the experts over the mean load, least {low:.2f}, most {high:.2f}")
    bits, _ = evaluate(folder, [(folder / "heldout.txt").read_text(encoding="utf-8")])
    print(f"heldout.txt: {bits:.4f} bits per byte")
    print(complete(folder, PROMPT, 120))


def move(source: Path, target: Path) -> None:
    """Move the files of a folder into another, which keeps its other files, and remove the first."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        path.chmod(0o644)  # save_pretrained lets nobody else read the weights
        path.replace(target / path.name)
    source.rmdir()


def arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny-moe", help="folder to write")
    parser.add_argument("--steps", type=int, default=1500, help=f"steps of {TOKENS_PER_STEP} tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="another number may give slightly different weights")
    parser.add_argument("--muon-rate", type=float, default=0.02, help="peak rate of the matrices")
    parser.add_argument("--adam-rate", type=float, default=3e-3, help="peak rate of embedding, routers and norms")
    parser.add_argument("--balance", type=float, default=0.02, help="weight of the balance loss")
    parser.add_argument("--evaluate", action="store_true", help="only print the figures of what is in the folder")
    return parser.parse_args()


def main() -> None:
    """Train, save in bfloat16, load again and print the figures."""
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    train_files, held_out_files = read_files()
    texts, held_out = list(train_files.values()), list(held_out_files.values())
    if options.evaluate:
        report(options.out, held_out)
        return
    folder = options.out.with_name(options.out.name + ".partial-training")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "heldout.txt").write_text(sample(held_out_files), encoding="utf-8")
    tokenizer = train_tokenizer(texts)
    tokenizer.save_pretrained(folder)
    tokens = encode(tokenizer, texts)
    held_out_tokens = encode(tokenizer, held_out)
    print(f"training: {len(texts)} files, {sum(map(len, texts)) / 1e6:.2f} MB, {len(tokens) / 1e6:.2f} M tokens")
    print(f"held out: {len(held_out)} files, {sum(map(len, held_out)) / 1e6:.2f} MB, {len(held_out_tokens)} tokens")
    model: Any = make_model()
    check_step(model, tokens)
    print(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    train(model, tokens, held_out_tokens, folder, options)
    model.to(torch.bfloat16).save_pretrained(folder)
    report(folder, held_out)
    move(folder, options.out)


if __name__ == "__main__":
    main()
