"""How `moec` shows things to people: tables of figures, one-line summaries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..cost.report import bytes_text, count_text, flops_text
from ..ir.notes import Note
from ..rewrite.fusion_report import entry_line
from ..runtime.verdict import stored_bits
from .base import say
from .report import left_out_text, ranges_text
from .table import make_table, print_parts, stdout_console

if TYPE_CHECKING:
    from ..artifact.generation_files import EndTokens
    from ..runtime.artifact import Artifact
    from ..runtime.generate import Generation

# --- inspect -------------------------------------------------------------------------------------------------------


def show_report(report: dict[str, Any]) -> None:
    """Print what report.inspect found."""
    context = report["per_token"]["context"]
    target = f", target {report['target']}" if report["target"] else ""
    console = stdout_console()
    print_parts(console, f"{report['source'] or 'a program without a source'} (stage {report['stage']}{target})", "")
    print_parts(console, _summary_table(report), "", _function_table(report["kinds"], context), "")
    dims = ", ".join(f"{d['name']} in {d['low']}..{d['high']}" for d in report["dims"])
    print_parts(console, f"dims: {dims}")
    for label in ("inputs", "outputs"):
        print_parts(console, *_value_lines(label, report[label]))
    print_parts(console, *map(entry_line, report.get("unfused", [])))
    if "files" in report:
        print_parts(
            console,
            "",
            make_table((("file", False), ("bytes", True)), [(n, f"{s:,}") for n, s in report["files"].items()]),
        )


def _summary_table(report: dict[str, Any]) -> Table:
    parameters, per_token, state = report["parameters"], report["per_token"], report["state"]
    at = f"at {per_token['context']:,} past tokens"
    rows = [
        ("parameters", count_text(parameters["total"]), f"{count_text(parameters['experts'])} in routed experts"),
        ("active per token", count_text(parameters["active"]),
         f"{count_text(parameters['active_without_embeddings'])} without the embedding table"),
        ("weights in the checkpoint", bytes_text(report["bytes"]["checkpoint"]),
         f"{bytes_text(per_token['checkpoint_bytes_read'])} read per decoded token"),
        ("weights in this IR", bytes_text(report["bytes"]["compiled"]),
         f"{bytes_text(per_token['compiled_bytes_read'])} read per decoded token"),
        ("KV cache per token", bytes_text(state["bytes_per_token"]),
         f"{bytes_text(state['bf16_bytes_per_token'])} if it were bf16; {bytes_text(state['bytes'])} {at}"),
        ("FLOPs per decoded token", flops_text(per_token["flops"]), at),
    ]  # fmt: skip
    if left_out := report["left_out"]:
        whole = report["bytes"]["checkpoint"] + left_out["bytes"]
        rows.append(
            (
                "left out of the program",
                bytes_text(left_out["bytes"]),
                f"{', '.join(left_out['names'])}; {bytes_text(whole)} with it in the checkpoint",
            )
        )
    if state["held_bytes_per_token"] > state["bytes_per_token"]:
        held = bytes_text(state["held_bytes_per_token"])
        rows.append(
            (
                "held by the program",
                held,
                f"per token: layers with a window too; {bytes_text(state['held_bytes'])} {at}",
            )
        )
    if state["fixed_bytes"]:
        rows.append(("fixed state", bytes_text(state["fixed_bytes"]), "for each sequence"))
    return make_table((("", False), ("", True), ("", False)), rows)


def _function_table(kinds: list[dict[str, Any]], context: int) -> Table:
    columns = (
        ("function", False), ("layers", False), ("ops", True), ("parameters", True), ("active", True),
        ("checkpoint", True), ("in this IR", True), (f"FLOPs/token at {context}", True), ("KV/token", True),
    )  # fmt: skip
    rows = [
        (
            f"@{kind['function']}",
            ranges_text(kind["layers"]) or ("" if kind["calls"] == 1 else f"{kind['calls']} calls"),
            str(kind["ops"]),
            count_text(kind["parameters"]["total"]),
            count_text(kind["parameters"]["active"]),
            bytes_text(kind["bytes"]["checkpoint"]),
            bytes_text(kind["bytes"]["compiled"]),
            flops_text(kind["per_token"]["flops"]),
            bytes_text(kind["state"]["bytes_per_token"]),
        )
        for kind in kinds
    ]
    return make_table(columns, rows)


def _value_lines(label: str, values: list[dict[str, Any]]) -> list[str]:
    """Return a line for every input or output, and one for all states of a type."""
    lines = [f"{label}: " + ", ".join(f"{v['name']} {v['type']}" for v in values if not v["state"])]
    states: dict[str, int] = {}
    for value in values:
        if value["state"]:
            states[value["type"]] = states.get(value["type"], 0) + 1
    return lines + [f"  and {count} states {type}" for type, count in states.items()]


# --- one line ------------------------------------------------------------------------------------------------------


def show_artifact(artifact: Artifact, seconds: float) -> None:
    """Print to standard error what was written, and the result of the comparison if there was one."""
    report = artifact.report
    size = f"{len(report['files'])} files, {bytes_text(report['bytes'])}"
    say(f"compiled in {seconds:.1f} s: {size}{_precision_text(artifact)}")
    if seen := report["figures"].get("calibration"):
        say(_calibration_line(seen))
    if "left_out" in report["source"]:
        say(left_out_text(report["source"]["left_out"]))
    for entry in report["unfused"]:
        say(entry_line(entry))
    for function, formats in report["figures"].get("kept", {}).items():
        near = f"; near them, not the same: {', '.join(formats['near'])}" if "near" in formats else ""
        exact = ", ".join(formats.get("exact", ["none"]))
        say(f"codes of the checkpoint kept in @{function}: {exact}{near}")
    for note in report["figures"].get("notes", []):
        say(Note(note))
    figures = report["figures"].get("measured")
    if figures:
        if figures.get("verdict"):
            say(figures["verdict"])
            return _show_decoding(figures)
        verdict = "verified" if figures["passed"] else "verification failed"
        relative = "not finite" if figures["relative"] is None else f"{figures['relative']:.2g}"
        say(f"{verdict}: relative difference of logits {relative} ({figures['tolerance']:g} allowed)")
        _show_decoding(figures)


def _show_decoding(figures: dict[str, Any]) -> None:
    decoding = figures.get("decoding") or {}
    if own := decoding.get("moec"):
        say(Note(f"moec itself decoded {own} weights of the source: {decoding['reason']}"))


def _precision_text(artifact: Artifact) -> str:
    """Return what weights are stored as, with the bits a weight, and what would make the unquantized default smaller."""
    manifest = artifact.manifest
    formats = sorted({name for group in manifest["precision"].values() for name in group})
    bits = stored_bits(manifest)
    if bits is None or not formats:
        return ""
    text = f"; {bits:.2f} bits a weight ({', '.join(formats)})"
    sizes = manifest["figures"]["counted"]["bytes"]
    if artifact.lossy or not sizes.get("checkpoint") or sizes["compiled"] < 1.5 * sizes["checkpoint"]:
        return text
    times = sizes["compiled"] / sizes["checkpoint"]
    return f"{text}, {times:.1f} times the checkpoint; --quantize int4 stores about 5 bits a weight"


def _calibration_line(seen: dict[str, Any]) -> str:
    """Return what a calibration text reached, in one line."""
    text = f"calibration: {seen['tokens']} tokens"
    if not seen["experts"]:
        return text
    few = f"{seen['starved']} of {seen['experts']} experts saw fewer than {seen['starved_below']}"
    return f"{text}; an expert saw {seen['mean']:.0f} of them on average, at least {seen['least']}; {few}"


def end_notes(ends: EndTokens) -> list[Note]:
    """Return notes on the tokens at which generation stops."""
    notes = [
        Note(f"the end token {text!r} has no number in the tokenizer's files: not stopped at") for text in ends.unknown
    ]
    if not ends.ids:
        notes.append(Note("no file of the checkpoint names an end token: generation stops at --max-new-tokens"))
    return notes


def generation_json(found: Generation) -> dict[str, Any]:
    """Return a generation of one prompt as JSON values."""
    return {
        "tokens": found.tokens[0],
        "text": found.text[0] if found.text else None,
        "stopped": found.stopped[0],
        "prompt_tokens": found.prompt_tokens,
        "prefill_seconds": found.prefill_seconds,
        "decode_seconds": found.decode_seconds,
        "prefill_tokens_per_second": found.prefill_rate,
        "decode_tokens_per_second": found.decode_rate,
    }


def ran_on(session: Any) -> str:
    """Return what a session ran on, to be put behind its speed; nothing for one that does not say it."""
    runs = getattr(session, "runs", "")
    return f", on {runs}" if runs else ""


def speed_line(found: Generation, session: Any = None) -> str:
    """Return the speed of a generation, what it ran on and why it stopped as one line."""
    new, rate = sum(map(len, found.tokens)), found.decode_rate
    speed = f" at {rate:.1f} tokens/s" if rate else ""
    return (
        f"{found.prompt_tokens} prompt tokens at {found.prefill_rate:.1f} tokens/s, "
        f"{new} new tokens{speed}{ran_on(session)}; {stop_reason(found.stopped[0])}"
    )


def stop_reason(stopped: str) -> str:
    """Return why a generation stopped, in words."""
    return {
        "end token": "stopped at an end token",
        "stop text": "stopped in front of a stop text",
        "context": "stopped at the end of the model's context",
    }.get(stopped, "stopped after --max-new-tokens")
