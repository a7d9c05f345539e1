"""What ONNX Runtime runs right: the shipped record against the installed runtime, its file, and the command."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from moec.compiler.errors import MoecError
from moec.targets.cpu import capabilities
from moec.targets.cpu.capabilities import RIGHT, WRONG, Finding, Record, Variant, shipped_record
from moec.targets.cpu.probe import probe
from moec.targets.cpu.probe.variants import all_variants, has_speed
from moec_command import invoke

# --- the probe -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probed() -> Record:
    return probe.probe_variants(quick=True)


def test_the_record_is_what_the_runtime_does(probed: Record) -> None:
    assert list(probed.findings) == all_variants() == list(shipped_record().findings)
    assert probe.lost_variants(probed, shipped_record()) == []
    if (probed.runtime, probed.instructions) == (shipped_record().runtime, shipped_record().instructions):
        assert probe.changed_findings(probed, shipped_record()) == []


def test_the_record_has_speeds_and_traps() -> None:
    findings = shipped_record().findings
    assert all(f.speed for v, f in findings.items() if f.found == RIGHT and has_speed(v))
    assert all(f.message for f in findings.values() if f.found == "rejected")
    traps = ["int4_g64 swiglu weights weights_prepacked=1", "int4_g32 swiglu softmax over all experts"]
    assert {findings[v].found for v in findings if str(v).removeprefix("QMoE ") in traps} == {WRONG}


@pytest.mark.long
def test_the_whole_probe() -> None:
    found = probe.probe_variants()
    assert probe.lost_variants(found, shipped_record()) == []
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
    found = probe.probe_variants(
        variants, progress=lambda done, total: told.append((done, total)), work=end_at_the_third
    )
    assert [f.found for f in found.findings.values()] == [RIGHT, RIGHT, "crashed", RIGHT, RIGHT]
    assert "7" in found.findings[variants[2]].message
    assert told == [(i, 5) for i in range(1, 6)]


def test_a_fault_of_the_probe_is_no_finding() -> None:
    with pytest.raises(ZeroDivisionError):
        probe.probe_variants(all_variants()[:2], work=raise_at_once)


def test_wrong_results_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that read the zero points wrongly would be seen."""
    from moec.targets.cpu.probe import others as probe_others

    def off(name: str, given: dict[str, Any], **attrs: Any) -> Any:
        return refer(name, {**given, "zeros": given["zeros"] ^ 0x11}, **attrs)

    refer = probe_others.run_reference
    monkeypatch.setattr(probe_others, "run_reference", off)
    for accuracy in (0, 4):
        assert probe.try_variant(Variant("MatMulNBits", "uint4_g32", accuracy=accuracy), quick=True).found == WRONG


# --- the file --------------------------------------------------------------------------------------------------


def test_the_file_reads_back_as_it_was_written(tmp_path: Path) -> None:
    text = capabilities.record_text(shipped_record())
    assert text == (Path(capabilities.__file__).parent / capabilities.FILE).read_text(encoding="utf-8")
    (tmp_path / "record.json").write_text(text)
    assert capabilities.read_record(tmp_path / "record.json") == shipped_record()


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"runtime": "1", "variants": [{"found": "right"}]}'])
def test_a_file_that_is_no_record(text: str, tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(MoecError, match=r"no record of a probe|record\.json is not (a )?JSON"):
        capabilities.read_record(tmp_path / "record.json")
    with pytest.raises(MoecError, match="cannot be read"):
        capabilities.read_record(tmp_path / "none.json")


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, probed: Record) -> list[Record]:
    """Let the command find what the list holds, without running it again."""
    found = [probed]
    monkeypatch.setattr(probe, "probe_variants", lambda quick, progress: found[0])
    return found


def test_targets_shows_the_record() -> None:
    text = invoke("targets", "cpu").stdout
    assert "MatMulNBits" in text and "ONNX Runtime 1.32.0" in text and "weights_prepacked=1" in text
    (row,) = json.loads(invoke("targets", "cpu", "--json").stdout)
    assert {o["operator"] for o in row["runtime"]["operators"]} >= {"QMoE", "MoE", "MatMulNBits", "GroupQueryAttention"}


def test_probe_prints_and_writes_what_it_found(stub: list[Record], tmp_path: Path) -> None:
    result = invoke("targets", "cpu", "--probe", "--quick", "-o", tmp_path / "record.json")
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.splitlines()) == 2 + len(all_variants())
    assert capabilities.read_record(tmp_path / "record.json") == stub[0]
    rows = json.loads(invoke("targets", "cpu", "--probe", "--json").stdout)
    assert [row["found"] for row in rows] == [f.found for f in stub[0].findings.values()]


def test_probe_fails_if_something_right_is_lost(stub: list[Record]) -> None:
    variant = Variant("RotaryEmbedding")
    stub[0] = replace(stub[0], findings={**stub[0].findings, variant: Finding(WRONG, error=0.5)})
    result = invoke("targets", "cpu", "--probe")
    assert result.exit_code == 1
    assert "RotaryEmbedding: recorded right, f32 activations, found wrong" in result.stderr


@pytest.mark.parametrize(
    "arguments", [["targets", "--probe"], ["targets", "cpu", "--quick"], ["targets", "x", "--probe"]]
)
def test_wrong_use(arguments: list[str]) -> None:
    assert invoke(*arguments).exit_code == 2
