"""The artifact for an accelerator: its files, their plan, and objects where there is a compiler."""

import dataclasses
import json

import jsonschema
import moec
import pytest
import safetensors.torch
import torch
from chips_for_tests import needs_triton
from moec.compiler.artifact.manifest import check_files, read_manifest
from moec.compiler.errors import MoecError
from moec.compiler.text.parser import parse_module
from moec.targets import declare_kernel_ops
from moec.targets.accelerator.artifact import objects
from moec.targets.accelerator.artifact.device_placement import place_on_devices
from moec.targets.accelerator.artifact.engine_files import (
    NOT_ASKED,
    Shard,
    engine_files,
    file_name,
    find_problems,
    find_shard,
)
from moec.targets.accelerator.artifact.objects import compile_kernels
from moec.targets.accelerator.artifact.options import Tuning, read_options
from moec.targets.accelerator.artifact.shards import find_shards
from moec.targets.accelerator.artifact.spec import kernel_specs
from moec.targets.accelerator.chip.profile import find_profile
from moec.targets.accelerator.lower.module import lower_module
from moec.targets.accelerator.select.choose import weight_layouts
from moec.targets.accelerator.triton.compile import Compiled
from moec.targets.accelerator.triton.source import triton_source
from moec_command import invoke
from places import ROOT, TINY

H200 = find_profile("nvidia-h200", {})
TEXT = """moec 1 stage moe
source "none"
dim B in 1..64
dim S in 1..128
dim P in 0..128
func @layer(%x: f32[B, S, 64], %key: state f32[B, 1, P, 64]) -> (f32[B, S, 64], state f32[B, 1, P + S, 64]) weights "l.{layer}." {
  const %w : f32[64, 64] = cast(tensor("w", bf16[64, 64]), to=f32)
  %y = core.linear(%x, %w, _) : f32[B, S, 64]
  %head = core.reshape(%y) {shape=[B, 1, S, 64]} : f32[B, 1, S, 64]
  %next = nn.cache_append(%key, %head) {axis=2} : state f32[B, 1, P + S, 64]
  return %y, %next
}
func @main(%x: f32[B, S, 64], %k0: state f32[B, 1, P, 64], %k1: state f32[B, 1, P, 64])
    -> (f32[B, S, 64], state f32[B, 1, P + S, 64], state f32[B, 1, P + S, 64]) {
  %a, %n0 = call @layer(%x, %k0) {layer=0} : f32[B, S, 64], state f32[B, 1, P + S, 64]
  %b, %n1 = call @layer(%a, %k1) {layer=1} : f32[B, S, 64], state f32[B, 1, P + S, 64]
  return %b, %n0, %n1
}
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    out = tmp_path_factory.mktemp("artifact") / "a"
    options = {"kernels": "source"}
    return moec.compile(TINY, target="nvidia-h200", quantize="experts=mxfp4", out=out, options=options)


def test_the_artifact_is_whole(artifact):
    manifest = read_manifest(artifact.folder)
    check_files(artifact.folder, manifest, hashes=True)
    assert manifest["target"] == "nvidia-h200" and manifest["lossy"]
    assert "mxfp4" in manifest["precision"]["layer"] and len(manifest["states"]) == 8
    data = json.loads((artifact.folder / "kernels.json").read_text())
    jsonschema.validate(data, json.loads((ROOT / "targets/accelerator/artifact/kernels.schema.json").read_text()))
    for kernel in data["kernels"]:
        compile((artifact.folder / kernel["source"]).read_text(), kernel["source"], "exec")
    weights = {}
    for file in sorted((artifact.folder / "weights").iterdir()):
        weights |= safetensors.torch.load_file(file)
    plan = json.loads((artifact.folder / "plan.json").read_text())
    labels = {call["label"]: call["function"] for call in plan["calls"]}
    functions = {f.name: f for f in moec.load(artifact.folder / "program.moir").functions}
    for label, function in labels.items():
        for const in functions[function].consts:
            name = f"{label}/{const.value.name}"
            name = plan["same"].get(name, name)
            assert name in weights or f"{name}.codes" in weights, name
    used = next(k for k in data["kernels"] if k["kind"] == "grouped_up")["weights"]["up"]
    for part, stated in used["parts"].items():
        assert list(weights[f"layer.2/experts_gate_up_proj.{part}"].shape) == stated["shape"]


def test_it_is_inspected_and_run(artifact):
    result = invoke("inspect", artifact.folder)
    assert (
        result.exit_code == 0
        and "target nvidia-h200" in result.output
        and "weights/layer.3.safetensors" in result.output
    )
    assert len(artifact.run(tokens=[1, 2], max_new_tokens=2, eos=()).tokens[0]) == 2


def test_the_plan_counts_bytes():
    module = lower_module(parse_module(TEXT)).module
    plan = place_on_devices(module, H200, find_shards(module, weight_layouts(module, H200)))
    (device,) = plan["devices"]
    assert device["weights"] == sum(s["bytes"] for s in device["shards"]) == 2 * 64 * 64 * 2
    assert plan["state"]["bytes_per_token"] == 2 * 64 * 2
    assert plan["workspace"] == {"tokens": 128, "bytes": 2 * 128 * 64 * 2}
    assert plan["fits"] and plan["free"] == device["memory"]["bytes"] - device["weights"] - plan["workspace"]["bytes"]
    small = find_profile("nvidia-h200", {"memory.dram.capacity": "16kB"})
    plan = place_on_devices(module, small, find_shards(module, weight_layouts(module, small)))
    assert plan["fits"] is False and plan["free"] < 0 and plan["tokens_of_state"] == 0


# --- objects -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernels():
    """Return the kernel of the linear alone."""
    made = kernel_specs(lower_module(parse_module(TEXT)).module, H200, (16,))
    return dataclasses.replace(made, kernels=made.kernels[:1])


def made(wanted, spills=0, limit=None):
    """Return what a compiler might have made of a request."""
    return Compiled(
        wanted.name, wanted.arch, wanted.warps, b"object", "", registers=32, shared=1024, tensor_memory=0, spills=spills,
        scalar_spills=0, limit=limit, uses=frozenset({"wgmma"}),
    )  # fmt: skip


def key(choice):
    return triton_source(choice.program, choice.tile.warps), choice.tile.warps


def test_a_tile_that_spills_gives_way(kernels):
    best, second, third = (kernels.kernels[0].found.best, *kernels.kernels[0].found.others[:2])
    asked = []

    def make(wanted, jobs):
        asked.extend((w.source, w.warps) for w in wanted)
        answers = {key(best): lambda w: made(w, spills=8), key(second): lambda w: MoecError("it broke")}
        return [answers.get((w.source, w.warps), lambda w: made(w, limit=128))(w) for w in wanted]

    found = compile_kernels(kernels, H200, "kernels", make)
    kernel = found.kernels.kernels[0]
    assert kernel.best == third and kernel.found.others[:2] == (best, second)
    assert asked == [key(best), key(second), key(third)]
    name = f"kernels/{kernel.name}.cubin"
    assert found.files == {name: b"object"}
    entry = kernel.objects["sm_90"]
    assert entry["file"] == name and entry["spills"] == 0 and entry["instructions"] == ["wgmma"]
    assert entry["shared_predicted"] > 0 and entry["registers"] == 32 and entry["register_limit"] == 128


def test_the_search_decides_where_all_tiles_spill_or_fail(kernels):
    found = compile_kernels(kernels, H200, "kernels", lambda wanted, jobs: [made(w, 8) for w in wanted])
    assert found.kernels.kernels[0].best == kernels.kernels[0].best
    assert found.kernels.kernels[0].objects["sm_90"]["spills"] == 8
    (note,) = objects.missing_objects(found.kernels)
    assert "1 of 1 kernels (linear_0_t16) have registers that spill on sm_90" in note.reason
    found = compile_kernels(kernels, H200, "kernels", lambda wanted, jobs: [MoecError("it broke") for w in wanted])
    assert found.files == {} and found.kernels.kernels[0].objects["sm_90"] == {"arch": "sm_90", "error": "it broke"}


def test_without_a_compiler_the_reason_stands_there(kernels):
    def make(wanted, jobs):
        raise MoecError("Triton is not installed", todo="install it")

    found = compile_kernels(kernels, H200, "kernels", make)
    assert found.kernels.kernels[0].objects["sm_90"]["error"] == "Triton is not installed; install it"
    many = dataclasses.replace(found.kernels, kernels=4 * found.kernels.kernels)
    (note,) = objects.missing_objects(many)
    names = "linear_0_t16, linear_0_t16, linear_0_t16, ..."
    assert (
        note.reason
        == f"4 of 4 kernels ({names}) have no object for sm_90, only source: Triton is not installed; install it"
    )
    other = dataclasses.replace(H200, arch="sm_35")
    assert "for sm_35" in compile_kernels(kernels, other, "kernels", make).kernels.kernels[0].objects["sm_35"]["error"]
    cambricon = find_profile("cambricon-mlu590", {})
    assert compile_kernels(kernels, cambricon, "kernels", make) == objects.Objects(kernels, {})


@needs_triton
def test_kernels_are_compiled(kernels):
    found = compile_kernels(kernels, H200, "kernels")
    (content,) = found.files.values()
    assert not objects.missing_objects(found.kernels) and not objects.missing_objects(kernels)
    assert content.startswith(b"\x7fELF") and found.kernels.kernels[0].objects["sm_90"]["registers"] > 0


def test_the_router_keeps_its_numbers(artifact):
    router = safetensors.torch.load_file(artifact.folder / "weights/layer.1.safetensors")["layer.1/mlp_gate"]
    own = safetensors.torch.load_file(TINY / "model.safetensors")["model.layers.1.mlp.gate.weight"]
    assert torch.equal(router.float(), own.float())


# --- tuning files of other engines -----------------------------------------------------------------------------------

GROUPED = """moec 1 stage kernel
source "none"
dim T in 1..128

func @main(%x: f32[T, 256], %ids: i64[T, 2], %order: i64[2*T], %tiles: i64[5, 3, 2*T])
    -> (f32[2*T, 256]) {
  const %up : WEIGHT[8, 256, 256] = RECIPE
  %h = acc.grouped_up(%x, %ids, %order, %tiles, %up, _) {act=plain(silu)} : f32[2*T, 256]
  return %h
}
"""
PLAIN = 'stack(tensor("e.{0..7}.weight", bf16[256, 256]))'
CODES = 'stack(dequantize(tensor("e.{0..7}.weight", f8e4m3[256, 256]), tensor("e.{0..7}.scale", f32[ROWS, 1]), block=[BLOCK, 256]))'


@pytest.mark.parametrize(
    ("weight", "recipe", "vllm", "sglang"),
    [
        ("bf16", PLAIN, "", ""),
        ("int8_g32", f"quantize(cast({PLAIN}, to=f32), to=int8_g32)", ",dtype=int8_w8a16", ",dtype=int8_w8a16"),
        ("uint4_g32", f"quantize(cast({PLAIN}, to=f32), to=uint4_g32)", ",dtype=int4_w4a16", ",dtype=int4_w4a16"),
        # FP8 in the checkpoint, whatever moec's kernels read: one scale for a tensor, or for a row
        (
            "int8_g256",
            f"quantize({CODES}, to=int8_g256)".replace("ROWS", "1").replace("BLOCK", "256"),
            ",dtype=fp8_w8a8",
            ",dtype=fp8_w8a8",
        ),
        (
            "int8_g256",
            f"quantize({CODES}, to=int8_g256)".replace("ROWS", "256").replace("BLOCK", "1"),
            ",dtype=fp8_w8a8",
            ",dtype=fp8_w8a8,per_channel_quant=True",
        ),
        (
            "fp8_b128",
            f"quantize(cast({PLAIN}, to=f32), to=fp8_b128)",
            ",dtype=fp8_w8a8,block_shape=[128,128]",
            ",dtype=fp8_w8a8,block_shape=[128, 128]",
        ),
    ],
)
@pytest.mark.parametrize(("chip", "device"), [("nvidia-gb10", "NVIDIA_GB10"), ("nvidia-b300", "NVIDIA_B300_SXM6_AC")])
def test_tuning_files_have_the_engines_names(weight, recipe, vllm, sglang, chip, device):
    profile = find_profile(chip, {})
    declare_kernel_ops()
    module = parse_module(GROUPED.replace("WEIGHT", weight).replace("RECIPE", recipe))
    (problem,) = find_problems(module, weight_layouts(module, profile))
    for engine, suffix in (("vllm", vllm), ("sglang", sglang)):
        assert file_name(engine, problem, device) == f"E=8,N=256,device_name={device}{suffix}.json"
    files, notes = engine_files([problem], profile, Tuning(("vllm", "sglang")))
    for content in files.values():
        itemsize = 1 if "fp8" in suffix else 2
        for entry in content.values():  # what the engines' kernel keeps in shared memory has to fit there
            tile = (entry["BLOCK_SIZE_M"] + entry["BLOCK_SIZE_N"]) * entry["BLOCK_SIZE_K"] * itemsize
            assert (entry["num_stages"] - 1) * tile <= {"nvidia-gb10": 101376, "nvidia-b300": 232448}[chip]
    assert len(files) == 2 and [n.reason for n in notes] == [PREDICTED]


PREDICTED = "the tuning files in engines/ are predicted, not measured, and replace the engine's own choices"


@pytest.fixture(scope="module")
def problem():
    declare_kernel_ops()
    module = parse_module(GROUPED.replace("WEIGHT", "bf16").replace("RECIPE", PLAIN))
    (found,) = find_problems(module, weight_layouts(module, H200))
    return found


@pytest.mark.parametrize(
    ("tp", "ep", "vllm", "sglang"),
    [
        # as the engines part 8 experts of 256 values: SGLang's --tp 4 --ep 2; vLLM's --enable-expert-parallel
        (4, 1, "E=8,N=64", "E=8,N=64"),
        (4, 4, "E=2,N=256", "E=2,N=256"),
        (4, 2, "its ep is 1 or a multiple of tp", "E=4,N=128"),
        (2, 4, "E=2,N=256", "its ep divides tp"),
        (16, 16, "cannot be divided over tp=16, ep=16", "cannot be divided over tp=16, ep=16"),
    ],
)
def test_tuning_files_of_one_device_of_several(tp, ep, vllm, sglang, problem):
    tuning = Tuning(("vllm", "sglang"), tp, ep)
    for engine, wanted in (("vllm", vllm), ("sglang", sglang)):
        found = find_shard(engine, problem.experts, tuning)
        if isinstance(found, Shard):
            assert file_name(engine, problem, "X", found) == f"{wanted},device_name=X.json"
        else:
            assert wanted in found


def test_a_shard_of_experts_has_its_share_of_the_pairs(problem):
    """With half of the experts, half of the tiles: the choice stays that of rows for one expert."""
    files, notes = engine_files([problem], H200, Tuning(("sglang",), 2, 2))
    ((path, content),) = files.items()
    assert path == "sglang/configs/triton_3_4_0/E=4,N=256,device_name=NVIDIA_H200.json"
    assert content["1"]["BLOCK_SIZE_M"] == 16 and content["4096"]["BLOCK_SIZE_M"] >= 64
    assert [n.reason for n in notes] == [PREDICTED]


def test_tuning_files_are_opt_in(artifact, tmp_path):
    assert not (artifact.folder / "engines").exists() and artifact.manifest["figures"]["notes"] == [NOT_ASKED]
    options = {"kernels": "source", "buckets": "16", "engines": "vllm,sglang", "device": "NVIDIA H20-3e"}
    made = moec.compile(TINY, target="nvidia-h20", out=tmp_path / "a", options=options)
    assert made.manifest["figures"]["notes"] == [PREDICTED]
    assert "nobody has measured them" in (made.folder / "engines/README.md").read_text()
    (file,) = (made.folder / "engines/vllm").iterdir()
    assert file.name == "E=16,N=128,device_name=NVIDIA_H20-3e.json"
    assert all(key.isdecimal() for key in json.loads(file.read_text()))  # what both engines read


def test_tuning_files_that_cannot_be_are_noted(problem):
    unknown = find_profile("ascend-950dt", {})
    (note,) = engine_files([problem], unknown, Tuning(("vllm",)))[1]
    assert note.reason.startswith("no tuning file of vllm for experts of bf16: what it calls ascend-950dt is not known")
    packed = dataclasses.replace(problem.experts.up, format="mxfp4")
    other = dataclasses.replace(problem, experts=dataclasses.replace(problem.experts, up=packed))
    files, (note,) = engine_files([other], H200, Tuning(("vllm",)))
    assert not files and "its fused-MoE kernel has no weights in mxfp4" in note.reason


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"engines": "tensorrt"}, "engines cannot be tensorrt"),
        ({"engines": ""}, "engines cannot be "),
        ({"engines": "vllm", "tp": "0"}, "tp cannot be 0"),
        ({"engines": "vllm", "ep": "two"}, "ep cannot be two"),
        ({"tp": "8"}, "tp says for whom tuning files of engines are"),
    ],
)
def test_options_of_tuning_files_that_cannot_be(given, said):
    with pytest.raises(MoecError, match=said) as caught:
        read_options(given)
    assert caught.value.todo
