"""`--memory-limit` where weights are calibrated: in batches, with the same results, and files on a disk that may be full."""

import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moec.compiler.check.live import live_bytes
from moec.compiler.driver import opt
from moec.compiler.formats.table import format_of
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.frontends.load import load
from moec.compiler.ir.pipelines import print_pipeline
from moec.compiler.quantize import sensitivity
from moec.compiler.quantize.calibrate import collect_inputs, random_windows, windows_in_memory
from moec.compiler.quantize.sensitivity import find_units, measure_sensitivity
from moec.compiler.weights.calibrated import PIECE, Inputs, sum_of_grams
from moec.compiler.weights.evaluate import evaluate_recipe
from moec.compiler.weights.row_file import RowFile
from moec.passes import PASSES
from moec.targets import TARGETS
from moec.targets.target import FUSED
from places import BENCH
from tiny_models import random_model

TO_MOE = print_pipeline(FUSED)
IDS = torch.randint(3, 128, (6, 40), generator=torch.Generator().manual_seed(5))
EVERY = 1 << 40  # rows: more than there are
LIMIT = 100  # MB
MAIN = "from moec.compiler.cli.commands import main; main()"


@pytest.fixture(scope="module")
def qwen():
    loaded = load(random_model(FAMILIES["qwen3_moe"]))
    return loaded, opt(loaded.module, TO_MOE)


def quantized(module, **options):
    policy = {"attention": "uint4_g16", "experts": "uint4_g16", "embedding": "f32", "head": "uint4_g16", **options}
    return PASSES["quantize"](module, TARGETS["cpu"], method="gptq", **policy)


@pytest.mark.parametrize("starved", ["rtn", "force"])
def test_batches_keep_what_one_run_keeps(qwen, starved):
    """Some experts are starved in each batch alone, and not in all together; others in all."""
    loaded, module = qwen
    module = quantized(module, starved=starved)
    each = live_bytes(module, {"B": 1, "S": 40, "P": 0})
    whole, parts = (collect_inputs(module, loaded.weights, IDS, limit=4 * n * each) for n in (6, 2))
    assert windows_in_memory(module, IDS, 2 * each)[1] == 2
    assert parts.coverage == whole.coverage and parts.tokens == whole.tokens == 240
    assert min(min(layer.tokens) for layer in whole.coverage) < 32 < max(max(layer.tokens) for layer in whole.coverage)
    assert list(parts.inputs) == list(whole.inputs)
    for name, inputs in whole.inputs.items():
        for expert in (None,) if inputs.chosen is None else range(8):
            found, wanted = parts.inputs[name].sample(expert, EVERY), inputs.sample(expert, EVERY)
            assert (found is None) == (wanted is None)
            if wanted is not None and starved == "rtn":
                assert torch.allclose(found, wanted, rtol=1e-2, atol=1e-4)
            elif wanted is not None:  # other tokens fill up, about as many
                assert len(wanted) // 2 <= len(found) <= 2 * len(wanted)


def test_a_window_that_is_too_large_is_cut_shorter(qwen):
    _, module = qwen
    long = torch.zeros(4, 512, dtype=torch.int64)
    each = live_bytes(module, {"B": 1, "S": 128, "P": 0})
    windows, count = windows_in_memory(module, long, each)
    assert (windows.shape, count) == ((16, 128), 1)
    assert windows_in_memory(module, long, 1)[0].shape == (32, 64)  # never shorter than that
    assert windows_in_memory(module, long, 1 << 40)[1] == 4


def test_sensitivities_in_batches(qwen, first_units):
    loaded, module = qwen
    whole, parts = (
        measure_sensitivity(module, loaded.weights, IDS, first_units, none_stored, batch)[1] for batch in (None, 4)
    )
    assert whole.keys() == parts.keys()
    for unit, kls in whole.items():
        assert all(abs(parts[unit][name] - kl) <= 1e-3 * kl + 1e-9 for name, kl in kls.items())


@pytest.fixture(scope="module")
def first_units(qwen):
    _, module = qwen
    return dict(list(find_units(module, lambda op, format: None).items())[:3])


def none_stored(module, layers):
    roles = ("experts", "attention", "shared", "dense", "embedding", "head")
    return PASSES["quantize"](module, None, layers=layers, **dict.fromkeys(roles, "f32"))


def test_costs_are_in_proportion_to_squared_errors(qwen, first_units):
    """With every format judged by one: here by errors computed from the numbers, of a table whose columns count alike."""
    loaded, module = qwen
    costs = measure_sensitivity(module, loaded.weights, IDS, first_units, none_stored, linear=0)[1]
    ((weight,),) = [ws for unit, ws in first_units.items() if unit.role == "embedding"]
    table = evaluate_recipe(weight.recipe, loaded.weights)
    found = next(kls for unit, kls in costs.items() if unit.role == "embedding")
    errors = {}
    for name in found:
        format = format_of(name)
        errors[name] = float((format.decode(format.encode(table), table.shape[-1]) - table).square().sum())
    assert len(found) > 8 and {"grid3_g16", "uint2_g16"} <= set(found)
    ratios = [found[name] / errors[name] for name in found]
    assert max(ratios) < 1.001 * min(ratios)


def test_some_rows_stand_for_a_large_weight(qwen, first_units, monkeypatch):
    loaded, module = qwen
    whole = measure_sensitivity(module, loaded.weights, IDS, first_units, none_stored, linear=0)[1]
    monkeypatch.setattr(sensitivity, "SAMPLED", 4096)
    monkeypatch.setattr(sensitivity, "PART", 4)
    some = measure_sensitivity(module, loaded.weights, IDS, first_units, none_stored, linear=0)[1]
    totals = [{} for _ in range(2)]
    for total, costs in zip(totals, (whole, some), strict=True):
        for unit, kls in costs.items():
            for name, kl in kls.items():
                total[unit[:2], name] = total.get((unit[:2], name), 0) + kl
    assert totals[0].keys() == totals[1].keys() and totals[0] != totals[1]
    assert all(0.7 < totals[1][key] / kl < 1.4 for key, kl in totals[0].items())


def test_random_windows_are_the_same_at_every_call(qwen):
    _, module = qwen
    windows = random_windows(module)
    assert torch.equal(windows, random_windows(module)) and windows.numel() == 8192
    assert windows.min() >= 0 and windows.max() == 127


def test_rows_on_disk_are_read_a_piece_at_a_time(tmp_path):
    x = torch.randn(5000, 1024, generator=torch.Generator().manual_seed(0))
    file = RowFile(tmp_path, 1024)
    for part in x.split(999):
        file.append(part)
    assert list(tmp_path.iterdir()) == []  # it has no name
    assert len(file) == 5000 and 2 * PIECE < 4 * 1024 * 5000
    chosen = torch.arange(3, 5000, 7)
    kept, wanted = Inputs(file, (chosen, None)), x.bfloat16()
    assert torch.equal(kept.sample(None, EVERY), wanted.float())
    assert torch.equal(kept.sample(0, EVERY), wanted[chosen].float())
    assert kept.pieces(1) is None and kept.sample(1, 9) is None
    grams = sum_of_grams(kept.pieces(0), wanted.shape[-1])
    assert torch.allclose(grams, wanted[chosen].float().T @ wanted[chosen].float(), atol=1e-2)
    assert torch.equal(kept.sample(0, 100), wanted[chosen[:: len(chosen) // 100]].float())


def run(code, *arguments, **options):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, **options)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_inputs_that_find_no_room_are_one_message(method, tmp_path):
    """A file may not grow beyond 64 kB in that process: what a full disk is to a write."""
    text = tmp_path / "text"
    text.write_text("Once upon a time there was a model of eight experts. " * 60)
    command = [
        sys.executable,
        "-c",
        MAIN,
        "compile",
        "examples/tiny-moe",
        "-o",
        tmp_path / "x",
        "--calibration",
        text,
    ]
    done = subprocess.run(
        [*map(str, command), "--quantize", f"int4,method={method}"], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: calibration inputs grew larger than a file may be here")
    assert "Traceback" not in done.stderr and not (tmp_path / "x").exists()


MEASURED = """
import sys
import moec
from pathlib import Path
source, out, quantize, limit, text = sys.argv[1:]
def memory(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1e3
moec.compile(source, stop_after="moe")  # what imports bring along
before = memory("VmRSS")
budget = "4.5bpw" if quantize == "auto" else None
moec.compile(source, out=out, quantize=quantize, budget=budget, calibration=text, memory_limit=int(limit) * 10**6)
print(memory("VmHWM") - before)
"""


# Blocks of 4 MB, and after each one of 128 kB that stays: the heap cannot shrink past those. Prints the bytes that are no
# pages of a file, with all blocks and with the small ones, beside those before. In a process of its own: what an
# allocator gives back hangs on all that ran before.
FREED = """
import sys, torch
from moec.compiler.weights.heap import returning_freed_memory

def held():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("RssAnon"))

with returning_freed_memory():
    pass  # from here on glibc does not choose itself
with returning_freed_memory(sys.argv[1] == "True"):
    before = held()
    pairs = [(torch.ones(1 << 20), torch.ones(1 << 15)) for _ in range(32)]
    whole = held() - before
    small = [b for _, b in pairs]
    del pairs
    print(whole, held() - before, len(small))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
@pytest.mark.parametrize("returning", [True, False])
def test_freed_blocks_between_small_ones_that_stay(returning):
    done = run(FREED, returning)
    assert done.returncode == 0, done.stderr
    whole, left, _ = map(int, done.stdout.split())
    assert whole > 120 << 20
    assert left < 16 << 20 if returning else left > 64 << 20


@pytest.mark.long
@pytest.mark.parametrize("quantize", ["int4,method=gptq", "int4,method=awq", "auto"])
def test_a_limit_holds_beside_the_imports(quantize, tmp_path_factory, tmp_path):
    folder = tmp_path_factory.getbasetemp() / "150mb"
    if not folder.exists():
        sizes = {"layers": 2, "hidden": 1024, "expert": 512, "experts": 16, "chosen": 4, "vocabulary": 8192}
        options = [str(word) for name, size in sizes.items() for word in (f"--{name}", size)]
        script = BENCH / "checkpoint.py"
        subprocess.run([sys.executable, script, folder, *options], check=True)
    assert sum(p.stat().st_size for p in folder.glob("*.safetensors")) > 1.4 * LIMIT * 1e6
    text = tmp_path / "text"
    text.write_text(Path(json.__file__).read_text()[:1500])  # a window or two, cut into batches
    done = run(MEASURED, folder, tmp_path / "x", quantize, LIMIT, text, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < LIMIT + 50
