"""Compares an artifact with its source model: logits in prefill and cached decode, greedy tokens, and a text's KL."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..artifact.manifest import check_files
from ..errors import MoecError
from ..errors.progress import begin_phase
from .generate import Runner, left_pad
from .subject import Compiled, recorded_source
from .text_score import ROWS, TYPICAL, TextScore, score_text
from .verdict import stored_bits, verdict_line

if TYPE_CHECKING:
    from ..frontends.stored.decoded import Decoding

TOLERANCE = 1e-4  # of artifacts without a lossy pass: largest difference of logits, relative to the largest logit
LENGTHS = (1, 7, 33)
STEPS = 64
TEXT_TOKENS, WINDOW = 2000, 256
SLOW_STEPS, SLOW_TOKENS = 8, 200  # of sessions that say that they are slow
ROUNDING = 3.0  # how far an artifact that computes in bf16 may be off, as a multiple of the source itself in bf16
AGREEING = 0.99  # share of top-1 tokens that an artifact has to share where the source in bf16 shares that many
SAMPLE = Path(__file__).with_name("sample.txt")


@dataclass(frozen=True)
class Case:
    """One batch of prompts: relative differences of logits, and how many greedy tokens agree before the first that
    does not. `tie`: that one is a choice between two logits that are equal within the tolerance."""

    name: str
    lengths: tuple[int, ...]
    steps: int
    prefill: float
    decode: float
    greedy: int
    tie: bool
    most: float = 0.0  # the relative difference that three quarters of the tokens do not exceed

    @property
    def greedy_agrees(self) -> bool:
        """Whether all greedy tokens agree, up to a tie."""
        return self.greedy == self.steps + 1 or self.tie


@dataclass(frozen=True)
class Comparison:
    """The result of `compare_with_source`. `lossless` artifacts have to be within `tolerance`; lossy ones only report.

    An artifact that computes in bf16 has `rounded`: the same of the source itself in bf16, which it has to be near to.
    A few tokens may be far off there, since rounding chooses another expert for them.
    `decoding` says who decoded the weights of a quantized source; where it was moec, nothing has checked that. `bits` are
    those of a weight of the artifact.
    """

    against: str
    lossless: bool
    tolerance: float
    cases: tuple[Case, ...]
    text: TextScore
    decoding: Decoding | None = None
    rounded: Comparison | None = None
    bits: float | None = None

    @property
    def verdict(self) -> str | None:
        """What quantization cost, in one line; None for an artifact that is not lossy."""
        return None if self.lossless else verdict_line(self.against, self.bits, self.text)

    @property
    def relative(self) -> float:
        """The largest relative difference of logits in any case; NaN counts as infinite."""
        found = [n for case in self.cases for n in (case.prefill, case.decode)]
        return max(math.inf if math.isnan(n) else n for n in found)

    @property
    def passed(self) -> bool:
        """Whether the numbers are within the tolerance that the artifact has to meet."""
        if not self.lossless:
            return math.isfinite(self.relative)
        if self.rounded:
            return math.isfinite(self.relative) and self._as_rounded(self.rounded)
        return self.relative <= self.tolerance and all(case.greedy_agrees for case in self.cases)

    def _as_rounded(self, other: Comparison) -> bool:
        """Return whether the source in bf16 is about as far off."""
        near = all(a.most <= ROUNDING * b.most for a, b in zip(self.cases, other.cases, strict=True))
        agreeing = self.text.top1 >= min(AGREEING, other.text.top1) - 1 / self.text.tokens
        # the divergence grows with the square of what logits are off
        return near and agreeing and self.text.kl_most <= ROUNDING**2 * other.text.kl_most

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; numbers that are not finite become None."""
        found = {**asdict(self), "relative": self.relative, "passed": self.passed, "verdict": self.verdict}
        if self.decoding is not None:
            found["decoding"] = self.decoding.to_dict()
        return _without_infinities(found)

    def lines(self) -> list[str]:
        """Return the findings as text, a line each; those of a lossy artifact begin with its verdict."""
        found = self._figures(self.rounded is not None)
        if self.verdict is not None:
            found.insert(0, self.verdict)
        if self.rounded:
            found += [f"the source in bf16, {line}" for line in self.rounded._figures(True)[-1:]]
        if self.decoding is not None:
            found.append(self.decoding.line())
        bound = f"at most {self.tolerance:g} is allowed" if self.lossless else "the weights are quantized"
        verdict = "equal to" if self.lossless and self.passed else "compared with" if self.passed else "differs from"
        if self.lossless and self.rounded:
            bound = f"most tokens may be {ROUNDING:g} times as far off as the source in bf16"
            verdict = "as near as bf16 is to" if self.passed else verdict
        return [*found, f"{verdict} {self.against}: relative difference of logits {self.relative:.2g} ({bound})"]

    def _figures(self, most: bool) -> list[str]:
        """Return the cases and the text as lines, with what most tokens are off where that is what counts."""
        found = [
            f"{case.name}: logits differ by {case.prefill:.2g} in prefill, {case.decode:.2g} in {case.steps} cached "
            f"steps{f' (by {case.most:.2g} at most for {TYPICAL:.0%} of the tokens)' if most else ''}{self._greedy_text(case)}"
            for case in self.cases
        ]
        t = self.text
        other = "" if t.top1_bf16 is None else f" ({t.top1_bf16:.2%} with the source in bf16)"
        text = (
            f"{t.text}, {t.tokens} tokens: KL {t.kl_mean:.3g} mean, {t.kl_max:.3g} max; top-1 agreement {t.top1:.2%}{other}; "
            f"perplexity {t.perplexity:.5g}, source {t.reference_perplexity:.5g}"
        )
        return [*found, text]

    def _greedy_text(self, case: Case) -> str:
        """Return how many greedy tokens are equal; of quantized weights the share of the text's tokens says more."""
        if not self.lossless:
            return ""
        return f"; {case.greedy} of {case.steps + 1} greedy tokens equal{' (then a tie)' if case.tie else ''}"


def compare_with_source(
    artifact: Compiled,
    against: Any = None,
    *,
    text: str | None = None,
    tokens: int | None = None,
    lengths: Sequence[int] = LENGTHS,
    steps: int | None = None,
    session: Runner | None = None,
    accuracy: str | None = None,
    device: str | None = None,
) -> Comparison:
    """Compare an artifact with its source: a folder or a live model (default: the folder named in the manifest).

    A batch of three prompts with left padding runs `steps` cached steps, and once more in two parts; single prompts of
    `lengths` run a few. `text` (default: a sample of prose and Python) is scored on at most `tokens` tokens; without a
    tokenizer, random tokens are. `accuracy` and `device` are those of the session (None: as compiled, and as the target
    chooses). MoecError if a file of the artifact is not as it was written.
    """
    from .reference import open_reference, reference_in_bf16
    from .reference_onnx import OnnxReference, open_onnx_reference

    if (tokens is not None and tokens < 2) or (steps is not None and steps < 0) or not lengths or min(lengths) < 1:
        raise MoecError("there is nothing to compare", todo="give at least 2 tokens of text and lengths of 1 or more")
    source = against if against is not None else recorded_source(artifact)
    if isinstance(source, str) and (not source or source.startswith("python:")):
        raise MoecError(
            "the artifact does not name a source folder", str(artifact.folder), todo="say what to compare with"
        )
    check_files(artifact.folder, artifact.manifest, hashes=True)
    # torch computes between its steps: threads that spin meanwhile would take the cores
    runner = session or artifact.session(spinning=False, accuracy=accuracy, device=device)
    slow = getattr(runner, "slow", False)
    steps = (SLOW_STEPS if slow else STEPS) if steps is None else steps
    tokens = (SLOW_TOKENS if slow else TEXT_TOKENS) if tokens is None else tokens
    rounds = getattr(runner, "computes", "f32") == "bf16"
    onnx = isinstance(source, (str, Path)) and Path(source).suffix == ".onnx"
    opening = nullcontext(open_onnx_reference(Path(source))) if onnx else open_reference(source)
    with begin_phase("verifying", unit="part") as phase, opening as reference:
        limit = min(reference.context, int(artifact.manifest["dims"].get("S", (1, 1 << 31))[1]))
        pool, name = _text_tokens(artifact, reference, text, tokens)
        padding = "position_ids" in {i["name"] for i in artifact.manifest["inputs"]}
        batches = list(_test_cases(pool, lengths, steps, limit, padding))
        windows = [pool[i : i + min(WINDOW, limit)] for i in range(0, len(pool), min(WINDOW, limit))]
        windows = [w for w in windows if len(w) > 1]
        phase.total = (len(batches) + len(windows)) * (2 if rounds else 1)

        def compared(one: Runner, bf16: Runner | None = None) -> Comparison:
            cases = []
            for label, prompts, count, split in batches:
                cases.append(compare_prompts(one, reference, prompts, count, label, split))
                phase.step()
            score = score_text(one, reference, windows, name, lambda _: phase.step(), bf16)
            bits = stored_bits(artifact.manifest)
            return Comparison(
                reference.name, not artifact.lossy, TOLERANCE, tuple(cases), score, reference.decoding, bits=bits
            )

        if not rounds:
            return compared(runner)
        if isinstance(reference, OnnxReference):
            raise MoecError("an artifact in bf16 is compared with transformers only", todo="say --against CHECKPOINT")
        bf16 = reference_in_bf16(reference)
        return replace(compared(runner, bf16), rounded=replace(compared(bf16), decoding=None))


def _text_tokens(artifact: Compiled, reference: Runner, text: str | None, count: int) -> tuple[np.ndarray, str]:
    """Return the tokens to work with and what they are."""
    from .tokenizer import FILES

    if any((artifact.folder / name).is_file() for name in FILES):
        found = artifact.tokenizer.encode(text if text is not None else SAMPLE.read_text("utf-8"))[:count]
        if len(found) < 2:
            raise MoecError(f"the text has {len(found)} tokens", todo="give a longer one")
        return np.array(found, np.int64), "text" if text is not None else "sample text"
    if text is not None:
        raise MoecError(
            "the artifact has no tokenizer for the text", where=str(artifact.folder), todo="leave the text out"
        )
    return np.random.default_rng(0).integers(0, reference.vocabulary, count), "random tokens"


def _test_cases(
    pool: np.ndarray, lengths: Sequence[int], steps: int, limit: int, padding: bool = True
) -> Iterator[tuple[str, list[list[int]], int, bool]]:
    """Yield (name, prompts, steps, in two parts) for every case, inside the model's context.

    Without `padding` the prompts of a batch are of one length.
    """
    fitting = sorted({min(n, limit) for n in lengths})
    longest = fitting[-1]
    mixed = [longest, max(1, longest * 3 // 5), max(1, longest // 5)] if padding else [longest] * 3
    prompts = [[int(pool[(1000 * row + i) % len(pool)]) for i in range(n)] for row, n in enumerate(mixed)]
    yield f"batch of {', '.join(map(str, mixed))} tokens", prompts, min(steps, limit - longest), False
    if longest > 1:
        yield "the same in two parts", prompts, min(1, steps, limit - longest), True
    for n in fitting:
        plural = "" if n == 1 else "s"
        yield f"{n} token{plural}", [[int(pool[i % len(pool)]) for i in range(n)]], min(8, steps, limit - n), False


# --- logits ----------------------------------------------------------------------------------------------------


def compare_prompts(
    runner: Runner, reference: Runner, prompts: Sequence[Sequence[int]], steps: int, name: str = "", split: bool = False
) -> Case:
    """Compare one left-padded batch: the prefill at all real tokens, then cached steps on the reference's tokens.

    Both sides are given the token that the reference finds most likely. With `split` the runner takes the prompts in
    two parts, the second with a past.
    """
    ids, mask, positions = left_pad(prompts)
    found, states = _run_prompts(runner, ids, mask, positions, split)
    wanted, cache = reference.step(ids, mask, positions, None)
    real = mask.astype(bool)
    each = [token_differences(found[real], wanted[real])]
    prefill, decode = _largest_difference(each[0]), 0.0
    greedy, tie, agreeing = 0, False, True
    for count in range(steps + 1):
        chosen = wanted[:, -1].argmax(axis=-1)
        if agreeing:
            differing = found[:, -1].argmax(axis=-1) != chosen
            agreeing = not differing.any()
            greedy += agreeing
            tie = not agreeing and _is_tie(found[differing, -1], wanted[differing, -1])
        if count == steps:
            break
        mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        following = positions[:, -1:] + 1 + count
        found, states = runner.step(chosen[:, None], mask, following, states)
        wanted, cache = reference.step(chosen[:, None], mask, following, cache)
        each.append(token_differences(found, wanted))
        decode = _larger_or_nan(decode, _largest_difference(each[-1]))
    most = float(np.quantile(np.concatenate(each), TYPICAL))
    return Case(name, tuple(map(len, prompts)), steps, prefill, decode, greedy, tie, most)


def _run_prompts(
    runner: Runner, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray, split: bool
) -> tuple[np.ndarray, Any]:
    if not split:
        return runner.step(ids, mask, positions, None)
    cut = max(1, ids.shape[1] // 3)
    first, states = runner.step(ids[:, :cut], mask[:, :cut], positions[:, :cut], None)
    second, states = runner.step(ids[:, cut:], mask, positions[:, cut:], states)
    return np.concatenate([first, second], axis=1), states


def token_differences(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the largest difference of each token's logits, relative to the largest of all that is wanted.

    NaN where either side is not finite; the same infinity on both (a token that a model never gives) counts as equal.
    """
    found, wanted = found.reshape(-1, found.shape[-1]), wanted.reshape(-1, wanted.shape[-1])
    differences = np.zeros(len(wanted))
    largest = 0.0
    for start in range(0, len(wanted), ROWS):
        a, b = found[start : start + ROWS], wanted[start : start + ROWS]
        differences[start : start + ROWS] = np.abs(np.subtract(a, b, where=a != b, out=np.zeros_like(b))).max(-1)
        largest = max(largest, float(np.abs(b, where=np.isfinite(b), out=np.zeros_like(b)).max()))
    differences[~np.isfinite(differences)] = math.nan
    return differences / largest if largest else np.where(differences == 0, 0.0, math.nan)


def _largest_difference(differences: np.ndarray) -> float:
    return float(differences.max(initial=0.0))  # NaN where one is


def _larger_or_nan(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _is_tie(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Return whether each artifact's choice is as good for the reference, within twice the tolerance."""
    rows = np.arange(len(wanted))
    gap = wanted.max(axis=-1) - wanted[rows, found.argmax(axis=-1)]
    scale = np.abs(wanted, where=np.isfinite(wanted), out=np.zeros_like(wanted)).max(axis=-1)
    return bool((gap <= 2 * TOLERANCE * scale).all())


def _without_infinities(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _without_infinities(v) for key, v in value.items()}
        case list() | tuple():
            return [_without_infinities(v) for v in value]
    return value
