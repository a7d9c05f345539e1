"""The benchmark's parts at tiny sizes: its checkpoint loads and compiles, its scripts start, its sums are right."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from chips_for_tests import needs_triton
from places import BENCH, CONFIGS

SIZES = {"layers": 2, "hidden": 64, "expert": 32, "experts": 8, "chosen": 2, "heads": 4, "vocabulary": 320}


def script(name, *arguments):
    """Run one of the benchmark's scripts and return its process."""
    command = [sys.executable, BENCH / name, *arguments]
    return subprocess.run([str(c) for c in command], capture_output=True, text=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return the benchmark's checkpoint at tiny sizes."""
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    sizes = [word for name, size in SIZES.items() for word in (f"--{name}", size)]
    done = script("checkpoint.py", folder, *sizes)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def parts():
    """Return the benchmark's modules that run under this python."""
    sys.path.insert(0, str(BENCH))
    try:
        import batched_bench
        import checkpoint
        import checkpoint_v4
        import families
        import lengths
        import process
        import quality
        import report
        import scale
    finally:
        sys.path.remove(str(BENCH))
    found = (batched_bench, checkpoint, checkpoint_v4, families, lengths, process, quality, report, scale)
    return {module.__name__: module for module in found}


def test_checkpoint_is_what_transformers_loads(checkpoint):
    import torch
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, output_loading_info=True
    )
    assert isinstance(model, transformers.OlmoeForCausalLM)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        logits = model(torch.arange(3, 43)[None]).logits[0]
    assert 0.3 < logits.std() < 3  # neither exploded nor collapsed
    assert len(set(logits.argmax(-1).tolist())) > 20


def test_checkpoint_compiles_and_runs(checkpoint, tmp_path):
    import moec

    artifact = moec.compile(checkpoint, out=tmp_path / "artifact")
    text = "The router takes two experts.\n"
    assert artifact.tokenizer.decode(artifact.tokenizer.encode(text)) == text
    assert len(artifact.run(tokens=[5, 6, 7], max_new_tokens=4, greedy=True, eos=()).tokens[0]) == 4
    sys.path.insert(0, str(BENCH))
    try:
        import compiled
    finally:
        sys.path.remove(str(BENCH))
    model = compiled.Compiled(artifact.folder, threads=1)
    model.fill([[5, 6, 7, 8], [9, 10, 11, 12]])
    behind = [len(model.filled), model.filled.length]
    assert model.steps([[3, 4], [5, 6], [7, 8]]) > 0
    assert model.steps([[3, 4], [5, 6]]) > 0 and [len(model.filled), model.filled.length] == behind  # as it was filled


def test_more_layers_begin_with_the_same_weights(checkpoint, parts, tmp_path):
    make = parts["checkpoint"]
    three = make.write(tmp_path / "three", make.Sizes(**{**SIZES, "layers": 3}))
    name = "model-00001-of-0000{}.safetensors"
    assert (checkpoint / name.format(3)).read_bytes() == (three / name.format(4)).read_bytes()
    places = json.loads((three / "model.safetensors.index.json").read_text())["weight_map"]
    assert {file.name for file in three.glob("*.safetensors")} == set(places.values())
    with pytest.raises(SystemExit, match="a vocabulary of 200 cannot be made"):
        make.write(tmp_path / "small", make.Sizes(vocabulary=200))


def test_a_contender_answers_and_is_timed(checkpoint, parts, tmp_path):
    command = [sys.executable, BENCH / "eager.py", checkpoint, "--threads", "1"]
    contender = parts["process"].Contender(command, tmp_path / "eager.log", {})
    try:
        assert contender.facts["load_seconds"] > 0
        assert contender.facts["after"]["resident"] > contender.facts["after"]["anonymous"] > 0
        assert contender.ask(prefill=16, seed=1) > 0
        assert contender.ask(decode=3, prompt=4, seed=1) > 0
        assert "T" in (Path("/proc") / str(contender.process.pid) / "stat").read_text().split()[2]  # stopped
    finally:
        contender.close()
    hidden, expert, chosen = SIZES["hidden"], SIZES["expert"], SIZES["chosen"]
    layer = 4 * hidden * hidden + 4 * hidden + SIZES["experts"] * hidden + chosen * 3 * hidden * expert
    wanted = 2 * (SIZES["layers"] * layer + hidden + SIZES["vocabulary"] * hidden + hidden)
    assert contender.facts["bytes_per_token"] == wanted


def test_commands_are_timed_with_their_own_peak(tmp_path):
    # in a process of its own, as the script does it: a child's peak counts what its parent held when it began
    code = f"""
import sys, pathlib
sys.path.insert(0, {str(BENCH)!r})
from process import measured
for text in ("pass", "x = b'1' * 200_000_000", "raise ValueError('went wrong')"):
    print(measured([sys.executable, "-c", text], pathlib.Path({str(tmp_path / "log")!r})).peak_bytes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    small, large = map(int, done.stdout.split())
    assert 150e6 < large - small < 250e6
    assert done.returncode == 1 and "went wrong" in done.stderr


def test_ratios_are_medians_of_the_rounds(parts, tmp_path):
    rates = {"moec": [20, 30, 10], "llama.cpp": [10, 10, 10]}
    facts = {"build": {}, "weights_bytes": 100, "after": {"resident": 150}, "load_seconds": 1.0, "bytes_per_token": 5}
    found = {name: dict(facts, types={"output": "Q6_K"}, version="1") for name in rates}
    rounds = [
        {name: {"decode": speed[i], "prefill": 2 * speed[i]} for name, speed in rates.items()}
        | {"bandwidth": [200, 400, 300], "busy": [0.1 * i]}
        for i in range(3)
    ]  # fmt: skip
    settings = {"layers": 4, "threads": 2, "runs": 3, "prompt": 512, "steps": 128, "compile": ""}
    result = parts["report"].summarize(settings, found, rounds)
    moec = result["contenders"]["moec"]
    assert (moec["decode"]["median"], moec["decode"]["min"], moec["decode"]["ratio"]) == (20, 10, 2)
    assert moec["bandwidth_share"] == pytest.approx(20 * 5 / 300)
    assert (moec["resident_per_weights"], result["busy_cores"]) == (1.5, pytest.approx(0.2))
    result["quality"] = [{"name": "moec", "kl_mean": 0.02, "top1": 0.9, "perplexity_ratio": 1.01, "bits": 4.5}]
    text = parts["report"].markdown(result)
    assert "| moec | 20.0 (10.0 to 30.0) | 2.00 | 40 (20 to 60) | 2.00 |" in text
    assert "| moec | 0.02000 | 90.00% | 1.0100 | 4.50 |" in text
    page = tmp_path / "BENCHMARKS.md"
    page.write_text("# Benchmarks\n\n## The last run\n\nold figures\n\n## More\n\nof it\n")
    parts["report"].write_markdown(result, page)
    assert page.read_text() == f"# Benchmarks\n\n## The last run\n\n{text}\n## More\n\nof it\n"


# of ik_llama.cpp's own description of the program
BATCHED = """
main: n_kv_max = 16384, n_batch = 2048, n_ubatch = 512, flash_attn = 1, is_pp_shared = 0, n_gpu_layers = 0, n_threads = 2

|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |
|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|
|   128 |    128 |    1 |    256 |    0.108 |  1186.64 |    3.079 |    41.57 |    3.187 |    80.32 |
|   128 |    128 |    4 |   1024 |    0.373 |  1373.96 |    6.878 |    74.44 |    7.251 |   141.23 |
"""


def test_rows_of_another_program_are_read(parts, tmp_path):
    assert parts["batched_bench"].read_rows(BATCHED) == {1: (0.108, 3.079), 4: (0.373, 6.878)}
    with pytest.raises(SystemExit, match="has no llama-batched-bench"):
        parts["batched_bench"].program_in(tmp_path)
    done = script("lengths.py", "--work", tmp_path, "--ik", tmp_path)
    assert done.returncode == 2 and "--ik needs --llama-python" in done.stderr


def test_lengths_are_told_in_a_table(parts):
    lengths, report = parts["lengths"], parts["report"]
    rates = {"moec": [20.0, 30.0, 10.0], "llama.cpp": [10.0, 10.0, 10.0]}
    points = [
        {"kind": kind, "tokens": 512, "batch": batch, "stream": report.spread([3e10]), "busy": 0.2, "ratios": {"moec": 2.0},
         "rates": {name: report.spread(found) for name, found in rates.items()}}
        for kind, batch in (("prefill", 1), ("decode", 8))
    ]  # fmt: skip
    settings = {"layers": 4, "threads": 2, "runs": 3, "steps": 64}
    text = lengths.markdown({"points": points, "settings": settings, "machine": report.machine()})
    assert "| prefill of 512 | 20 (10 to 30) | 10 (10 to 10) | 2.00 | 30.0 |" in text
    assert "| decode behind 512, batch 8 | 20.0 (10.0 to 30.0) | 10.0 (10.0 to 10.0) | 2.00 | 30.0 |" in text


@pytest.mark.parametrize(
    "name",
    [
        "lengths.py",
        "several_tokens.py",
        "compare.py",
        "quality.py",
        "checkpoint.py",
        "bandwidth.py",
        "eager.py",
        "families.py",
    ],
)
def test_scripts_explain_themselves(name):
    done = script(name, "--help")
    assert done.returncode == 0 and "usage:" in done.stdout


@needs_triton
@pytest.mark.long
def test_families_compile_with_objects_and_no_spills():
    """Of latent attention with a delta net, of mamba, and of experts that the model's code spells out."""
    names = ("kimi_linear", "jamba", "muse_spark")
    done = script("families.py", "--families", ",".join(names), "--buckets", "16")
    rows = [line.split() for line in done.stdout.splitlines() if " kernels, no spills; " in line]
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row[:2] for row in rows] == [[name, chip] for name in names for chip in ("nvidia-h200", "amd-mi355x")]
    assert all(int(row[2]) >= 12 for row in rows), done.stdout


def test_a_family_with_a_spill_or_without_an_object_fails(parts, monkeypatch, capsys):
    families = parts["families"]
    monkeypatch.setattr(sys, "argv", ["families.py", "--families", "llama", "--targets", "nvidia-h200"])
    monkeypatch.setattr(families.driver, "load", lambda model: None)
    for spilled, failed, code in (((), (), 0), (("linear_0_t4",), (), 1), ((), ("append_0_t4",), 1)):
        row = families.Row(12, spilled, failed, ("nn.embedding",))
        monkeypatch.setattr(families, "compiled", lambda *given, row=row: row)
        assert families.main() == code
        assert all(name in capsys.readouterr().out for name in (*spilled, *failed))


def test_unknown_contenders_are_refused(tmp_path):
    done = script("compare.py", "--work", tmp_path, "--skip", "vllm")
    assert done.returncode == 2 and "vllm" in done.stderr


def test_held_out_windows_cover_the_text(parts):
    windows = parts["quality"]._windows(1000)
    assert [len(w) for w in windows] == [256, 256, 256, 232]
    assert all(isinstance(w, np.ndarray) for w in windows)


# --- the checkpoint of DeepSeek-V4-Flash's width ---------------------------------------------------------------

TINY_V4 = {
    "hidden_size": 192, "moe_intermediate_size": 160, "q_lora_rank": 160, "o_lora_rank": 16, "o_groups": 2,
    "num_attention_heads": 4, "head_dim": 32, "qk_rope_head_dim": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "index_n_heads": 4, "index_head_dim": 16, "vocab_size": 320,
}  # fmt: skip


@pytest.fixture(scope="module")
def v4(parts, tmp_path_factory):
    """Return a small checkpoint of checkpoint_v4.py."""
    made = parts["checkpoint_v4"]
    return made.write(tmp_path_factory.mktemp("v4") / "tiny", {**made.config(3), **TINY_V4})


def test_v4_checkpoint_is_official(v4):
    """It names what the import reads, with all kinds of layers, and its logits are neither exploded nor collapsed."""
    import torch
    from moec.compiler.frontends.load import load
    from moec.compiler.frontends.transformers.dequantized import dequantized_model

    loaded = load(v4)
    used = {"past_key_values." + p.name.split(".", 1)[1] for p in loaded.module.main.params if p.type.state}
    assert {f"past_key_values.{n}" for n in ("0.window", "1.index_entries", "2.entries")} <= used
    model, _ = dequantized_model(v4)
    with torch.no_grad():
        logits = model(torch.arange(3, 43)[None]).logits[0]
    assert 0.3 < logits.std() < 3
    assert len(set(logits.argmax(-1).tolist())) > 20
    ids = model.model.layers[0].mlp.gate.tid2eid
    assert all(len(set(row)) == len(row) and max(row) < 8 for row in ids.tolist())


def test_v4_checkpoint_compiles_and_its_figures_are_kept(v4, parts, tmp_path):
    scale = parts["scale"]
    cost, made = scale.compiled(v4, tmp_path / "artifact", scale.INT4, tmp_path / "log")
    assert cost.seconds > 0 and cost.cpu_seconds > 0 and made > 10_000
    assert not (tmp_path / "artifact").exists()


def test_scale_table(parts):
    scale = parts["scale"]
    costs = [{"seconds": s, "cpu_seconds": 2 * s, "peak_bytes": s * 10**9, "artifact_bytes": 10**9} for s in (3, 1, 2)]
    row = scale.summary("x", 4 * 10**9, scale.INT4, costs)
    assert (row["seconds"], row["seconds_per_gb"], row["cpu_seconds_per_gb"], row["peak_bytes"]) == (2, 0.5, 1, 3e9)
    assert scale.table([row]).splitlines()[2] == (
        "| x | 4.00 | `--quantize int4` | 2.0 (1.0 to 3.0) | 0.50 | 1.00 | 3.00 | 1.00 |"
    )


@needs_triton
@pytest.mark.long
def test_the_kernels_of_a_family_are_compiled_and_counted():
    done = script("families.py", "--families", "jamba", "--targets", "amd-mi355x", "--buckets", "4")
    assert done.returncode == 0 and "no spills" in done.stdout, done.stdout + done.stderr


def test_unknown_families_are_refused():
    done = script("families.py", "--families", "olmo,jamba")
    assert done.returncode == 2 and "there is no family olmo" in done.stderr


def test_a_step_of_several_tokens_is_timed(checkpoint, tmp_path):
    import moec

    moec.compile(checkpoint, out=tmp_path / "artifact")
    options = ("--past", "8", "--rounds", "4", "--steps", "2", "--threads", "1", "--json", tmp_path / "out.json")
    done = script("several_tokens.py", tmp_path / "artifact", *options)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert row["time"]["1"] == row["bytes"]["1"] == 1 and row["time"]["4"] > 0
    hidden, experts, chosen = SIZES["hidden"], SIZES["experts"], SIZES["chosen"]
    layer = 4 * hidden * hidden + 4 * hidden + experts * hidden  # without the experts
    expert = 3 * hidden * SIZES["expert"]
    dense = SIZES["layers"] * layer + hidden + SIZES["vocabulary"] * hidden
    state = SIZES["layers"] * 2 * 8 * hidden

    def numbers(tokens):
        rows = SIZES["vocabulary"] * (1 - (1 - 1 / SIZES["vocabulary"]) ** tokens) * hidden
        return dense + SIZES["layers"] * experts * (1 - (1 - chosen / experts) ** tokens) * expert + rows + state

    assert row["bytes"]["3"] == pytest.approx(numbers(3) / numbers(1), rel=0.01)


@pytest.mark.long
def test_bytes_of_steps_are_counted_of_a_config_alone():
    """DeepSeek-V3: 58 layers with 8 of 256 experts of 3 * 7168 * 2048 numbers, of 37 B active ones less the embedding."""
    done = script("several_tokens.py", CONFIGS / "DeepSeek-V3")
    assert done.returncode == 0, done.stderr
    name, two, *_, draft, even = (cell.strip() for cell in done.stdout.strip(" |\n").split("|"))
    experts, active = 58 * 8 * 3 * 7168 * 2048, 37.0e9 - 129280 * 7168
    more = (1 - (1 - 8 / 256) ** 2) * 256 / 8 - 1
    assert (name, float(two)) == ("DeepSeek-V3", pytest.approx(1 + more * experts / active, abs=0.02))
    assert even == f"{float(two) + float(draft) - 1:.0%}"
