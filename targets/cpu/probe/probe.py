"""Tries the variants of the table on the installed ONNX Runtime: right, wrong, rejected, and how fast.

The runtime works in a process of its own, since a wrong use may end it; the next process goes on after the variant that
did.
"""

from __future__ import annotations

import multiprocessing
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from ..capabilities import CRASHED, REJECTED, RIGHT, WRONG, Finding, Record, Variant
from ..run.session import MODEL, native_errors, usable_cores, without_code
from .variants import all_variants, has_speed

# largest errors, relative to the largest number. f32: sums of up to 768 products. int8: a number of a normal distribution
# rounded to 127 steps of the largest in its group errs by 0.7 % of the spread, twice in experts: 0.4 to 2.5 % of the
# largest result were seen, and a wrong routing or layout errs by 30 % or more. f16 and bf16 round what they hold.
TOLERANCES = {"f32": 1e-5, "f16": 5e-3, "bf16": 3e-2}
INT8_LEAST, INT8_MOST = 1e-3, 5e-2
SECONDS, LEAST_STEPS = 0.1, 3  # of decoding for one speed
LARGE_BYTES = 48 << 20  # of weights, when the speed is taken: more than a cache holds
SMALL_BYTES, SLOW_SPEED = 4 << 20, 1.0  # what reads fewer GB/s than this in the cache is measured there

Progress = Callable[[int, int], None]  # variants done, and in all
INSTRUCTIONS = (
    "avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_tile",
    "asimd", "asimddp", "i8mm", "sve",
)  # fmt: skip


def probe_variants(
    variants: Sequence[Variant] | None = None, quick: bool = False, progress: Progress | None = None,
    work: Callable[..., None] | None = None,
) -> Record:  # fmt: skip
    """Return what the installed runtime makes of the variants (default: all); `quick` leaves out the speed.

    `work` is what the process does: (pipe, variants, quick), which sends a finding for each variant.
    """
    variants = list(all_variants() if variants is None else variants)
    found: dict[Variant, Finding] = {}
    while len(found) < len(variants):
        rest = [v for v in variants if v not in found]
        for variant, finding in zip(rest, _in_a_process(rest, quick, work or _probe_in_process), strict=False):
            found[variant] = finding
            if progress:
                progress(len(found), len(variants))
    cpu, instructions = _cpu_features()
    return Record(metadata.version("onnxruntime"), cpu, instructions, usable_cores(), found)


def changed_findings(new: Record, old: Record) -> list[tuple[Variant, str, str]]:
    """Return the variants that are not found as they were: what they were, and what they are."""

    def text(finding: Finding | None) -> str:
        if finding is None:
            return "not tried"
        return finding.found + (f", {finding.activations} activations" if finding.found == RIGHT else "")

    pairs = [(v, text(old.findings.get(v)), text(finding)) for v, finding in new.findings.items()]
    return [pair for pair in pairs if pair[1] != pair[2]]


def lost_variants(new: Record, old: Record) -> list[Variant]:
    """Return the variants that were right and are not, or that round activations and did not."""
    right = [(v, f, old.findings[v]) for v, f in new.findings.items() if v in old.findings]
    return [v for v, f, was in right if was.found == RIGHT and (f.found != RIGHT or f.activations != was.activations)]


# --- processes -------------------------------------------------------------------------------------------------


def _in_a_process(variants: Sequence[Variant], quick: bool, work: Callable[..., None]) -> Iterator[Finding]:
    """Yield a finding for each variant up to the one that ends the process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(theirs, list(variants), quick), daemon=True)
    process.start()
    theirs.close()
    try:
        for _ in variants:
            found = ours.recv()
            if isinstance(found, Exception):
                raise found
            yield found
    except EOFError:
        process.join()
        yield Finding(CRASHED, message=f"the runtime ended its process (exit code {process.exitcode})")
    finally:
        process.terminate()
        process.join()
        ours.close()


def _probe_in_process(pipe: Connection, variants: Sequence[Variant], quick: bool) -> None:
    import torch

    torch.set_num_threads(1)
    for variant in variants:
        try:
            pipe.send(try_variant(variant, quick))
        except Exception as error:  # a fault of the probe's own: the other process raises it
            pipe.send(error)
            return


def try_variant(variant: Variant, quick: bool = False) -> Finding:
    """Return what the runtime of this process makes of a variant."""
    with _write_variant(variant) as (folder, case):
        try:
            error = _relative_error(folder, case)
        except native_errors() as raised:
            return Finding(REJECTED, message=_reason_of_error(raised))
    finding = _judge_error(variant, error)
    if quick or finding.found != RIGHT or not has_speed(variant):
        return finding
    speed = 0.0
    for weight_bytes in (SMALL_BYTES, LARGE_BYTES):
        with _write_variant(variant, weight_bytes) as (folder, case):
            speed = _measure_speed(folder, case)
        if speed < SLOW_SPEED:
            break
    return replace(finding, speed=speed)


@contextmanager
def _write_variant(variant: Variant, weight_bytes: int = 0) -> Iterator[tuple[Path, Any]]:
    from .experts import write_moe, write_qmoe
    from .others import write_attention, write_linear, write_lookup, write_quick_gelu, write_rotary, write_skip_norm

    writers: dict[str, Callable[[Variant, Path, int], Any]] = {
        "QMoE": write_qmoe, "MoE": write_moe, "MatMulNBits": write_linear, "GatherBlockQuantized": write_lookup,
        "GroupQueryAttention": write_attention, "RotaryEmbedding": write_rotary,
        "SkipSimplifiedLayerNormalization": write_skip_norm, "QuickGelu": write_quick_gelu,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="moec-probe-") as folder:
        yield Path(folder), writers[variant.operator](variant, Path(folder), weight_bytes)


def _judge_error(variant: Variant, error: float) -> Finding:
    rounded = float(f"{error:.2g}") if np.isfinite(error) else None
    if error <= TOLERANCES[variant.dtype]:
        return Finding(RIGHT, error=rounded)
    if variant.operator in ("QMoE", "MatMulNBits") and INT8_LEAST <= error <= INT8_MOST:
        return Finding(RIGHT, "int8", rounded)
    return Finding(WRONG, error=rounded, message="" if rounded is not None else "numbers that are not finite")


# --- running ---------------------------------------------------------------------------------------------------


def _relative_error(folder: Path, case: Any) -> float:
    """Return the largest error relative to the largest number wanted; infinite where not finite or of another shape."""
    from .cases import TOKENS

    session = _open_session(folder)
    counts = TOKENS if case.rows else (None,)
    worst = 0.0
    for count in counts:
        results = session.run(None, {name: x[:count].numpy() for name, x in case.feeds.items()})
        for got, want in zip(results, case.wants, strict=True):
            expected = want[:count].numpy()
            if got.shape != expected.shape or not np.isfinite(got).all():
                return float("inf")
            worst = max(worst, float(np.abs(got - expected).max() / max(1e-6, np.abs(want.numpy()).max())))
    return worst


def _measure_speed(folder: Path, case: Any) -> float:
    """Return the GB/s of weights that the fastest step reads."""
    session = _open_session(folder)
    feeds = [{name: x.numpy() for name, x in step.items()} for step in case.steps]
    session.run(None, feeds[0])
    taken: list[float] = []
    while len(taken) < LEAST_STEPS or sum(taken) < SECONDS:
        start = time.perf_counter()
        session.run(None, feeds[(len(taken) + 1) % len(feeds)])
        taken.append(time.perf_counter() - start)
    return float(f"{case.bytes_read / min(taken) / 1e9:.3g}")


def _open_session(folder: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = usable_cores(), 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(folder / MODEL), options, providers=["CPUExecutionProvider"])


def _reason_of_error(error: Exception) -> str:
    """Return the last part of a runtime's message, without the places in its source."""
    text = without_code(" ".join(str(error).split()))
    text = re.sub(r"^Load model from \S+ failed:\s*", "", text)
    text = re.sub(r"^Exception during initialization: \S+:\d+ .*?\)( const)?( \[with T = [^\]]*\])? ", "", text)
    text = re.sub(r"^Non-zero status code .* Status Message: ", "", text)
    return text[:160]


def _cpu_features() -> tuple[str, tuple[str, ...]]:
    """Return the name of the processor and which of INSTRUCTIONS it has."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine(), ()
    name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE)
    has = set(flags[1].split()) if flags else set()
    return (name[1].strip() if name else platform.machine()), tuple(i for i in INSTRUCTIONS if i in has)
