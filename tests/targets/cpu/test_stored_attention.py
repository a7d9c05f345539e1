"""Attention on caches of f16, bf16 and int8 with scales: the kernels and what stands for them, against numbers made here."""

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from attention_cases import ORDER, attentions, expected, feeds_of, node_settings, use_weightless_sinks
from hypothesis import given, settings
from hypothesis import strategies as st
from moec.targets.cpu.kernels.caches import ATTENTIONS, cache_functions, form_name
from moec.targets.cpu.run.caches import ELEMENTS
from onnx import TensorProto, helper
from own_kernels import NONE, SETS, open_session, write_library

CACHES = ("key", "value", "key_scale", "value_scale")
FLOATS = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}
HALF_UNIT = {"f16": 2.0**-11, "bf16": 2.0**-8}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return write_library(tmp_path_factory.mktemp("kernels"))


def stored(x, dtype):
    """Return numbers as a cache has them, and the scales of int8."""
    if dtype != "i8":
        return x.astype(FLOATS[dtype]).view(np.uint16), None
    scale = np.maximum(np.abs(x).max(-1), 1e-30) / np.float32(127)
    return np.rint(x / scale[..., None]).astype(np.int8), scale


def numbers(codes, scale, dtype):
    """Return what a cache stands for."""
    found = codes if dtype == "i8" else codes.view(FLOATS[dtype])
    return found.astype(np.float64) * (1 if scale is None else scale[..., None].astype(np.float64))


def model_of(case, feeds, dtype):
    names = [name if name in feeds else "" for name in ORDER]
    names += ["past_key_scale", "past_value_scale"] if dtype == "i8" else []
    outputs = ["y", *CACHES[: 4 if dtype == "i8" else 2]]
    form = form_name(packed=case["packed"], turned=case["turned"] > 0)
    node = helper.make_node(ATTENTIONS[dtype], names, outputs, domain="moec", overload=form, **node_settings(case))

    def info(name, rank):
        plain = helper.np_dtype_to_tensor_dtype(feeds[name].dtype) if name in feeds else TensorProto.FLOAT
        is_cache = name.removeprefix("past_") in CACHES[:2]
        return helper.make_tensor_value_info(name, ELEMENTS[dtype] if is_cache else plain, [None] * rank)

    inputs = [info(n, 3 if n.endswith("scale") else feeds[n].ndim) for n in names if n]
    opsets = [helper.make_opsetid(*o) for o in (("", 23), ("com.microsoft", 1), ("moec", 1))]
    graph = helper.make_graph([node], "one", inputs, [info(n, 4 if n in CACHES[:2] else 3) for n in outputs])
    return helper.make_model(graph, opset_imports=opsets, functions=cache_functions([node], 23), ir_version=11)


def caches_of(case, feeds, dtype, keeps):
    """Return the past and the present by name; with `keeps` they are the same buffers, as long as the longer one."""
    past, present = {}, {}
    room = max(case["past"] + case["room"], case["past"] + case["new"])
    for name in CACHES[:2]:
        x = feeds[f"past_{name}"][:, :, : case["past"]]
        for key, part in zip((name, f"{name}_scale"), stored(x, dtype), strict=True):
            if part is not None:
                held = room if keeps else case["past"] + case["room"]
                bytes_of = lambda n, part=part: np.full((*part.shape[:2], n, *part.shape[3:]), 0, part.dtype)  # noqa: E731
                past[key], present[key] = bytes_of(held), bytes_of(room)
                for array in (past[key], present[key]):
                    array.view(np.uint8)[:] = 0xFF  # no number of any type but int8
                past[key][:, :, : case["past"]] = part
    return past, past if keeps else present


def attend(case, feeds, dtype, kernels, asked, keeps):
    """Return y and what is in the present caches, by name."""
    model = model_of(case, feeds, dtype)
    session = open_session(model, kernels, asked)
    past, present = caches_of(case, feeds, dtype, keeps)
    binding = session.io_binding()
    y = np.empty((case["batch"], case["new"], case["heads"] * case["width"]), np.float32)
    for name, array in present.items():
        element = ELEMENTS[dtype] if name in CACHES[:2] else 1
        before = past[name]
        binding.bind_input(f"past_{name}", "cpu", 0, element, before.shape, before.ctypes.data)
        binding.bind_output(name, "cpu", 0, element, array.shape, array.ctypes.data)
    for name, array in feeds.items():
        if not name.startswith("past_"):
            binding.bind_cpu_input(name, array)
    binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)
    session.run_with_iobinding(binding)
    return y, present


def assert_right(case, feeds, dtype, y, present):
    """Hold the rounded keys and values to their numbers, and y to those that were kept."""
    total = case["past"] + case["new"]
    kept = [
        numbers(
            present[n][:, :, :total],
            present.get(f"{n}_scale", None) if dtype != "i8" else present[f"{n}_scale"][:, :, :total],
            dtype,
        )
        for n in CACHES[:2]
    ]
    wanted, *made = expected(case, feeds, kept)
    for name, found, exact in zip(CACHES[:2], kept, made, strict=True):
        if dtype == "i8":
            unit = np.abs(exact).max(-1, keepdims=True) / 254
        else:
            unit = np.maximum(np.abs(exact) * HALF_UNIT[dtype], 2.0**-25)
        assert (np.abs(found - exact) <= unit * 1.001 + 1e-6).all(), name
    assert np.abs(y - wanted).max() <= 2e-5 * max(1, np.abs(wanted).max())


@pytest.mark.parametrize("asked", [*SETS, NONE])
@settings(max_examples=15, deadline=None)
@given(case=attentions(), dtype=st.sampled_from(sorted(ATTENTIONS)), keeps=st.booleans())
def test_attention_on_what_was_rounded(case, dtype, keeps, asked, kernels):
    if asked == NONE:
        case |= {"width": -(-case["width"] // 8) * 8}
        case["turned"] = min(case["turned"], case["width"])
    feeds = feeds_of(case)
    if asked == NONE:
        use_weightless_sinks(case, feeds)
    y, present = attend(case, feeds, dtype, kernels, asked, keeps)
    assert_right(case, feeds, dtype, y, present)


@pytest.mark.parametrize("dtype", sorted(ATTENTIONS))
def test_what_is_beside_the_new_rows_stays(dtype, kernels):
    case = {
        "batch": 2, "new": 3, "past": 40, "room": 30, "width": 16, "groups": 2, "heads": 4, "window": 0, "softcap": 0.0,
        "turned": 16, "packed": True, "masked": False, "sinks": False, "seed": 3,
    }  # fmt: skip
    feeds = feeds_of(case)
    before = {name: array.copy() for name, array in caches_of(case, feeds, dtype, True)[0].items()}
    for asked in (None, NONE):
        _, present = attend(case, feeds, dtype, kernels, asked, True)
        for name, array in present.items():
            changed = (array.view(np.uint8) != before[name].view(np.uint8)).reshape(2, 2, 70, -1).any((0, 1, 3))
            assert changed.nonzero()[0].tolist() == [40, 41, 42], (name, asked)


def test_numbers_beyond_f16_are_its_largest(kernels):
    case = {
        "batch": 1, "new": 1, "past": 0, "room": 0, "width": 8, "groups": 1, "heads": 1, "window": 0, "softcap": 0.0,
        "turned": 0, "packed": False, "masked": False, "sinks": False, "seed": 3,
    }  # fmt: skip
    feeds = feeds_of(case)
    feeds["v"][:] = np.float32([1e6, -1e6, 65504, 65519, 1e-8, -6e-8, 0, 2.0**-14]).reshape(1, 1, 8)
    for asked in (*SETS, NONE):
        _, present = attend(case, feeds, "f16", kernels, asked, False)
        found = present["value"].view(np.float16).ravel().tolist()
        assert found == [65504, -65504, 65504, 65504, 0, -(2.0**-24), 0, 2.0**-14], asked


def test_scales_of_another_length_are_an_error(kernels):
    case = {
        "batch": 1, "new": 2, "past": 5, "room": 0, "width": 16, "groups": 2, "heads": 2, "window": 0, "softcap": 0.0,
        "turned": 0, "packed": False, "masked": False, "sinks": False, "seed": 3,
    }  # fmt: skip
    feeds = feeds_of(case)
    past, _ = caches_of(case, feeds, "i8", False)
    given = {name: x for name, x in feeds.items() if not name.startswith("past_")}
    given |= {f"past_{name}": array for name, array in past.items()}
    given["past_key_scale"] = np.zeros((1, 2, 4), np.float32)
    session = open_session(model_of(case, feeds, "i8"), kernels)
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="the scales are not those"):
        session.run(None, given)
