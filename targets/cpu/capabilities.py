"""The record of what ONNX Runtime computes correctly on the CPU, made by `probe.py` and looked up by variant.

A variant is one way to use an operator. The parts that a use has (format of the weights, activation, routing) were tried
one at a time beside plain ones: a use is right if each of its parts is. What was not tried counts as not right.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from ...compiler.errors import MoecError
from ...compiler.errors.json_files import read_json
from ...compiler.formats.format import Format
from ...compiler.formats.table import find_format, format_of
from ...compiler.ir.activation import Activation
from ...compiler.ir.dims import Size
from ...compiler.ir.module import Op
from .kernels.library import find_compiler

FILE = "capabilities.json"
RIGHT, WRONG, REJECTED, CRASHED = "right", "wrong", "rejected", "crashed"
INT8_ACTIVATIONS = 4  # ONNX Runtime's accuracy_level
MOST_GROUPS = 2048  # of a row: what the kernels of moec's own take
GRID_KERNELS = {
    "grid4": 16,
    "grid3": 32,
}  # elements of formats that those kernels read beside integers, with the least group
FAST, EXACT = ACCURACIES = ("fast", "exact")
ODD_HEADS, ODD_TURNED = "heads of no multiple of 8", "rotary of no multiple of 16"
# operands beside the part of a variant that is tried
PLAIN: dict[str, dict[str, Any]] = {
    "QMoE": {"activation": "swiglu", "routing": "weights"},
    "MoE": {"activation": "swiglu", "routing": "weights"},
}
SLOW = 1 / 50  # of the weights a second that the same operator reads at best


@dataclass(frozen=True)
class Variant:
    """One way to use an operator. `format` is that of the weights; `option` names what has no field of its own.

    `one_group` says that a row of the weights is one group. `activation` is `swiglu`, `swiglu_clamped` (any other alpha,
    beta or limit), or the name of moe.experts' act, with `gated_` before it for a gate that is not silu. `routing` is
    `weights` (mixing weights of all experts), `softmax` (of the scores of the chosen), or a trap.
    """

    operator: str
    format: str = "f32"
    one_group: bool = False
    activation: str = ""
    routing: str = ""
    dtype: str = "f32"
    accuracy: int = 0
    option: str = ""

    def __str__(self) -> str:
        words = [
            self.operator,
            *([self.format] if self.format != "f32" else []),
            *(["one group a row"] if self.one_group else []),
            self.activation,
            self.routing,
            *([self.dtype] if self.dtype != "f32" else []),
            *([f"accuracy_level={self.accuracy}"] if self.accuracy else []),
            self.option,
        ]
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Finding:
    """The result of trying a variant. `error` is the largest one relative to the largest number of the reference.

    `activations` is int8 where the numbers agree only as far as activations rounded to int8 let them. `speed` is GB/s
    of weights read when one token is decoded.
    """

    found: str
    activations: str = "f32"
    error: float | None = None
    speed: float | None = None
    message: str = ""


@dataclass(frozen=True)
class Record:
    """Findings, and what they were found with."""

    runtime: str
    cpu: str
    instructions: tuple[str, ...]
    threads: int
    findings: Mapping[Variant, Finding]

    def refusal(self, variants: Iterable[Variant], exact: bool = False) -> str:
        """Return why one of the variants is not right, with `exact` also if it rounds activations; or nothing."""
        for variant in variants:
            finding = self.findings.get(variant)
            if finding is None:
                return f"{variant} was not tried on ONNX Runtime"
            if finding.found != RIGHT:
                return f"{variant} is {finding.found} in ONNX Runtime {self.runtime}"
            if variant.format != "f32" and format_of(variant.format).element != "int":
                return f"{variant} is right in ONNX Runtime {self.runtime}, but the target's ops read integers"
            if exact and finding.activations != "f32":
                return f"{variant} rounds activations to {finding.activations}"
        return ""

    def slow(self, variant: Variant, bits: int) -> str:
        """Return that a variant reads weights many times slower than the operator can, or nothing."""
        finding = self.findings.get(variant)
        speed = finding.speed if finding else None
        best = max(
            (_weights_per_second(v, f) for v, f in self.findings.items() if v.operator == variant.operator), default=0.0
        )
        if speed is None or speed / bits > SLOW * best:
            return ""
        return f"{variant} is slow: {speed:.2g} GB/s"


def _weights_per_second(variant: Variant, finding: Finding) -> float:
    """Return weights a second, in some unit, as far as it was measured."""
    format = find_format(variant.format)
    return 0.0 if finding.speed is None or format is None else finding.speed / format.bits


# --- the file ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def shipped_record() -> Record:
    """Return the record that moec comes with."""
    return read_record(Path(__file__).with_name(FILE))


def read_record(path: Path) -> Record:
    """Return the record in a file; MoecError if it holds none."""
    try:
        return record_of(read_json(path))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        todo = "make one with `moec targets cpu --probe -o FILE`"
        raise MoecError("the file is no record of a probe", where=str(path), todo=todo) from error


def record_of(data: Mapping[str, Any]) -> Record:
    """Return the record that plain data holds."""
    findings = {}
    for row in data["variants"]:
        variant = Variant(**{f.name: row[f.name] for f in fields(Variant) if f.name in row})
        findings[variant] = Finding(**{f.name: row[f.name] for f in fields(Finding) if f.name in row})
    return Record(data["runtime"], data["cpu"], tuple(data["instructions"]), data["threads"], findings)


def record_data(record: Record) -> dict[str, Any]:
    """Return a record as plain data; fields that have their default are left out."""
    rows = [_changed_fields(variant) | _changed_fields(finding) for variant, finding in record.findings.items()]
    head = {name: getattr(record, name) for name in ("runtime", "cpu", "instructions", "threads")}
    return {**head, "instructions": list(record.instructions), "variants": rows}


def made_with(record: Record) -> str:
    """Return the runtime and the machine of a record as one line."""
    has = f" ({', '.join(record.instructions)})" if record.instructions else ""
    return f"ONNX Runtime {record.runtime} on {record.cpu}{has}, {record.threads} threads"


def record_rows(record: Record) -> list[dict[str, Any]]:
    """Return a row for each variant, for people and for JSON."""
    return [
        {"operator": v.operator, "variant": str(v).removeprefix(v.operator).strip(), **asdict(f)}
        for v, f in record.findings.items()
    ]


def record_text(record: Record) -> str:
    """Return a record as JSON with a line for each variant."""
    data = record_data(record)
    rows = ",\n".join("  " + json.dumps(row) for row in data.pop("variants"))
    head = json.dumps(data)[1:-1]
    return f'{{{head}, "variants": [\n{rows}\n]}}\n'


def _changed_fields(item: Variant | Finding) -> dict[str, Any]:
    values = {f.name: (getattr(item, f.name), f.default) for f in fields(item)}
    return {name: value for name, (value, default) in values.items() if value != default}


# --- from ops to variants --------------------------------------------------------------------------------------


def why_not_held(op: Op, format: Format, record: Record | None = None) -> str | None:
    """Return None if the target runs an op of stage moe with its weights in a format; else why not."""
    record = record or shipped_record()
    variants = _weights_of(op, format, record)
    if not variants:
        return f"no op of the target reads quantized weights of {op.name}"
    if is_decoded_by_table(format) and all(v.format != format.name for v in record.findings):
        return None  # no operator has this format
    if format.element != "int":
        return f"target cpu does not run {format.name}: {record.refusal(variants)}"
    return _best_level_of(record, variants)[1] or None


def is_decoded_by_table(format: Format) -> bool:
    """Return whether plain ops make numbers of a format's codes, where no operator reads them: a table has the numbers."""
    return bool(format.values) and not format.tensor_scale


def why_slow(op: Op, format: Format, record: Record | None = None) -> str | None:
    """Return why an op with its weights in a format that the target holds is slow; None if it is not."""
    record = record or shipped_record()
    variants = _weights_of(op, format, record)
    if is_decoded_by_table(format) and all(v.format != format.name for v in record.findings):
        return None if op.name == "nn.embedding" else _why_no_grid_kernel(op, format)
    level, _ = _best_level_of(record, variants)
    reasons = (record.slow(v, format.bits) for v in at_level(variants, level))
    return next(filter(None, reasons), None)


def _why_no_grid_kernel(op: Op, format: Format) -> str | None:
    if not has_grid_kernel(op, format):
        return f"plain ops decode {format.name} for {op.name} at every step"
    missing = find_compiler() is None
    return f"plain ops decode {format.name}: the kernels for it need the package ziglang" if missing else None


def has_grid_kernel(op: Op, format: Format) -> bool:
    """Return whether moec's own kernels, which round activations to int8, compute an op with its weights in a format."""
    if op.name == "moe.experts":
        act = op.settings.activation("act")
        biased = op.get("up_bias") is not None or op.get("down_bias") is not None
        if biased or not act.gated or act.kind != "silu" or act.clamp_after:
            return False
    elif op.name not in ("core.linear", "nn.gated_mlp"):  # the latter becomes two of the former
        return False
    weights = [op["w"]] if op.name == "core.linear" else [op["up"], op["down"]]
    known = format.group >= GRID_KERNELS.get(format.element, format.group + 1)
    return known and all(v.type.sizes[-1] <= MOST_GROUPS * format.group for v in weights)


def _best_level_of(record: Record, variants: Sequence[Variant]) -> tuple[int, str]:
    """Return best_level of the variants; lookups know no other level than 0."""
    if any(v.operator == "GatherBlockQuantized" for v in variants):
        return 0, record.refusal(variants)
    return best_level(record, variants, FAST)


def _weights_of(op: Op, format: Format, record: Record) -> list[Variant]:
    """Return the variants that read the weights of an op of stage moe; none for an op whose weights have to be f32."""
    weights = [v for v in op.operands[1:] if v is not None]
    match op.name:
        case "nn.embedding":
            return [Variant("GatherBlockQuantized", format.name)]
        case "core.linear" | "nn.gated_mlp" | "nn.block_linear":
            widths = [v.type.sizes[-1] for v in weights if len(v.type.shape) == 2 and v.type.shape[0] != 1]
            return weight_variants("MatMulNBits", format, *widths)
        case "moe.experts":
            if record.refusal([activation_variant("QMoE", op.settings.activation("act"))]):
                return [loop_variant(format)]
            widths = [v.type.sizes[-1] for v in weights if len(v.type.shape) == 3]
            return weight_variants("QMoE", format, *widths)
    return []


def weight_variants(operator: str, format: Format, *widths: int) -> list[Variant]:
    """Return the variants of an operator on weights with rows of `widths` numbers; one group a row was tried with 32."""
    plain = Variant(operator, format.name, **PLAIN.get(operator, {}))
    one_group = replace(plain, format=_in_groups_of_32(format), one_group=True)
    return [plain, *([one_group] if format.group in widths else [])]


def _in_groups_of_32(format: Format) -> str:
    return f"{'u' * format.zeros}int{format.bits}_g32" if format.element == "int" else format.name


def loop_variant(format: Format) -> Variant:
    """Return the variant of the Loop over experts with weights in a format, whatever its group."""
    return Variant("GatherBlockQuantized", _in_groups_of_32(format), option="experts")


def activation_variant(operator: str, act: Activation) -> Variant:
    """Return the variant of MoE or QMoE with an activation."""
    return replace(plain_variant(operator), activation=activation_name(act))


def routing_variant(operator: str, routing: str) -> Variant:
    """Return the variant of MoE or QMoE with a way of routing."""
    return replace(plain_variant(operator), routing=routing)


def plain_variant(operator: str) -> Variant:
    """Return the variant of MoE or QMoE beside which other parts are tried; its activations are f32."""
    return Variant(operator, "f32" if operator == "MoE" else "int4_g32", **PLAIN[operator])


def activation_name(act: Activation) -> str:
    """Return what a variant calls an activation."""
    if not act.gated:
        return act.kind
    if act.clamp_after:
        return f"gated_{act.kind}_clamped_after"
    plain = (act.alpha, act.beta, act.clamped) == (1.0, 0.0, False)
    return ("swiglu" if plain else "swiglu_clamped") if act.kind == "silu" else f"gated_{act.kind}"


def attention_variants(
    width: Size, window: int = 0, softcap: float = 0.0, masked: bool = False, sinks: bool = False
) -> list[Variant]:
    """Return the variants of GroupQueryAttention that attention with heads of `width` numbers consists of.

    What it does with q, k and v before it attends is in `rotary_variants` and `packed_variant`.
    """
    used = {"window": window, "softcap": softcap, "bias": masked, "sinks": sinks, ODD_HEADS: width % 8}
    return [Variant("GroupQueryAttention", option=name) for name, value in used.items() if value] or [
        Variant("GroupQueryAttention")
    ]


def rotary_variants(width: Size, turned: Size) -> list[Variant]:
    """Return the variants of GroupQueryAttention that turn the first `turned` numbers of each head themselves."""
    names = ["rotary" if turned == width else "rotary of a part"]
    names += [ODD_TURNED] if width % 16 or turned % 16 else []
    return [Variant("GroupQueryAttention", option=name) for name in names]


def packed_variant(turned: bool) -> Variant:
    """Return the variant of GroupQueryAttention that takes q, k and v in one piece, and turns them itself or not."""
    return Variant("GroupQueryAttention", option="packed rotary" if turned else "packed")


def best_level(record: Record, variants: Sequence[Variant], accuracy: str) -> tuple[int, str]:
    """Return the accuracy_level at which all variants are right and keep f32 activations if asked to, or why none is.

    Where activations may be rounded, the level that lets the runtime do so comes first: it is the faster one.
    """
    exact = accuracy == EXACT
    levels = (0,) if exact else (INT8_ACTIVATIONS, 0)
    reasons = [record.refusal(at_level(variants, level), exact) for level in levels]
    for level, reason in zip(levels, reasons, strict=True):
        if not reason:
            return level, ""
    return levels[0], reasons[0]


def at_level(variants: Iterable[Variant], level: int) -> list[Variant]:
    """Return the variants with an accuracy_level."""
    return [replace(v, accuracy=level) for v in variants]


def version_note(record: Record) -> str:
    """Return that the record was made with another version of ONNX Runtime than the installed one, or nothing."""
    try:
        installed = metadata.version("onnxruntime")
    except metadata.PackageNotFoundError:
        return ""
    if installed == record.runtime:
        return ""
    return (
        f"what ONNX Runtime runs right was recorded with {record.runtime}, installed is {installed}:"
        " `moec targets cpu --probe` checks it"
    )
