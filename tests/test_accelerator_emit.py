"""The artifact for an accelerator: its files, their plan, and objects where there is a compiler."""

import dataclasses
import json
from pathlib import Path

import jsonschema
import moec
import pytest
import safetensors.torch
import torch
from chips_for_tests import needs_triton
from click.testing import CliRunner
from moec.compiler.cli import main
from moec.compiler.errors import MoecError
from moec.compiler.manifest import check_files, read_manifest
from moec.compiler.parser import parse_module
from moec.targets.accelerator import objects
from moec.targets.accelerator.lower import lower
from moec.targets.accelerator.objects import compile_kernels
from moec.targets.accelerator.plan import make_plan
from moec.targets.accelerator.profile import find_profile
from moec.targets.accelerator.shards import find_shards
from moec.targets.accelerator.spec import kernel_specs, packings
from moec.targets.accelerator.triton_compile import Compiled
from moec.targets.accelerator.triton_source import triton_source

ROOT = Path(__file__).parent.parent
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
    return moec.compile(
        ROOT / "examples/tiny-moe", target="nvidia-h200", quantize="experts=mxfp4", out=out, options=options
    )


def test_the_artifact_is_whole(artifact):
    manifest = read_manifest(artifact.folder)
    check_files(artifact.folder, manifest, hashes=True)
    assert manifest["target"] == "nvidia-h200" and manifest["lossy"]
    assert "mxfp4" in manifest["precision"]["layer"] and len(manifest["states"]) == 8
    data = json.loads((artifact.folder / "kernels.json").read_text())
    jsonschema.validate(data, json.loads((ROOT / "targets/accelerator/kernels.schema.json").read_text()))
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
    result = CliRunner().invoke(main, ["inspect", str(artifact.folder)])
    assert (
        result.exit_code == 0
        and "target nvidia-h200" in result.output
        and "weights/layer.3.safetensors" in result.output
    )
    assert len(artifact.run(tokens=[1, 2], max_new_tokens=2, eos=()).tokens[0]) == 2


def test_the_plan_counts_bytes():
    module = lower(parse_module(TEXT))
    plan = make_plan(module, H200, find_shards(module, packings(module, H200)))
    (device,) = plan["devices"]
    assert device["weights"] == sum(s["bytes"] for s in device["shards"]) == 2 * 64 * 64 * 2
    assert plan["state"]["bytes_per_token"] == 2 * 64 * 2
    assert plan["workspace"] == {"tokens": 128, "bytes": 2 * 128 * 64 * 2}
    assert plan["fits"] and plan["free"] == device["memory"]["bytes"] - device["weights"] - plan["workspace"]["bytes"]
    small = find_profile("nvidia-h200", {"memory.dram.capacity": "16kB"})
    plan = make_plan(module, small, find_shards(module, packings(module, small)))
    assert plan["fits"] is False and plan["free"] < 0 and plan["tokens_of_state"] == 0


# --- objects -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernels():
    return kernel_specs(lower(parse_module(TEXT)), H200, (16,))


def made(wanted, spills=0, limit=None):
    """Return what a compiler might have made of a request."""
    return Compiled(
        wanted.name, wanted.arch, wanted.warps, b"object", "", registers=32, shared=1024, tensor_memory=0, spills=spills,
        scalar_spills=0, limit=limit, uses=frozenset({"wgmma"}), seconds=0.1,
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
    found = compile_kernels(kernels, H200, "kernels", lambda wanted, jobs: [MoecError("it broke") for w in wanted])
    assert found.files == {} and found.kernels.kernels[0].objects["sm_90"] == {"arch": "sm_90", "error": "it broke"}


def test_without_a_compiler_the_reason_stands_there(kernels):
    def make(wanted, jobs):
        raise MoecError("Triton is not installed", todo="install it")

    found = compile_kernels(kernels, H200, "kernels", make)
    assert found.kernels.kernels[0].objects["sm_90"]["error"] == "Triton is not installed; install it"
    other = dataclasses.replace(H200, arch="sm_35")
    assert "for sm_35" in compile_kernels(kernels, other, "kernels", make).kernels.kernels[0].objects["sm_35"]["error"]
    cambricon = find_profile("cambricon-mlu590", {})
    assert compile_kernels(kernels, cambricon, "kernels", make) == objects.Objects(kernels, {})


@needs_triton
def test_kernels_are_compiled(kernels):
    found = compile_kernels(kernels, H200, "kernels")
    (content,) = found.files.values()
    assert content.startswith(b"\x7fELF") and found.kernels.kernels[0].objects["sm_90"]["registers"] > 0


def test_the_router_keeps_its_numbers(artifact):
    router = safetensors.torch.load_file(artifact.folder / "weights/layer.1.safetensors")["layer.1/mlp_gate"]
    own = safetensors.torch.load_file(ROOT / "examples/tiny-moe/model.safetensors")["model.layers.1.mlp.gate.weight"]
    assert torch.equal(router.float(), own.float())
