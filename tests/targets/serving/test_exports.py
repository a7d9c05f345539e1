"""What engines are given of a plan: maps that obey the rules of each engine's loader, names that llama.cpp's tensors have, commands.

The engines' loaders need their accelerators: their rules are written down here from their sources (sglang
python/sglang/srt/eplb/expert_location.py, vllm-ascend vllm_ascend/eplb/core/eplb_utils.py).
"""

import json
import re
import shlex

import gguf
import pytest
from moec.targets.serving.experts import place_by_load
from moec.targets.serving.exports import expert_map, export_files
from moec.targets.serving.plan import Request, make_plan
from workload_for_tests import EXPERTS, LAYERS, small_workload

DENSE = 2  # layers without experts at the beginning


def made(on, copies=0, **asked):
    """Return the plan of the small model, with a map that has copies where they are asked for."""
    plan = make_plan(small_workload(), Request(on=on, **{"input": 100, "output": 50, **asked}))
    plan["experts"] |= {"layers": list(range(DENSE, DENSE + LAYERS)), "of_layers": DENSE + LAYERS}
    if copies:
        loads = [[1.0 + 9 * (e == layer) for e in range(EXPERTS)] for layer in range(LAYERS)]
        slots = place_by_load(loads, plan["degrees"]["ep"], copies).slots
        plan["experts"] |= {"copies": copies, "physical_to_logical": [list(row) for row in slots]}
    return plan


def options(script):
    """Return the words of the command in a script, and its options with their values."""
    first, command = script.split("\n", 1)
    assert first == "#!/bin/sh"
    words = shlex.split(command.replace("\\\n", " ").removeprefix("exec "))
    start = next(i for i, word in enumerate(words) if word.startswith("--"))
    found = {}
    for word in words[start:]:
        if word.startswith("--"):
            found[last := word] = True
        else:
            assert found[last] is True
            found[last] = word
    return words[:start], found


def test_vllm_and_sglang_start_as_planned():
    plan = made("hgx-h200", tp=2, attention_dp=4, ep=8, pp=1, batch=16, copies=8, weights="fp8", cache="fp8")
    files, notes = export_files(plan, "the model")
    assert notes == ["llama.cpp: no file, since it neither copies attention nor places whole experts on devices"]
    words, vllm = options(files["vllm.sh"])
    assert words == ["vllm", "serve", "the model"]
    assert vllm == {
        "--tensor-parallel-size": "2", "--data-parallel-size": "4", "--enable-expert-parallel": True, "--max-model-len": "150",
        "--max-num-seqs": "16", "--kv-cache-dtype": "fp8", "--quantization": "fp8", "--enable-eplb": True,
        "--eplb-config": '{"num_redundant_experts": 8}',
    }  # fmt: skip
    _, sglang = options(files["sglang.sh"])
    assert {name: sglang[name] for name in ("--tp-size", "--dp-size", "--ep-size", "--max-running-requests")} == {
        "--tp-size": "8", "--dp-size": "4", "--ep-size": "8", "--max-running-requests": "64",
    }  # fmt: skip
    assert sglang["--enable-dp-attention"] is True and sglang["--ep-num-redundant-experts"] == "8"
    # the map has a row for each decoder layer, of logical experts and copies, and every expert lies somewhere
    rows = json.loads(files[sglang["--init-expert-location"]])["physical_to_logical_map"]
    assert len(rows) == DENSE + LAYERS
    assert {len(row) for row in rows} == {EXPERTS + 8}
    assert all(set(row) == set(range(EXPERTS)) for row in rows)
    assert rows[DENSE:] == plan["experts"]["physical_to_logical"]


def test_what_an_engine_cannot_do_is_said():
    _, notes = export_files(made("hgx-h200", tp=4, attention_dp=2, ep=2, pp=1), "m")
    assert any(note.startswith("vllm: no file, since its experts lie whole on all 8 ranks") for note in notes)


@pytest.mark.parametrize("copies", [0, 16])
def test_map_of_ascend_is_that_of_its_loader(copies):
    plan = made("atlas-800-a2", tp=1, attention_dp=8, ep=8, pp=1, batch=4, copies=copies)
    files, _ = export_files(plan, "m")
    _, found = options(files["vllm-ascend.sh"])
    name = json.loads(found["--additional-config"])["eplb_config"]["expert_map_path"]
    content = json.loads(files[name])
    assert content["moe_layer_count"] == len(content["layer_list"]) == LAYERS
    for row, layer in zip(expert_map(plan), content["layer_list"], strict=True):
        assert layer["device_count"] == len(layer["device_list"]) == 8
        held = [device["device_expert"] for device in layer["device_list"]]
        assert {len(experts) for experts in held} == {(EXPERTS + copies) // 8}
        assert all(len(set(experts)) == len(experts) for experts in held)
        assert [e for experts in held for e in experts] == row
    (mindie,) = json.loads(files["mindie-config.json"])["BackendConfig"]["ModelDeployConfig"]["ModelConfig"]
    assert (mindie["worldSize"], mindie["dp"], mindie["moe_ep"], mindie["moe_tp"]) == (8, 8, 8, 1)
    assert mindie["models"]["deepseekv2"]["eplb"]["expert_map_file"] in files


def test_llama_cpp_leaves_experts_of_whole_layers_in_host_memory(tmp_path):
    box = tmp_path / "box.toml"
    box.write_text(
        'devices = 1\n[host]\nmemory = "16GB"\nbandwidth = "80GB/s"\nlink = "20GB/s"\n'
        '[device]\nmemory = "2400MB"\nbandwidth = "1TB/s"\npeak.bf16 = "100TFLOPS"\n'
    )
    plan = made(str(box), batch=2)
    files, _ = export_files(plan, "m")
    _, found = options(files["llama.cpp.sh"])
    pattern, place = found["--override-tensor"].split("=")
    assert place == "CPU" and found["--ctx-size"] == "300"
    kinds = (gguf.MODEL_TENSOR.FFN_UP_EXP, gguf.MODEL_TENSOR.FFN_GATE_EXP, gguf.MODEL_TENSOR.FFN_DOWN_EXP)
    names = [f"{gguf.TENSOR_NAMES[kind].format(bid=b)}.weight" for kind in kinds for b in range(DENSE + LAYERS)]
    chosen = {name for name in names if re.search(pattern, name)}
    moved = {int(name.split(".")[1]) for name in chosen}
    assert len(chosen) == 3 * len(moved)
    # as many layers as the plan has no room for, rounded up
    share = 1 - plan["offload"]["device"]
    assert moved == set(range(DENSE + LAYERS - len(moved), DENSE + LAYERS))
    assert len(moved) - 1 < share * LAYERS <= len(moved)
    others = [
        gguf.TENSOR_NAMES[k].format(bid=b)
        for k in (gguf.MODEL_TENSOR.FFN_UP, gguf.MODEL_TENSOR.ATTN_Q)
        for b in range(10)
    ]
    assert not any(re.search(pattern, f"{name}.weight") for name in others)
