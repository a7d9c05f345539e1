"""What ONNX Runtime runs right: the shipped record against the installed runtime, and what lowering makes of it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from moec.compiler import cli
from moec.compiler.driver import find_target
from moec.compiler.errors import MoecError
from moec.compiler.formats import format_of
from moec.compiler.interpret import interpret, random_inputs
from moec.compiler.ir import Module
from moec.compiler.parser import parse_module
from moec.compiler.printer import print_module
from moec.compiler.verify import verify
from moec.compiler.weights.pull import pull
from moec.compiler.weights.sources import RandomSource
from moec.targets.cpu import capabilities, probe
from moec.targets.cpu.capabilities import RIGHT, WRONG, Finding, Record, Variant, holds, shipped
from moec.targets.cpu.lower import lower
from moec.targets.cpu.variants import all_variants, has_speed

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
    embed: str = "int8_g32", experts: str = "uint4_g32", head: str = "uint4_g32", act: str = "act=silu",
    score: str = "softmax(%r) {axis=1}",
) -> Module:  # fmt: skip
    text = PROGRAM.replace("EMBED", embed).replace("EXPERTS", experts).replace("HEAD", head)
    module = parse_module(text.replace("ACT", act).replace("SCORE", score))
    verify(module)
    return module


def lowered(module: Module, record: Record | None = None, **options: Any) -> tuple[set[str], list[str]]:
    """Return the names of the ops and the notes; the numbers are compared on the way."""
    why: list[str] = []
    result = lower(module, why, record=record, **options)
    verify(result)
    inputs = random_inputs(module, "main", {"T": 7})
    (want,), (got,) = (interpret(m, inputs, lambda r: pull(r, SOURCE)) for m in (module, result))
    assert torch.allclose(got, want, atol=1e-5)
    return {op.name for op in result.main.ops}, why


def without(*variants: Variant, finding: Finding | None = None) -> Record:
    """Return the shipped record with some variants marked as wrong."""
    assert all(shipped().findings[v].found == RIGHT for v in variants)
    marks = dict.fromkeys(variants, finding or Finding(WRONG, error=1.0))
    return replace(shipped(), findings={**shipped().findings, **marks})


# --- the probe -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probed() -> Record:
    return probe.probe(quick=True)


def test_the_record_is_what_the_runtime_does(probed: Record) -> None:
    assert list(probed.findings) == all_variants() == list(shipped().findings)
    assert probe.lost(probed, shipped()) == []
    if (probed.runtime, probed.instructions) == (shipped().runtime, shipped().instructions):
        assert probe.differences(probed, shipped()) == []


def test_the_record_has_speeds_and_traps() -> None:
    findings = shipped().findings
    assert all(f.speed for v, f in findings.items() if f.found == RIGHT and has_speed(v))
    assert all(f.message for f in findings.values() if f.found == "rejected")
    traps = ["int4_g64 swiglu weights weights_prepacked=1", "int4_g32 swiglu softmax over all experts"]
    assert {findings[v].found for v in findings if str(v).removeprefix("QMoE ") in traps} == {WRONG}


@pytest.mark.long
def test_the_whole_probe() -> None:
    found = probe.probe()
    assert probe.lost(found, shipped()) == []
    assert all(f.speed for v, f in found.findings.items() if f.found == RIGHT and has_speed(v))


def end_at_the_third(pipe: Any, variants: list[Variant], quick: bool) -> None:
    for variant in variants:
        if variant == all_variants()[2]:
            os._exit(7)
        pipe.send(Finding(RIGHT))


def raise_at_once(pipe: Any, variants: list[Variant], quick: bool) -> None:
    pipe.send(ZeroDivisionError("a fault of the probe"))


def test_a_runtime_that_ends_its_process_is_one_finding() -> None:
    told: list[tuple[int, int]] = []
    variants = all_variants()[:5]
    found = probe.probe(variants, progress=lambda done, total: told.append((done, total)), work=end_at_the_third)
    assert [f.found for f in found.findings.values()] == [RIGHT, RIGHT, "crashed", RIGHT, RIGHT]
    assert "7" in found.findings[variants[2]].message
    assert told == [(i, 5) for i in range(1, 6)]


def test_a_fault_of_the_probe_is_no_finding() -> None:
    with pytest.raises(ZeroDivisionError):
        probe.probe(all_variants()[:2], work=raise_at_once)


def test_wrong_results_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that read the zero points wrongly would be seen."""
    from moec.targets.cpu import probe_others

    def off(name: str, given: dict[str, Any], **attrs: Any) -> Any:
        return refer(name, {**given, "zeros": given["zeros"] ^ 0x11}, **attrs)

    refer = probe_others.refer
    monkeypatch.setattr(probe_others, "refer", off)
    for accuracy in (0, 4):
        assert probe.try_variant(Variant("MatMulNBits", "uint4_g32", accuracy=accuracy), quick=True).found == WRONG


# --- the file --------------------------------------------------------------------------------------------------


def test_the_file_reads_back_as_it_was_written(tmp_path: Path) -> None:
    text = capabilities.record_text(shipped())
    assert text == (Path(capabilities.__file__).parent / capabilities.FILE).read_text(encoding="utf-8")
    (tmp_path / "record.json").write_text(text)
    assert capabilities.read_record(tmp_path / "record.json") == shipped()


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"runtime": "1", "variants": [{"found": "right"}]}'])
def test_a_file_that_is_no_record(text: str, tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(MoecError, match="no record of a probe"):
        capabilities.read_record(tmp_path / "record.json")
    with pytest.raises(MoecError, match="cannot be read"):
        capabilities.read_record(tmp_path / "none.json")


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
        "@main head: core.linear with weights in f32, of 4 bytes: MatMulNBits uint4_g32 accuracy_level=4 is wrong in"
        " ONNX Runtime 1.32.0"
    ]


def test_int8_activations_that_are_wrong_become_f32_ones() -> None:
    module = program()
    record = without(Variant("MatMulNBits", "uint4_g32", accuracy=4))
    (op,) = (op for op in lower(module, record=record).main.ops if op.name == "ort.matmul_nbits")
    assert op.attributes["accuracy"] == 0
    (op,) = (op for op in lower(module).main.ops if op.name == "ort.matmul_nbits")
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
    assert (
        len(why) == 1 and f"a Loop over experts instead of QMoE: {variants[1 if variants[1].accuracy else 0]}" in why[0]
    )


def test_wrong_experts_without_a_loop_become_f32() -> None:
    gone = [Variant("QMoE", "uint4_g32", accuracy=level, **QMOE) for level in (0, 4)]
    gone.append(Variant("GatherBlockQuantized", "uint4_g32", option="experts"))
    names, why = lowered(program(), without(*gone))
    assert not {"ort.qmoe", "ort.experts_nbits"} & names and "moe.experts" in names
    assert len(why) == 1 and "moe.experts with weights in f32" in why[0]


def test_wrong_activations_and_routings_become_a_loop() -> None:
    plain = capabilities.plain_variant("QMoE")
    clamped = "act=silu, alpha=1.702, beta=1.0, limit=7.0"
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
        ({"act": "act=gelu"}, "QMoE int4_g32 gated_gelu weights is rejected"),
        ({"act": "act=relu"}, "QMoE int4_g32 gated_relu weights was not tried"),
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
    assert len(why) == 1 and why[0].startswith("@main head: MatMulNBits int8_g32 is slow: 0.")


def test_another_version_of_the_runtime_is_noted() -> None:
    names, why = lowered(program(), replace(shipped(), runtime="0.1.2"))
    assert "ort.qmoe" in names
    assert len(why) == 1 and "recorded with 0.1.2, installed is" in why[0] and "moec targets cpu --probe" in why[0]


def test_attention_and_moe_ask_the_record() -> None:
    wrong = replace(shipped(), findings={v: replace(f, found=WRONG) for v, f in shipped().findings.items()})
    assert (
        wrong.refusal(capabilities.attention_variants(64))
        == f"GroupQueryAttention is wrong in ONNX Runtime {wrong.runtime}"
    )
    used = capabilities.attention_variants(12, window=4, softcap=1.0, masked=True, sinks=True)
    assert [v.option for v in used] == ["window", "softcap", "bias", "sinks", capabilities.ODD_HEADS]
    assert shipped().refusal(used[:4]) == "" and "rejected" in shipped().refusal(used)


# --- what quantize asks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "format", "reason"),
    [
        ("core.linear", "uint4_g32", None), ("core.linear", "uint2_g32", None), ("core.linear", "uint2_g16", "is slow: 0."),
        ("core.linear", "mxfp4", "MatMulNBits mxfp4 accuracy_level=4 was not tried"), ("nn.embedding", "uint2_g64", None),
        ("nn.embedding", "nvfp4", "was not tried"), ("moe.experts", "uint4_g32", None), ("moe.experts", "uint2_g16", "is slow"),
        ("moe.experts", "fp8_b128", "was not tried"), ("core.topk", "int4_g32", "no op of the target reads"),
    ],
)  # fmt: skip
def test_holds(op: str, format: str, reason: str | None) -> None:
    (use, *_) = (o for o in program().main.ops if o.name == op)
    found = holds(use, format_of(format))
    assert found is None if reason is None else reason in (found or "")


def test_holds_asks_for_groups_of_a_row() -> None:
    (use,) = (o for o in program().main.ops if o.name == "moe.experts")
    whole = [Variant("QMoE", "uint4_g32", one_group=True, accuracy=level, **QMOE) for level in (0, 4)]
    assert holds(use, format_of("uint4_g64")) is None
    assert "one group a row" in (holds(use, format_of("uint4_g64"), without(*whole)) or "")
    assert holds(use, format_of("uint4_g32"), without(*whole)) is None


def test_experts_that_only_a_loop_runs_are_held() -> None:
    (use,) = (o for o in program(act="act=gelu").main.ops if o.name == "moe.experts")
    assert holds(use, format_of("uint8_g64")) is None
    assert "was not tried" in (holds(use, format_of("mxfp4")) or "")


# --- another record ------------------------------------------------------------------------------------------------


def test_compiling_by_another_record(tmp_path: Path) -> None:
    (tmp_path / "program.moir").write_text(print_module(program()))
    record = without(*(Variant("QMoE", "uint4_g32", accuracy=level, **QMOE) for level in (0, 4)))
    (tmp_path / "record.json").write_text(capabilities.record_text(record))
    arguments = ["compile", tmp_path / "program.moir", "--stop-after", "kernel", "--why"]
    assert "ort.qmoe" in moec(*arguments).stdout
    result = moec(*arguments, "-D", f"capabilities={tmp_path / 'record.json'}")
    assert result.exit_code == 0, result.stderr
    assert "ort.qmoe" not in result.stdout and "uint4_g32 swiglu weights accuracy_level=4 is wrong" in result.stderr
    (use,) = (o for o in program().main.ops if o.name == "moe.experts")
    target = find_target("cpu", {"capabilities": str(tmp_path / "record.json")})
    assert "is wrong" in (target.holds(use, format_of("uint4_g32")) or "")
    with pytest.raises(MoecError, match="has no option speed"):
        find_target("cpu", {"speed": "9"})


# --- the command -------------------------------------------------------------------------------------------------


def moec(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, list(map(str, arguments)))


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, probed: Record) -> list[Record]:
    """Let the command find what the list holds, without running it again."""
    found = [probed]
    monkeypatch.setattr(probe, "probe", lambda quick, progress: found[0])
    return found


def test_targets_shows_the_record() -> None:
    text = moec("targets", "cpu").stdout
    assert "MatMulNBits" in text and "ONNX Runtime 1.32.0" in text and "weights_prepacked=1" in text
    (row,) = json.loads(moec("targets", "cpu", "--json").stdout)
    assert {o["operator"] for o in row["runtime"]["operators"]} >= {"QMoE", "MoE", "MatMulNBits", "GroupQueryAttention"}


def test_probe_prints_and_writes_what_it_found(stub: list[Record], tmp_path: Path) -> None:
    result = moec("targets", "cpu", "--probe", "--quick", "-o", tmp_path / "record.json")
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.splitlines()) == 2 + len(all_variants())
    assert capabilities.read_record(tmp_path / "record.json") == stub[0]
    rows = json.loads(moec("targets", "cpu", "--probe", "--json").stdout)
    assert [row["found"] for row in rows] == [f.found for f in stub[0].findings.values()]


def test_probe_fails_if_something_right_is_lost(stub: list[Record]) -> None:
    variant = Variant("RotaryEmbedding")
    stub[0] = replace(stub[0], findings={**stub[0].findings, variant: Finding(WRONG, error=0.5)})
    result = moec("targets", "cpu", "--probe")
    assert result.exit_code == 1
    assert "RotaryEmbedding: recorded right, f32 activations, found wrong" in result.stderr


@pytest.mark.parametrize(
    "arguments", [["targets", "--probe"], ["targets", "cpu", "--quick"], ["targets", "x", "--probe"]]
)
def test_wrong_use(arguments: list[str]) -> None:
    assert moec(*arguments).exit_code == 2
