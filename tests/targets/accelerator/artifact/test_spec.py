"""kernels.json of a model for every target: it passes its schema, and what it states fits the chip."""

import json

import jsonschema
import moec
import numpy as np
import pytest
import torch
from chips_for_tests import check_fits, profile_of
from moec.compiler.ir.dtypes import DTYPES
from moec.compiler.ir.module import Op
from moec.compiler.text.parser import parse_module
from moec.passes.quantize_activations import quantize_activations
from moec.targets import declare_kernel_ops
from moec.targets.accelerator.artifact.spec import kernel_specs
from moec.targets.accelerator.chip.profile import profile_names
from moec.targets.accelerator.select.supported import why_unsupported
from moec.targets.accelerator.tile.expr import evaluate_expr
from moec.targets.accelerator.tile.machine import chip_of, layout_of
from moec.targets.accelerator.tile.packing import Packing
from moec.targets.accelerator.tile.serialize import program_from_json, program_to_json
from moec.targets.accelerator.tile.simulate import simulate_program
from moec.targets.accelerator.tile.tiles import memory_footprint
from places import CONFIGS, FILES, ROOT, TINY

SCHEMA = json.loads((ROOT / "targets/accelerator/artifact/kernels.schema.json").read_text())


@pytest.fixture(scope="module")
def lowered():
    return moec.compile(TINY, target="nvidia-h200", stop_after="kernel")


@pytest.mark.parametrize("name", profile_names())
def test_tiny_moe_for_every_target(name, lowered):
    profile = profile_of(name)
    kernels = kernel_specs(lowered, profile, tokens=(1, 64, 2048))
    jsonschema.validate(kernels.to_json(), SCHEMA)
    for kernel in kernels.kernels:
        check_fits(kernel.best, profile)
        read = program_from_json(json.loads(json.dumps(program_to_json(kernel.best.program))))
        chip = chip_of(profile, layout_of(profile, kernel.best.tile.m))
        assert read == kernel.best.program
        assert memory_footprint(read, chip.align) == kernel.best.use
    kinds = {k.name.rstrip("0123456789").removesuffix("_t") for k in kernels.kernels}
    assert {"experts_up_0_grouped_up", "sort_0", "route_0", "attention_0", "linear_0", "norm_0_rms_norm"} <= kinds


def test_an_ascend_names_the_librarys_calls_and_stores_weights_as_they_take_them(lowered):
    """The layout by the formula of CANN's documentation: [K, N] -> [K1, K0, N1, N0] -> [K1, N1, N0, K0], blocks of 16."""
    data = kernel_specs(lowered, profile_of("ascend-950dt"), tokens=(64,)).to_json()
    calls = {k["computes"]["op"]: k["library"] for k in data["kernels"] if "library" in k}
    assert calls["acc.sort"]["call"] == "torch_npu.npu_moe_init_routing_v2"
    assert calls["acc.grouped_up"]["call"].startswith("torch_npu.npu_grouped_matmul")
    assert calls["acc.grouped_up"]["weights"] == {"up": "as stored: FRACTAL_NZ, transposed"}
    assert data["exchange"][0]["library"]["dispatch"] == "torch_npu.npu_moe_distribute_dispatch_v2"
    numbers = np.random.default_rng(0).standard_normal((3, 40, 72)).astype(np.float32)  # [E, N, K], neither of 16
    (packed,) = Packing("bf16", 40, 72, 3, fractal=True).pack(numbers).values()
    padded = torch.nn.functional.pad(torch.from_numpy(numbers).mT, (0, 8, 0, 8)).reshape(3, 5, 16, 3, 16)
    assert np.array_equal(packed.astype(np.float32), padded.permute(0, 1, 3, 4, 2).bfloat16().float().numpy())
    assert not any(
        "library" in k for k in kernel_specs(lowered, profile_of("nvidia-h200"), tokens=(64,)).to_json()["kernels"]
    )


def test_an_ascend_names_the_calls_that_multiply_mx_codes():
    """Weights [E, N, K] with scales [E, N, K / 64, 2], as aclnnGroupedMatmulSwigluQuantV2 takes transposed ones."""
    declare_kernel_ops()
    program = (FILES / "quantize_activations_where_made.moir").read_text("utf-8").partition("# ----")[0]
    module = quantize_activations(parse_module(program.replace("fp8_b128", "mxfp8")), None, pairs="mxfp8:mxfp8")
    data = kernel_specs(module, profile_of("ascend-950dt"), tokens=(64,)).to_json()
    jsonschema.validate(data, SCHEMA)
    calls = {k["computes"]["op"]: k["library"] for k in data["kernels"] if "library" in k and k["kind"] != "combine"}
    assert calls["acc.norm"] == {"call": "torch_npu.npu_add_rms_norm_dynamic_mx_quant", "weights": {}}
    assert calls["acc.grouped_up"] == {
        "call": "torch_npu.npu_grouped_matmul_swiglu_quant_v2",
        "weights": {"up": "as stored: codes ND, transposed; scales as [..., N, K / 64, 2]"},
    }
    assert all(k["predicted"]["time"] > 0 for k in data["kernels"])


def test_a_router_hands_its_scores_on_as_the_choice_reads_them(lowered):
    """What one kernel writes is what the next one reads: scores stay f32, activations are bf16."""
    kernels = kernel_specs(lowered, profile_of("nvidia-h200"), tokens=(64,)).kernels
    written = {p: k.best.program.argument("y").dtype for k in kernels if k.op == "acc.linear" for p in k.places}
    (route,) = (k for k in kernels if k.kind == "route")
    assert written["@layer/%gate"] == route.best.program.argument("logits").dtype == "f32"
    assert written["@layer/%qkv"] == written["@layer/%o_proj"] == "bf16"


def test_buckets_cover_every_number_of_tokens(lowered):
    kernels = kernel_specs(lowered, profile_of("nvidia-h200"), tokens=(64, 1, 2048))
    assert kernels.buckets == (1, 64, 2048)
    ranges = [(k.low, k.high) for k in kernels.kernels if k.name.startswith("linear_0_t")]
    assert ranges == [(1, 1), (2, 64), (65, 2048)]
    assert kernels.time(2048) > kernels.time(1) > 0


def test_a_bucket_finds_what_a_search_for_it_alone_finds():
    """Programs are made once for all buckets: none depends on the number of tokens, in the model with most kinds."""
    module = moec.compile(CONFIGS / "DeepSeek-V4-Flash", target="nvidia-h200", stop_after="kernel")
    profile, buckets = profile_of("nvidia-h200"), (4, 64, 8192)
    together = {k.name: k.found for k in kernel_specs(module, profile, tokens=buckets).kernels}
    alone = {k.name: k.found for high in buckets for k in kernel_specs(module, profile, tokens=(high,)).kernels}
    assert together == alone and len(alone) > 100


def test_what_stands_in_the_file_runs(lowered):
    """A kernel that is read back from kernels.json computes what its op does: the simulator runs it as it stands."""
    profile = profile_of("ascend-950dt")
    kernels = kernel_specs(lowered, profile, tokens=(16,))
    data = json.loads(json.dumps(kernels.to_json()))
    entry = next(k for k in data["kernels"] if k["kind"] == "rms_norm")
    program = program_from_json(entry["program"])
    rng, scalars = np.random.default_rng(0), {"T": 13}
    tensors = {
        a.name: rng.standard_normal([int(evaluate_expr(n, scalars)) for n in a.shape]).astype(DTYPES[a.dtype].numpy)
        for a in program.arguments
    }
    chip = chip_of(profile, layout_of(profile, entry["tile"]["m"]))
    simulate_program(program, tensors, scalars, chip)
    x = tensors["x"].astype(np.float32)
    wanted = x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-6) * tensors["w"]
    assert np.abs(tensors["y"].astype(np.float32) - wanted).max() <= 1e-2 * np.abs(wanted).max()


def test_exchange_grows_with_tokens_and_devices(lowered):
    (layer,) = kernel_specs(lowered, profile_of("nvidia-h200"), tokens=(1, 64)).exchange()
    assert [group["devices"] for group in layer["groups"]] == [2, 8]
    for group in layer["groups"]:
        one, many = (step["dispatch"]["bytes"] for step in group["steps"])
        assert many == pytest.approx(64 * one)
        assert group["steps"][1]["combine"]["bytes"] > many  # bf16 comes back where fp8 went


def test_an_op_without_a_kernel_names_near_ones():
    reason = why_unsupported(Op("moe.dispatch", (), ()))
    assert reason and "no kernel computes moe.dispatch; there are those for" in reason
    assert why_unsupported(Op("core.add", (), ())) is None and why_unsupported(Op("nn.causal_conv", (), ())) is None
