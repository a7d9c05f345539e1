"""Attention of moec's own kernels against numbers made here, against ONNX Runtime's operator, and in a session's buffers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from attention_cases import attentions, expected, feeds_of, model_of, use_weightless_sinks
from hypothesis import given, settings
from moec.targets.cpu.kernels import library
from own_kernels import NONE, SETS, open_session, run, write_library

SETTINGS = settings(max_examples=30, deadline=None)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return write_library(tmp_path_factory.mktemp("kernels"))


def assert_results(case, found, wanted):
    total = case["past"] + case["new"]
    for name, a, b in zip(("y", "key", "value"), found, wanted, strict=True):
        a = a if name == "y" else a[:, :, :total]
        assert np.abs(a - b).max() <= 1e-5 * max(1, np.abs(b).max()), name


@pytest.mark.parametrize("asked", SETS)
@SETTINGS
@given(case=attentions())
def test_attention_is_the_softmax_of_what_a_token_sees(case, asked, kernels):
    feeds = feeds_of(case)
    found = run(model_of(case, feeds), feeds, kernels, asked)
    assert found[1].shape[2] == max(case["past"] + case["room"], case["past"] + case["new"])
    assert_results(case, found, expected(case, feeds))


@SETTINGS
@given(case=attentions(widths=(16, 64, 80)))
def test_attention_is_that_of_onnx_runtime(case, kernels):
    case |= {"room": 0, "turned": 16 if case["turned"] else 0}
    feeds = feeds_of(case)
    use_weightless_sinks(case, feeds)
    model = model_of(case, feeds)
    for a, b in zip(run(model, feeds, kernels), run(model, feeds, kernels, NONE), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * max(1, np.abs(b).max())


@pytest.mark.parametrize("asked", [None, NONE])
@pytest.mark.parametrize("new", [1, 30])
def test_the_past_is_appended_to_in_its_own_buffer(new, asked, kernels):
    case = {
        "batch": 2, "new": new, "past": 600, "room": 100, "width": 16, "groups": 2, "heads": 4, "window": 0, "softcap": 0.0,
        "turned": 16, "packed": True, "masked": False, "sinks": False, "seed": 3,
    }  # fmt: skip
    feeds = feeds_of(case)
    wanted = expected(case, feeds)
    session = open_session(model_of(case, feeds), kernels, asked)
    binding = session.io_binding()
    buffers = {name: feeds.pop(f"past_{name}") for name in ("key", "value")}
    for name, array in buffers.items():
        array[:, :, case["past"] :] = 7
        place = ("cpu", 0, np.float32, array.shape, array.ctypes.data)
        binding.bind_input(f"past_{name}", *place)
        binding.bind_output(name, *place)
    for name, array in feeds.items():
        binding.bind_cpu_input(name, array)
    y = np.empty((2, new, 64), np.float32)
    binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)
    session.run_with_iobinding(binding)
    assert_results(case, (y, buffers["key"], buffers["value"]), wanted)
    assert all((array[:, :, case["past"] + new :] == 7).all() for array in buffers.values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"q": np.zeros((1, 2, 40), np.float32)}, "q has other sizes"),
        ({"total": np.array(1, np.int32)}, "the past is not that"),
        ({"total": np.array(99, np.int32)}, "the past is not that"),
        ({"past_value": np.zeros((1, 2, 4, 16), np.float32)}, "keys and values differ"),
    ],
)
def test_inputs_that_do_not_belong_together_are_an_error(change, said, kernels):
    case = {
        "batch": 1, "new": 2, "past": 5, "room": 0, "width": 16, "groups": 2, "heads": 2, "window": 0, "softcap": 0.0,
        "turned": 0, "packed": False, "masked": False, "sinks": False, "seed": 3,
    }  # fmt: skip
    feeds = feeds_of(case)
    session = open_session(model_of(case, feeds), kernels)
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match=said):
        session.run(None, feeds | change)


# --- without ONNX Runtime ------------------------------------------------------------------------------------------

CHECK = Path(__file__).with_name("kernels") / "check_attention.c"
NAMES = ("attend_avx512", "attend_avx2", "attend_neon", "attend_plain")


@pytest.mark.long
def test_attention_keeps_to_its_memory(tmp_path):
    if shutil.which("gcc") is None:
        pytest.skip("gcc has the sanitizers, and is not installed")
    program = tmp_path / "check"
    sources = [library.SOURCES / f"{name}.c" for name in NAMES]
    flags = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-std=gnu11", f"-I{library.SOURCES}")
    command = ["gcc", *flags, "-o", program, *sources, CHECK, "-lm"]
    subprocess.run(command, check=True, capture_output=True, timeout=900)
    done = subprocess.run([program, "300"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "plain: 300 cases" in done.stdout
