"""moec's own kernels against numbers made here, and against ONNX Runtime's operators; artifacts are in test_kernel_artifacts.py."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moec.targets.cpu.kernels import library
from onnx import helper
from own_kernels import NONE, SETS, node_model, run, write_library

SETTINGS = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return write_library(tmp_path_factory.mktemp("kernels"))


def model_of(node, feeds, weights, width):
    return node_model(node, feeds, weights, {"y": [None, width]})


def codes_and_numbers(random, shape, bits, group, zeros):
    """Return the parts of a random quantized weight, and its numbers."""
    *lead, width = shape
    values = random.integers(0, 1 << bits, shape)
    scales = random.uniform(0.01, 0.1, (*lead, width // group)).astype(np.float32)
    points = random.integers(0, 1 << bits, scales.shape) if zeros else np.full(scales.shape, 1 << bits - 1)
    numbers = (values - points.repeat(group, -1)) * scales.repeat(group, -1)

    def packed(array):
        if bits == 8:
            return array.astype(np.uint8)
        even = np.concatenate([array, np.zeros((*array.shape[:-1], array.shape[-1] % 2), array.dtype)], -1)
        return (even[..., ::2] | even[..., 1::2] << 4).astype(np.uint8)

    return packed(values), scales, packed(points) if zeros else None, numbers.astype(np.float32)


def exact_activations(random, rows, width, group):
    """Return numbers that rounding to int8 in groups does not change: integers, the largest of each group 127."""
    x = random.integers(-127, 128, (rows, width // group, group))
    x[..., 0] = 127
    return (x * 2.0 ** random.integers(-8, 8, (rows, width // group, 1))).astype(np.float32).reshape(rows, width)


@st.composite
def linears(draw):
    bits = draw(st.sampled_from([4, 8]))
    group = draw(st.sampled_from([16, 32, 64, 128, 256]))
    rows, out = draw(st.integers(1, 200)), draw(st.integers(1, 150))
    return (
        bits,
        group,
        rows,
        out,
        group * draw(st.integers(1, 9)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize("asked", SETS)
@SETTINGS
@given(case=linears())
def test_linear_is_the_product_with_the_numbers(case, asked, kernels):
    bits, group, rows, out, width, zeros, bias, seed = case
    random = np.random.default_rng(seed)
    codes, scales, points, numbers = codes_and_numbers(random, (out, width), bits, group, zeros)
    weights = {"codes": codes.reshape(out, width // group, -1), "scales": scales}
    weights |= ({"zeros": points} if zeros else {}) | (
        {"b": random.normal(size=out).astype(np.float32)} if bias else {}
    )
    inputs = ["x", "codes", "scales", "zeros" if zeros else "", "", "b" if bias else ""]
    while not inputs[-1]:
        inputs.pop()
    node = helper.make_node(
        "MatMulNBits", inputs, ["y"], domain="com.microsoft", K=width, N=out, bits=bits, block_size=group,
        accuracy_level=4,
    )  # fmt: skip
    x = exact_activations(random, rows, width, group)
    wanted = x.astype(np.float64) @ numbers.T.astype(np.float64) + weights.get("b", 0)
    (found,) = run(model_of(node, {"x": x}, weights, out), {"x": x}, kernels, asked)
    size = np.abs(x @ np.abs(numbers.T)).max() + np.abs(weights.get("b", 0)).max()
    error = np.abs(found - wanted).max() / max(size, 1e-6)
    assert error < 1e-5


@st.composite
def expert_cases(draw):
    group = draw(st.sampled_from([16, 32, 64, 128]))
    count = draw(st.integers(1, 12))
    return {
        "bits": draw(st.sampled_from([4, 8])), "group": group, "experts": count, "k": draw(st.integers(1, min(count, 4))),
        "tokens": draw(st.sampled_from([1, 2, 3, 7, 40, 200, 600])), "width": group * draw(st.integers(1, 4)),
        "inner": group * draw(st.integers(1, 3)), "zeros": draw(st.booleans()), "bias": draw(st.booleans()),
        "mixing": draw(st.booleans()), "act": draw(st.sampled_from(["swiglu", "silu", "relu", "gelu", "identity"])),
        "one": draw(st.booleans()), "seed": draw(st.integers(0, 99)),
    }  # fmt: skip


def expert_model(case):
    """Return a model of one QMoE, its inputs and its result computed here with int8 activations."""
    random = np.random.default_rng(case["seed"])
    experts, tokens, width, inner = case["experts"], case["tokens"], case["width"], case["inner"]
    rows = 2 * inner if case["act"] == "swiglu" else inner
    up, up_scales, up_zeros, up_numbers = codes_and_numbers(
        random, (experts, rows, width), case["bits"], case["group"], case["zeros"]
    )
    down, down_scales, down_zeros, down_numbers = codes_and_numbers(
        random, (experts, width, inner), case["bits"], case["group"], case["zeros"]
    )
    up_scales *= 0.1
    up_numbers *= 0.1
    weights = {"up": up, "up_scales": up_scales, "down": down, "down_scales": down_scales}
    if case["zeros"]:
        weights |= {"up_zeros": up_zeros, "down_zeros": down_zeros}
    biases = [random.normal(size=(experts, n)).astype(np.float32) for n in (rows, width)]
    if case["bias"]:
        weights |= dict(zip(("up_bias", "down_bias"), biases, strict=True))
    feeds = {
        "x": exact_activations(random, tokens, width, case["group"]) / 64,
        "choice": random.normal(size=(tokens, experts)).astype(np.float32),
    }
    if case["one"]:
        feeds["choice"][:, 0] += 100  # all tokens choose it, and some experts have none
    if case["mixing"]:
        feeds["mixing"] = np.abs(random.normal(size=(tokens, experts))).astype(np.float32)
        feeds["mixing"][::3] = 0  # tokens without an expert
    present = {*weights, *feeds}
    order = (
        "x", "choice", "up", "up_scales", "up_bias", "down", "down_scales", "down_bias", "", "", "", "up_zeros",
        "down_zeros", "", "mixing",
    )  # fmt: skip
    inputs = [name if name in present else "" for name in order]
    while not inputs[-1]:
        inputs.pop()
    gate = {"swiglu_fusion": 1, "activation_alpha": 1.25, "activation_beta": 1.0, "swiglu_limit": 5.0}
    node = helper.make_node(
        "QMoE", inputs, ["y"], domain="com.microsoft", k=case["k"], expert_weight_bits=case["bits"],
        block_size=case["group"], accuracy_level=4, normalize_routing_weights=0 if case["mixing"] else 1,
        activation_type=case["act"], **(gate if case["act"] == "swiglu" else {}),
    )  # fmt: skip
    return (
        model_of(node, feeds, weights, width),
        feeds,
        _experts(case, feeds, up_numbers, down_numbers, biases if case["bias"] else None),
    )


def _experts(case, feeds, up, down, biases):
    y = np.zeros_like(feeds["x"], np.float64)
    for t, x in enumerate(feeds["x"].astype(np.float64)):
        ids = np.argsort(-feeds["choice"][t], kind="stable")[: case["k"]]
        scores = np.exp(feeds["choice"][t][ids].astype(np.float64))
        gates = feeds["mixing"][t][ids] if case["mixing"] else scores / scores.sum()
        for e, gate in zip(ids, gates, strict=True):
            h = _activated(case["act"], up[e] @ x + (biases[0][e] if biases else 0))
            groups = h.reshape(-1, case["group"])
            scale = np.abs(groups).max(1, keepdims=True) / 127
            h = np.divide(groups, scale, out=np.zeros_like(groups), where=scale > 0).round() * scale
            y[t] += gate * (down[e] @ h.reshape(-1) + (biases[1][e] if biases else 0))
    return y


def _activated(act, h):
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    match act:
        case "swiglu":
            g, u = np.minimum(h[::2], 5), np.clip(h[1::2], -5, 5)
            return g * sigmoid(1.25 * g) * (u + 1)
        case "silu":
            return h * sigmoid(h)
        case "gelu":
            return 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        case "relu":
            return np.maximum(h, 0)
    return h


def assert_near(found, wanted):
    """Check results of experts: a number that lies half way between two codes may be rounded to either."""
    error, size = np.abs(found - wanted), np.abs(wanted).max() + 1e-6
    assert error.max() <= 1.5e-2 * size
    assert error.mean() <= 1e-3 * size


@pytest.mark.parametrize("asked", SETS)
@SETTINGS
@given(case=expert_cases())
def test_experts_are_the_sum_of_the_chosen(case, asked, kernels):
    model, feeds, wanted = expert_model(case)
    (found,) = run(model, feeds, kernels, asked)
    assert_near(found, wanted)


@SETTINGS
@given(case=expert_cases())
def test_experts_are_those_of_onnx_runtime(case, kernels):
    case["zeros"] = False  # what ONNX Runtime computes with zero points is for the capability record to say
    model, feeds, _ = expert_model(case)
    try:
        (wanted,) = run(model, feeds, kernels, NONE)
    except Exception as error:
        assert "not supported" in str(error).lower() or "not implemented" in str(error).lower(), error
        return
    (found,) = run(model, feeds, kernels)
    assert_near(found, wanted)


# --- without ONNX Runtime: what an emulator runs, and under sanitizers -----------------------------------------------

CHECK = Path(__file__).with_name("kernels") / "check.c"
CHECKED = [
    library.SOURCES / f"{name}.c"
    for name in ("amx", "avx512", "avxvnni", "avx2", "i8mm", "neon", "plain", "choose", "host", "weights")
]


# instructions that no processor here has: AMX in plain C, AVX-VNNI as the part of AVX-512 that it is too
EMULATED = ['-DMOEC_TEST_AMX="amx_emulated.h"', "-DMOEC_TEST_WITH_AVX512"]


def checked(folder, *compiler):
    program = folder / "check"
    folders = [f"-I{CHECK.parent}", f"-I{library.SOURCES}"]
    command = [*compiler, "-std=gnu11", *folders, *EMULATED, "-o", program, *CHECKED, CHECK, "-lm"]
    subprocess.run(command, check=True, capture_output=True, timeout=900)
    return program


@pytest.mark.long
def test_the_kernels_keep_to_their_memory(tmp_path):
    if shutil.which("gcc") is None:
        pytest.skip("gcc has the sanitizers, and is not installed")
    program = checked(tmp_path, "gcc", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    done = subprocess.run([program, "200"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    with_avx512 = ["amx-int8", "avx-vnni"] if "avx512-vnni" in done.stdout else []
    for name in (*with_avx512, "plain"):
        assert f"{name}: 200 cases" in done.stdout


def test_the_kernels_read_nothing_that_they_did_not_write(tmp_path):
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("ziglang is not installed")
    done = subprocess.run(
        [checked(tmp_path, sys.executable, "-m", "ziglang", "cc", "-O2"), "100"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "plain: 100 cases" in done.stdout


@pytest.mark.long
def test_the_kernels_of_arm_in_an_emulator(tmp_path):
    emulator = shutil.which("qemu-aarch64")
    if emulator is None:
        pytest.skip("an emulator is needed: apt-get install qemu-user")
    zig = (sys.executable, "-m", "ziglang", "cc")
    program = checked(tmp_path, *zig, "-O2", "-static", "-target", "aarch64-linux-musl", "-mcpu=generic")
    done = subprocess.run([emulator, "-cpu", "max", program, "100"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("neon-i8mm", "neon-dotprod"):
        assert f"{name}: 100 cases" in done.stdout
