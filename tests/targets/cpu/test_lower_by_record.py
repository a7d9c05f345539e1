"""What lowering and quantize make of the record of what ONNX Runtime runs right."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from moec.compiler.check.interpret import interpret, random_inputs
from moec.compiler.errors import MoecError
from moec.compiler.formats.table import format_of
from moec.compiler.ir.module import Module
from moec.compiler.ops.verify import verify_module
from moec.compiler.text.parser import parse_module
from moec.compiler.text.printer import print_module
from moec.compiler.weights.evaluate import evaluate_recipe
from moec.compiler.weights.sources.source import RandomSource
from moec.passes.quantize import quantize
from moec.targets import open_target
from moec.targets.cpu import capabilities
from moec.targets.cpu.capabilities import RIGHT, WRONG, Finding, Record, Variant, shipped_record, why_not_held, why_slow
from moec.targets.cpu.lower.module import lower_module
from moec_command import invoke

SOURCE = RandomSource(5)
QMOE = {"activation": "swiglu", "routing": "weights"}

PROGRAM = """moec 1 stage moe
dim T in 1..64

func @main(%input_ids: i64[T])
    -> (f32[T, 40]) {
  const %table : EMBED[40, 64] = quantize(tensor("embed", f32[40, 64]), to=EMBED)
  const %router : f32[6, 64] = tensor("router", f32[6, 64])
  const %up : EXPERTS[6, 128, 64] = quantize(tensor("up", f32[6, 128, 64]), to=EXPERTS)
  const %down : EXPERTS[6, 64, 64] = quantize(tensor("down", f32[6, 64, 64]), to=EXPERTS)
  const %head : HEAD[40, 64] = quantize(tensor("head", f32[40, 64]), to=HEAD)
  %h = nn.embedding(%input_ids, %table) : f32[T, 64] loc("embed")
  %r = core.linear(%h, %router, _) : f32[T, 6] loc("router")
  %p = core.SCORE : f32[T, 6]
  %top, %ids = core.topk(%p) {axis=1, k=2} : f32[T, 2], i64[T, 2]
  %e = moe.experts(%h, %ids, %top, %up, %down, _, _) {ACT} : f32[T, 64] loc("mlp.experts")
  %y = core.linear(%e, %head, _) : f32[T, 40] loc("head")
  return %y
}
"""


def program(
    embed: str = "int8_g32", experts: str = "uint4_g32", head: str = "uint4_g32", act: str = "act=gated(silu)",
    score: str = "softmax(%r) {axis=1}",
) -> Module:  # fmt: skip
    text = PROGRAM.replace("EMBED", embed).replace("EXPERTS", experts).replace("HEAD", head)
    module = parse_module(text.replace("ACT", act).replace("SCORE", score))
    verify_module(module)
    return module


def lowered(module: Module, record: Record | None = None, **options: Any) -> tuple[set[str], list[str]]:
    """Return the names of the ops and the notes; the numbers are compared on the way."""
    result, notes = lower_module(module, record=record, **options)
    verify_module(result)
    inputs = random_inputs(module, "main", {"T": 7})
    (want,), (got,) = (interpret(m, inputs, lambda r: evaluate_recipe(r, SOURCE)) for m in (module, result))
    assert torch.allclose(got, want, atol=1e-5)
    return {op.name for op in result.main.ops}, [str(note) for note in notes]


def without(*variants: Variant, finding: Finding | None = None) -> Record:
    """Return the shipped record with some variants marked as wrong."""
    assert all(shipped_record().findings[v].found == RIGHT for v in variants)
    marks = dict.fromkeys(variants, finding or Finding(WRONG, error=1.0))
    return replace(shipped_record(), findings={**shipped_record().findings, **marks})


# --- lowering ----------------------------------------------------------------------------------------------------


def test_what_is_right_is_used() -> None:
    names, why = lowered(program())
    assert {"ort.qmoe", "ort.matmul_nbits", "ort.gather_nbits"} <= names
    assert why == []


def test_wrong_linears_become_f32() -> None:
    variants = [Variant("MatMulNBits", "uint4_g32", accuracy=level) for level in (0, 4)]
    names, why = lowered(program(), without(*variants))
    assert "ort.matmul_nbits" not in names and "ort.qmoe" in names
    assert why == [
        "note: @main head: core.linear with weights in f32, of 4 bytes: MatMulNBits uint4_g32 accuracy_level=4 is wrong in"
        " ONNX Runtime 1.32.0"
    ]


def test_int8_activations_that_are_wrong_become_f32_ones() -> None:
    module = program()
    record = without(Variant("MatMulNBits", "uint4_g32", accuracy=4))
    (op,) = (op for op in lower_module(module, record=record).module.main.ops if op.name == "ort.matmul_nbits")
    assert op.attributes["accuracy"] == 0
    (op,) = (op for op in lower_module(module).module.main.ops if op.name == "ort.matmul_nbits")
    assert op.attributes["accuracy"] == 4


def test_wrong_lookups_become_f32() -> None:
    names, why = lowered(program(), without(Variant("GatherBlockQuantized", "int8_g32")))
    assert "ort.gather_nbits" not in names and "nn.embedding" in names
    assert len(why) == 1 and "GatherBlockQuantized int8_g32 is wrong" in why[0]


@pytest.mark.parametrize(
    "variants",
    [
        [Variant("QMoE", "uint4_g32", accuracy=level, **QMOE) for level in (0, 4)],
        [Variant("QMoE", "int4_g32", **QMOE), Variant("QMoE", "int4_g32", accuracy=4, **QMOE)],
    ],
)
def test_wrong_experts_become_a_loop(variants: list[Variant]) -> None:
    names, why = lowered(program(experts=variants[0].format), without(*variants))
    assert "ort.qmoe" not in names and "ort.experts_nbits" in names
    assert why == [
        f"note: lower of moe.experts not applied at %e (mlp.experts): {variants[1]} is wrong in ONNX Runtime 1.32.0"
    ]


def test_wrong_experts_without_a_loop_become_f32() -> None:
    gone = [Variant("QMoE", "uint4_g32", accuracy=level, **QMOE) for level in (0, 4)]
    gone.append(Variant("GatherBlockQuantized", "uint4_g32", option="experts"))
    names, why = lowered(program(), without(*gone))
    assert not {"ort.qmoe", "ort.experts_nbits"} & names and "moe.experts" in names
    assert len(why) == 2 and "lower of moe.experts not applied" in why[0] and str(gone[1]) in why[0]
    assert "moe.experts with weights in f32" in why[1] and str(gone[2]) in why[1]


def test_wrong_activations_and_routings_become_a_loop() -> None:
    plain = capabilities.plain_variant("QMoE")
    clamped = "act=gated(silu, alpha=1.702, beta=1.0, limit=7.0)"
    for module, variant in (
        (program(act=clamped), replace(plain, activation="swiglu_clamped")),
        (program(), plain),
    ):
        assert "ort.qmoe" in lowered(module)[0]
        names, why = lowered(module, without(variant))
        assert "ort.qmoe" not in names and "ort.experts_nbits" in names and str(variant) in why[0]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"act": "act=gated(gelu)"}, "QMoE int4_g32 gated_gelu weights is rejected"),
        ({"act": "act=gated(relu)"}, "QMoE int4_g32 gated_relu weights was not tried"),
        ({"score": "tanh(%r)"}, "may be negative, and QMoE int4_g32 swiglu negative weights is wrong"),
    ],
)
def test_traps_of_the_shipped_record(options: dict[str, str], reason: str) -> None:
    names, why = lowered(program(**options))
    assert "ort.qmoe" not in names and "ort.experts_nbits" in names
    assert len(why) == 1 and reason in why[0]


def test_exact_keeps_f32_activations() -> None:
    names, why = lowered(program(), accuracy="exact")
    assert "ort.qmoe" in names and why == []
    names, why = lowered(program(experts="int8_g32"), accuracy="exact")
    assert "ort.qmoe" not in names and "ort.experts_nbits" in names
    assert len(why) == 1 and "QMoE int8_g32 swiglu weights rounds activations to int8" in why[0]
    assert "ort.qmoe" in lowered(program(experts="int8_g32"))[0]


def test_slow_variants_are_noted() -> None:
    names, why = lowered(program(head="int8_g32"), accuracy="exact")
    assert "ort.matmul_nbits" in names
    assert len(why) == 1 and why[0].startswith("note: @main head: MatMulNBits int8_g32 is slow: 0.")


def test_another_version_of_the_runtime_is_noted() -> None:
    names, why = lowered(program(), replace(shipped_record(), runtime="0.1.2"))
    assert "ort.qmoe" in names
    assert len(why) == 1 and "recorded with 0.1.2, installed is" in why[0] and "moec targets cpu --probe" in why[0]


def test_attention_and_moe_ask_the_record() -> None:
    wrong = replace(
        shipped_record(), findings={v: replace(f, found=WRONG) for v, f in shipped_record().findings.items()}
    )
    assert (
        wrong.refusal(capabilities.attention_variants(64))
        == f"GroupQueryAttention is wrong in ONNX Runtime {wrong.runtime}"
    )
    used = capabilities.attention_variants(12, window=4, softcap=1.0, masked=True, sinks=True)
    assert [v.option for v in used] == ["window", "softcap", "bias", "sinks", capabilities.ODD_HEADS]
    assert shipped_record().refusal(used[:4]) == "" and "rejected" in shipped_record().refusal(used)


ATTENTION = """moec 1 stage moe
dim S in 1..64
dim P in 0..64

func @main(%q: f32[1, S, 128], %c: f32[1, S, R], %s: f32[1, S, R], %pk: state f32[1, 1, P, D], %pv: state f32[1, 1, P, D])
    -> (f32[1, S, N], state f32[1, 1, P + S, D], state f32[1, 1, P + S, D]) {
  %y, %k, %v = nn.cached_attention(%q, _, _, %pk, %pv, %c, %s, _, _, _, _) {heads=H, scale=0.2} : f32[1, S, N], state f32[1, 1, P + S, D], state f32[1, 1, P + S, D] loc("attention")
  return %y, %k, %v
}
"""


@pytest.mark.parametrize(
    ("width", "turned", "wrong", "inside"),
    [
        (32, 32, [], {"turned", "packed"}),
        (32, 16, [], {"turned", "packed"}),
        (32, 8, [], set()),
        (32, 32, ["rotary"], set()),
        (32, 16, ["rotary"], {"turned", "packed"}),
        (32, 16, ["rotary of a part"], set()),
        (32, 32, ["packed rotary"], {"turned"}),
        (32, 32, ["packed"], {"turned", "packed"}),
        (32, 32, [""], set()),
    ],
)
def test_what_attention_does_inside(width: int, turned: int, wrong: list[str], inside: set[str]) -> None:
    heads = 128 // width - 2
    text = ATTENTION.replace("R]", f"{turned}]").replace("D]", f"{width}]").replace("N]", f"{heads * width}]")
    module = parse_module(text.replace("heads=H", f"heads={heads}"))
    verify_module(module)
    result = lower_module(
        module, record=without(*(Variant("GroupQueryAttention", option=name) for name in wrong))
    ).module
    verify_module(result)
    inputs = random_inputs(module, "main", {"S": 3, "P": 2})
    for want, got in zip(
        *(interpret(m, inputs, lambda r: evaluate_recipe(r, SOURCE)) for m in (module, result)), strict=True
    ):
        assert torch.allclose(got, want, atol=1e-5)
    fused = [op for op in result.main.ops if op.name == "ort.group_query_attention"]
    assert len(fused) == (wrong != [""])
    for op in fused:
        assert inside == {n for n, there in (("turned", op.operands[5]), ("packed", not op.operands[1])) if there}


# --- what quantize asks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "format", "reason"),
    [
        ("core.linear", "uint4_g32", None), ("core.linear", "uint2_g16", None), ("nn.embedding", "uint2_g64", None),
        ("core.linear", "mxfp4", "does not run mxfp4: MatMulNBits mxfp4 is rejected in ONNX Runtime"),
        ("nn.embedding", "nvfp4", "does not run nvfp4: GatherBlockQuantized nvfp4 is rejected"),
        ("moe.experts", "uint4_g32", None), ("moe.experts", "uint2_g16", None),
        ("moe.experts", "fp8_b128", "does not run fp8_b128: QMoE fp8_b128 swiglu weights is rejected"),
        ("core.topk", "int4_g32", "no op of the target reads"),
    ],
)  # fmt: skip
def test_holds(op: str, format: str, reason: str | None) -> None:
    (use, *_) = (o for o in program().main.ops if o.name == op)
    found = why_not_held(use, format_of(format))
    assert found is None if reason is None else reason in (found or "")


@pytest.mark.parametrize(
    ("op", "format", "reason"),
    [
        ("core.linear", "uint2_g32", None), ("core.linear", "uint2_g16", "MatMulNBits uint2_g16 accuracy_level=4 is slow: 0."),
        ("moe.experts", "uint4_g32", None), ("moe.experts", "uint2_g16", "QMoE uint2_g16 swiglu weights accuracy_level=4 is slow"),
        ("nn.embedding", "uint2_g16", None), ("core.topk", "int4_g32", None),
        ("core.linear", "nf4", "plain ops decode nf4 for core.linear"), ("nn.embedding", "nf4", None),
    ],
)  # fmt: skip
def test_slow(op: str, format: str, reason: str | None) -> None:
    (use, *_) = (o for o in program().main.ops if o.name == op)
    found = why_slow(use, format_of(format))
    assert found is None if reason is None else reason in (found or "")


@pytest.mark.parametrize("op", ["core.linear", "moe.experts"])
def test_grids_are_slow_where_nothing_compiles_their_kernels(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (use, *_) = (o for o in program().main.ops if o.name == op)
    monkeypatch.setattr(capabilities, "find_compiler", lambda: "a compiler")
    assert why_slow(use, format_of("grid4_g32")) is None
    monkeypatch.setattr(capabilities, "find_compiler", lambda: None)
    assert "package ziglang" in (why_slow(use, format_of("grid4_g32")) or "")


@pytest.mark.parametrize(
    ("wish", "stored"),
    [
        ({"experts": "int2"}, "f32"),
        ({"experts": "int2", "group": 16}, "uint2_g16"),
        ({"experts": "int2_g16"}, "int2_g16"),
    ],
)
def test_slow_formats_are_for_those_who_ask_for_them(wish: dict[str, Any], stored: str) -> None:
    """Rows of 64 and 48 numbers: no other group than 16 divides both."""
    text = re.sub(r"quantize\((.*), to=\w+\)", r"\1", PROGRAM)
    text = text.replace("128, 64", "96, 64").replace("64, 64", "64, 48").replace("ACT", "act=gated(silu)")
    text = re.sub("EMBED|EXPERTS|HEAD", "f32", text).replace("SCORE", "softmax(%r) {axis=1}")
    module, why = quantize.run(parse_module(text), open_target("cpu", {}), embedding="f32", head="f32", **wish)
    (use,) = (op for op in module.main.ops if op.name == "moe.experts")
    assert {v.type.dtype for v in use.operands[3:5] if v} == {stored}
    if stored == "f32":
        assert len(why) == 2 and all(
            "is slow" in note.reason and "it stays f32" in note.reason for note in why
        )  # up and down
    else:
        assert why == ()
        names, notes = lowered(module)
        assert (
            "ort.qmoe" in names
            and len(notes) == 1
            and f"QMoE {stored} swiglu weights accuracy_level=4 is slow" in notes[0]
        )


def test_weights_in_no_integers_are_not_read_as_such() -> None:
    """A runtime that ran them right would not make ort.qmoe, which reads integers, the op for them."""
    right = {v: replace(f, found=RIGHT) for v, f in shipped_record().findings.items()}
    record = replace(shipped_record(), findings=right)
    (use,) = (o for o in program().main.ops if o.name == "moe.experts")
    assert "the target's ops read integers" in (why_not_held(use, format_of("mxfp4"), record) or "")
    names, why = lowered(program(embed="nvfp4", experts="nvfp4", head="nvfp4"), record)
    assert not {"ort.qmoe", "ort.experts_nbits", "ort.matmul_nbits", "ort.gather_nbits", "ort.decode"} & names
    assert len(why) == 4


def test_codes_that_a_table_gives_numbers_to_are_decoded_by_plain_ops() -> None:
    names, why = lowered(program(embed="mxfp4", experts="mxfp4", head="mxfp4"))
    assert {"ort.decode", "ort.experts_nbits", "nn.embedding", "core.linear"} <= names
    assert not {"ort.qmoe", "ort.matmul_nbits", "ort.gather_nbits"} & names
    decoded = [note for note in why if "with weights that plain ops decode" in note]
    assert len(decoded) == 3 and "MatMulNBits mxfp4 accuracy_level=4 was not tried" in decoded[-1]


def test_holds_asks_for_groups_of_a_row() -> None:
    (use,) = (o for o in program().main.ops if o.name == "moe.experts")
    whole = [Variant("QMoE", "uint4_g32", one_group=True, accuracy=level, **QMOE) for level in (0, 4)]
    assert why_not_held(use, format_of("uint4_g64")) is None
    assert "one group a row" in (why_not_held(use, format_of("uint4_g64"), without(*whole)) or "")
    assert why_not_held(use, format_of("uint4_g32"), without(*whole)) is None


def test_experts_that_only_a_loop_runs_are_held() -> None:
    (use,) = (o for o in program(act="act=gated(gelu)").main.ops if o.name == "moe.experts")
    assert why_not_held(use, format_of("uint8_g64")) is None
    assert "does not run mxfp4" in (why_not_held(use, format_of("mxfp4")) or "")


# --- another record ------------------------------------------------------------------------------------------------


def test_compiling_by_another_record(tmp_path: Path) -> None:
    (tmp_path / "program.moir").write_text(print_module(program()))
    record = without(*(Variant("QMoE", "uint4_g32", accuracy=level, **QMOE) for level in (0, 4)))
    (tmp_path / "record.json").write_text(capabilities.record_text(record))
    arguments = ["compile", tmp_path / "program.moir", "--stop-after", "kernel", "--why"]
    assert "ort.qmoe" in invoke(*arguments).stdout
    result = invoke(*arguments, "-D", f"capabilities={tmp_path / 'record.json'}")
    assert result.exit_code == 0, result.stderr
    assert "ort.qmoe" not in result.stdout and "uint4_g32 swiglu weights accuracy_level=4 is wrong" in result.stderr
    (use,) = (o for o in program().main.ops if o.name == "moe.experts")
    target = open_target("cpu", {"capabilities": str(tmp_path / "record.json")})
    assert "is wrong" in (target.formats.holds(use, format_of("uint4_g32")) or "")
    assert target.formats.slow(use, format_of("uint4_g64")) is None
    with pytest.raises(MoecError, match="has no option speed"):
        open_target("cpu", {"speed": "9"})
