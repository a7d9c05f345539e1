"""Attention of moec's own kernels against numbers made here, against ONNX Runtime's operator, and in a session's buffers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moec.targets.cpu.kernels import library
from onnx import helper
from own_kernels import NONE, SETS, node_model, open_session, run, write_library

SETTINGS = settings(max_examples=30, deadline=None)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return write_library(tmp_path_factory.mktemp("kernels"))


@st.composite
def attentions(draw, widths=None):
    width = draw(st.sampled_from(widths) if widths else st.integers(1, 70).map(lambda n: 2 * n))
    past = st.sampled_from([0, 1, 5, 63, 64, 200, 1500])
    groups, each = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 5, 8]))
    return {
        "batch": draw(st.integers(1, 2)), "new": draw(st.sampled_from([1, 1, 2, 3, 9, 40, 200])), "past": draw(past),
        "room": draw(st.sampled_from([0, 0, 7, 300])), "width": width, "groups": groups, "heads": groups * each,
        "window": draw(st.sampled_from([0, 0, 1, 17, 130, 2000])), "softcap": draw(st.sampled_from([0.0, 0.0, 3.0])),
        "turned": draw(st.sampled_from([0, width, max(2, width // 4 * 2)])), "packed": draw(st.booleans()),
        "masked": draw(st.booleans()), "sinks": draw(st.booleans()), "seed": draw(st.integers(0, 99)),
    }  # fmt: skip


def feeds_of(case):
    """Return the inputs of a case; the buffers of the past have room for `room` more tokens, NaN where nothing is."""
    random = np.random.default_rng(case["seed"])
    batch, new, past, width, heads, groups = (case[n] for n in ("batch", "new", "past", "width", "heads", "groups"))

    def normal(*shape):
        return random.normal(size=shape).astype(np.float32)

    feeds = {"q": normal(batch, new, (heads + 2 * groups if case["packed"] else heads) * width)}
    if not case["packed"]:
        feeds |= {"k": normal(batch, new, groups * width), "v": normal(batch, new, groups * width)}
    for name in ("past_key", "past_value"):
        feeds[name] = np.full((batch, groups, past + case["room"], width), np.nan, np.float32)
        feeds[name][:, :, :past] = normal(batch, groups, past, width)
    counts = {"last": np.full(batch, past + new - 1), "total": np.array(past + new), "count": np.full(batch, new)}
    feeds |= {name: count.astype(np.int32) for name, count in counts.items()}
    if case["turned"]:
        angles = random.uniform(0, 6, (batch * new + past, case["turned"] // 2)).astype(np.float32)
        feeds |= {"cos": np.cos(angles), "sin": np.sin(angles), "rows": np.arange(batch * new).reshape(batch, new)}
    if case["masked"]:
        hidden = random.integers(0, past + new + 1, batch)  # padding in front, at times all of it
        bias = np.where(np.arange(past + new) < hidden[:, None], -np.inf, 0).astype(np.float32)
        feeds["bias"] = np.repeat(bias[:, None, None], new, 2)
    if case["sinks"]:
        feeds["sinks"] = normal(heads)
    return feeds


def model_of(case, feeds):
    order = (
        "q", "k", "v", "past_key", "past_value", "last", "total", "cos", "sin", "rows", "bias", "sinks", "", "", "", "",
        "count",
    )  # fmt: skip
    node = helper.make_node(
        "GroupQueryAttention", [name if name in feeds else "" for name in order], ["y", "key", "value"],
        domain="com.microsoft", num_heads=case["heads"], kv_num_heads=case["groups"], do_rotary=int(case["turned"] > 0),
        scale=0.3, local_window_size=case["window"] or -1, softcap=case["softcap"],
    )  # fmt: skip
    return node_model(node, feeds, {}, {"y": [None] * 3, "key": [None] * 4, "value": [None] * 4})


def expected(case, feeds):
    """Return y and the present keys and values, in float64."""
    batch, new, past, width, heads, groups = (case[n] for n in ("batch", "new", "past", "width", "heads", "groups"))
    x = {name: array.astype(np.float64) for name, array in feeds.items()}
    q, k, v = (
        np.split(x["q"], [heads * width, (heads + groups) * width], 2) if case["packed"] else (x["q"], x["k"], x["v"])
    )
    q, k, v = (a.reshape(batch, new, -1, width).transpose(0, 2, 1, 3) for a in (q, k, v))
    if half := case["turned"] // 2:
        cos, sin = (x[name][: batch * new].reshape(batch, 1, new, half) for name in ("cos", "sin"))
        turn = lambda a: np.concatenate(  # noqa: E731
            [a[..., :half] * cos - a[..., half : 2 * half] * sin, a[..., half : 2 * half] * cos + a[..., :half] * sin, a[..., 2 * half :]],
            -1,
        )  # fmt: skip
        q, k = turn(q), turn(k)
    key, value = (np.concatenate([x[n][:, :, :past], a], 2) for n, a in (("past_key", k), ("past_value", v)))
    scores = 0.3 * q @ key.repeat(heads // groups, 1).transpose(0, 1, 3, 2)
    if case["softcap"]:
        scores = case["softcap"] * np.tanh(scores / case["softcap"])
    place, slot = past + np.arange(new)[:, None], np.arange(past + new)
    seen = (slot <= place) & (slot > place - case["window"] if case["window"] else True)
    scores = np.where(seen, scores, -np.inf) + (x["bias"] if case["masked"] else 0)
    sinks = x["sinks"][:, None, None] if case["sinks"] else np.full((heads, 1, 1), -np.inf)
    most = np.maximum(scores.max(-1, keepdims=True), sinks)
    shares = np.exp(scores - np.where(np.isinf(most), 0, most))
    total = shares.sum(-1, keepdims=True) + np.exp(sinks - np.where(np.isinf(most), 0, most))
    shares = np.divide(shares, total, out=np.zeros_like(shares), where=total > 0)
    y = (shares @ value.repeat(heads // groups, 1)).transpose(0, 2, 1, 3).reshape(batch, new, -1)
    return y, key, value


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
    case |= {"room": 0, "masked": case["masked"] and not case["softcap"]}  # with both ONNX Runtime gives NaN
    case["turned"] = 16 if case["turned"] else 0
    feeds = feeds_of(case)
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
