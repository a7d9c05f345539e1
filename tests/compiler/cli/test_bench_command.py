"""`moec bench` as a user types it: its tables, its JSON, what it refuses, on the cpu and on an accelerator's artifact."""

from __future__ import annotations

import json

import pytest
from moec.compiler.cli.bench import show_bench
from moec.compiler.runtime.bench_result import Bench, Measured, OpShare, Plan, Point, Profile, Spread
from moec_command import invoke, shell
from places import TINY

FEW = ("--prompt", "8,24", "--past", "8,40", "--batch", "1,3", "--steps", "3", "--repeats", "3")
LAYERS, HIDDEN, EXPERT, VOCABULARY, HEADS, KV_HEADS, HEAD = 4, 256, 128, 2048, 4, 2, 64  # of examples/tiny-moe


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """Return the example, compiled for the cpu in float32."""
    out = tmp_path_factory.mktemp("bench") / "tiny"
    assert invoke("compile", TINY, "-o", out).exit_code == 0
    return out


@pytest.fixture(scope="module")
def found(artifact):
    """Return what is measured of it, as data."""
    done = invoke("bench", artifact, *FEW, "--threads", 1, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_tables_fit_a_pipe_and_80_columns(artifact):
    done = shell("bench", artifact, "--prompt", "8", "--past", "8", "--steps", 2, "--repeats", 2)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert {"prefill", "decode", "where the time goes: decode behind 8 tokens, batch 1"} <= set(lines)
    assert any(line.startswith("  GroupQueryAttention") for line in lines)
    assert any(line.startswith("streaming read of the memory") for line in lines)


def test_every_length_and_batch_is_measured(found):
    assert (found["schema"], found["target"], found["threads"], found["times_are_speed"]) == (1, "cpu", 1, True)
    assert [(row["prompt"], row["batch"]) for row in found["prefill"]] == [(8, 1), (24, 1), (8, 3), (24, 3)]
    assert [(row["past"], row["batch"]) for row in found["decode"]] == [(8, 1), (40, 1), (8, 3), (40, 3)]
    for row in (*found["prefill"], *found["decode"]):
        seconds, rate = row["seconds"], row["tokens_per_second"]
        assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
        assert rate["median"] == pytest.approx(row["batch"] * row.get("prompt", 1) / seconds["median"])
        assert row["predicted_seconds"] is None


def test_bytes_of_a_step_are_those_of_the_model(found):
    """In float32: what a token passes, two of sixteen experts, one row of the embedding; keys and values of all layers."""
    attention = HIDDEN * HEAD * (HEADS + 2 * KV_HEADS + HEADS) + 2 * HEAD
    layer = attention + 16 * HIDDEN + 2 * HIDDEN + 2 * 3 * HIDDEN * EXPERT
    weights = 4 * (LAYERS * layer + HIDDEN + VOCABULARY * HIDDEN)
    for row in found["decode"]:
        past = row["past"] + 1  # half of the three steps
        assert row["bytes"]["states"] == row["batch"] * past * LAYERS * 2 * KV_HEADS * HEAD * 4
        if row["batch"] == 1:
            assert row["bytes"]["weights"] == pytest.approx(weights, rel=1e-3)
        else:
            assert row["bytes"]["weights"] > weights  # three tokens choose more experts than one
        read = sum(row["bytes"].values())
        assert row["bytes_per_token"] == read / row["batch"]
        stream = found["stream_bytes_per_second"]
        shares = [read / row["seconds"][a] / stream[b] for a, b in (("max", "max"), ("min", "min"))]
        assert shares[0] <= row["bandwidth_share"] <= shares[1]


def test_time_is_taken_apart_by_parts_of_the_model(found):
    points = [(p["kind"], p["tokens"], p["batch"]) for p in found["profiles"]]
    assert points == [("prefill", 24, 1), ("decode", 8, 1), ("decode", 40, 1)]
    for profile in found["profiles"]:
        parts = {op["name"]: op["part"] for op in profile["ops"] if op["name"] in ("GroupQueryAttention", "MoE")}
        assert parts == {"GroupQueryAttention": "attention", "MoE": "experts"}
        assert {op["part"] for op in profile["ops"]} == {"attention", "experts", "head", "rest"}
        runs = {(op["part"], op["name"]): op["runs"] for op in profile["ops"]}
        assert runs["attention", "GroupQueryAttention"] == runs["experts", "MoE"] == LAYERS
        assert 0 < sum(op["seconds"] for op in profile["ops"]) <= profile["seconds"]


def test_defaults_are_as_far_as_the_context_goes(artifact):
    done = invoke("bench", artifact, "--prompt", "4", "--steps", 1, "--repeats", 1, "--no-ops", "--json")
    found = json.loads(done.stdout)
    assert [row["past"] for row in found["decode"]] == [16, 1024, 2046]  # and two steps, of which one is measured
    assert found["profiles"] == []


@pytest.mark.parametrize(
    "options, said",
    [
        (("--past", "2048"), "--past is 2048: the model's context is 2048 tokens, of which 33 are for the steps"),
        (("--prompt", "2049"), "--prompt is 2049: the model's context is 2048 tokens\n  give at most 2048"),
        (("--past", "8,0"), "--past is 0\n  give 1 or more"),
        (("--batch", "0"), "--batch is 0\n  give 1 or more"),
        (("--batch", "4096"), "--batch is 4096: the program takes no more sequences\n  give at most 1024"),
        (("--batch", "1024", "--past", "2000000000"), "--past is 2000000000: the model's context"),
        (("--steps", "0"), "--steps is 0"),
        (("--steps", "5000"), "--steps is 5000: the model's context is 2048 tokens"),
        (("--repeats", "-1"), "--repeats is -1"),
        (("--prompt", "16;512"), "'16;512' is not a list of numbers such as 16,512"),
        (("--prompt", ""), "'' is not a list of numbers"),
        (("--device", "cuda"), "does not run on cuda"),
    ],
)
def test_wrong_use_is_one_error(artifact, options, said):
    done = invoke("bench", artifact, *options)
    assert (done.exit_code, done.stdout) == (2, "")
    assert said in done.stderr and done.stderr.lower().count("error:") == 1


def test_a_folder_that_is_no_artifact(tmp_path):
    done = invoke("bench", tmp_path)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: the folder has no moec.json")


def test_caches_that_do_not_fit_are_refused_before_they_are_made(artifact, monkeypatch):
    from moec.compiler.runtime import bench

    monkeypatch.setattr(bench, "free_memory", lambda: 10**9)
    done = invoke("bench", artifact, "--batch", "1,512", "--past", "1024")
    assert done.exit_code == 2
    assert "decoding 512 sequences behind 1024 tokens takes" in done.stderr and "1 GB are free" in done.stderr


def test_large_numbers_on_a_chip_fit_80_columns(capsys):
    plan = Plan((8192,), (131072,), (16,), steps=32, repeats=5)
    rate = Spread(12345.6, 11999.9, 13000.1)
    rows = tuple(
        Measured(Point(kind, n, 16), Spread(0.01234, 0.01, 0.02), rate, 10**9, 10**9, 0.87, 0.0123)
        for kind, n in (("prefill", 8192), ("decode", 131072))
    )
    ops = (OpShare("experts", "rope_append_0_qk_rope_append_t8192", 0.005, 61, 0.004),)
    profiles = (Profile(Point("decode", 131072, 16), 0.0123, ops),)
    show_bench(Bench("out", "nvidia-h200", "NVIDIA H200", True, 16, plan, None, rows, profiles))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.split()[-1:] == ["87%"] for line in lines)
    assert any("rope_append_0_qk_rope_append_t8192" in line and line.endswith("4.00") for line in lines)


@pytest.mark.long
def test_an_accelerator_is_simulated_beside_its_predictions(tmp_path):
    """Unasked little is measured; every kernel of the two profiles has its prediction."""
    out = tmp_path / "tiny-h200"
    compiled = invoke("compile", TINY, "--target", "nvidia-h200", "-D", "kernels=source", "-o", out)
    assert compiled.exit_code == 0, compiled.stderr
    done = invoke("bench", out, "--device", "simulator", "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["times_are_speed"], found["stream_bytes_per_second"]) == (False, None)
    assert found["runs_on"] == "the simulator of nvidia-h200"
    (prefill,), (decode,) = found["prefill"], found["decode"]
    assert (prefill["prompt"], decode["past"]) == (16, 16)
    predicted = invoke("inspect", TINY, "--target", "nvidia-h200", "--context", 16, "--json")
    step = json.loads(predicted.stdout)["predicted"]
    assert decode["predicted_seconds"] == pytest.approx(step["time"])
    assert decode["bytes"] == {name: step["bytes"][name] for name in ("weights", "states")}
    assert decode["bandwidth_share"] is None  # of a simulator it would say nothing
    kernels = {k["name"]: k["predicted"]["time"] for k in json.loads((out / "kernels.json").read_text())["kernels"]}
    for profile in found["profiles"]:
        assert {op["part"] for op in profile["ops"]} == {"attention", "experts", "head", "rest"}
        for op in profile["ops"]:
            assert op["predicted"] == pytest.approx(op["runs"] * kernels[op["name"]])
    shown = invoke("bench", out, "--device", "simulator", "--no-ops").stdout
    assert "times are those of the simulator of nvidia-h200, not the speed of a chip" in shown
