"""moec's kernels on weights in a grid: against numbers made here, with the library and by the functions that stand for it."""

import ml_dtypes
import moec
import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moec.compiler.formats.table import format_of
from moec.targets.cpu.kernels.grids import grid_functions
from onnx import TensorProto, helper, numpy_helper
from own_kernels import SETS, run, write_library

VALUES = np.array(format_of("grid4_g32").values, np.float32)
PAIRS = np.stack([VALUES[np.arange(256) & 15], VALUES[np.arange(256) >> 4]], 1)
SETTINGS = settings(max_examples=25, deadline=None)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return write_library(tmp_path_factory.mktemp("kernels"))


def random_weight(random, shape, group):
    """Return codes, scales of either sign, and the numbers that they stand for."""
    *lead, width = shape
    codes = random.integers(0, 16, shape)
    scales = random.uniform(0.5e-3, 1e-3, (*lead, width // group)) * random.choice([-1, 1], (*lead, width // group))
    scales = scales.astype(ml_dtypes.bfloat16)
    packed = (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)
    return packed, scales, VALUES[codes] * scales.astype(np.float32).repeat(group, -1)


def exact_activations(random, rows, width, group):
    """Return numbers that rounding to int8 in groups does not change."""
    x = random.integers(-127, 128, (rows, width // group, group))
    x[..., 0] = 127
    return (x * 2.0 ** random.integers(-8, 8, (rows, width // group, 1))).astype(np.float32).reshape(rows, width)


def model_of(node, feeds, weights, width, numbers=PAIRS):
    initializers = [numpy_helper.from_array(numbers, "numbers")]
    for name, array in weights.items():
        if array.dtype == np.uint8:
            initializers.append(numpy_helper.from_array(array, name))
        else:
            initializers.append(helper.make_tensor(name, TensorProto.BFLOAT16, array.shape, array.tobytes(), raw=True))
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), [None, a.shape[1]])
        for n, a in feeds.items()
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, width])]
    graph = helper.make_graph([node], "one", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("moec", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=grid_functions([node], 23), ir_version=11)


def linear_model(random, rows, out, width, group, numbers=PAIRS):
    codes, scales, values = random_weight(random, (out, width), group)
    node = helper.make_node(
        "MatMulGrid",
        ["x", "codes", "scales", "numbers"],
        ["y"],
        domain="moec",
        K=width,
        N=out,
        bits=4,
        block_size=group,
    )
    x = exact_activations(random, rows, width, group)
    return model_of(node, {"x": x}, {"codes": codes, "scales": scales}, out, numbers), x, values


@st.composite
def linears(draw):
    group = draw(st.sampled_from([16, 32, 64, 128, 256]))
    return (
        draw(st.integers(1, 200)),
        draw(st.integers(1, 150)),
        group * draw(st.integers(1, 9)),
        group,
        draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize("asked", [*SETS, "body"])
@SETTINGS
@given(case=linears())
def test_linear_is_the_product_with_the_numbers(case, asked, kernels):
    rows, out, width, group, seed = case
    model, x, values = linear_model(np.random.default_rng(seed), rows, out, width, group)
    wanted = x.astype(np.float64) @ values.T.astype(np.float64)
    if asked == "body":
        (found,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    else:
        (found,) = run(model, {"x": x}, kernels, asked)
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(np.abs(x) @ np.abs(values.T)).max()


def rounded(x, group):
    """Return rows as the kernels round them: to int8 in groups."""
    groups = x.reshape(len(x), x.shape[1] // group, group)
    scale = np.maximum(np.abs(groups).max(-1, keepdims=True), 1e-30) / 127
    return (np.rint(groups / scale) * scale).reshape(x.shape)


@pytest.mark.parametrize("asked", [*SETS, "body"])
@pytest.mark.parametrize(("tokens", "limit"), [(1, 7.0), (3, np.inf), (90, np.inf), (600, 2.0)])
def test_experts_are_what_is_computed_expert_by_expert(tokens, limit, asked, kernels):
    random, experts, k, width, inner, group = np.random.default_rng(tokens), 6, 2, 96, 160, 32
    up, up_scales, up_values = random_weight(random, (experts, 2 * inner, width), group)
    down, down_scales, down_values = random_weight(random, (experts, width, inner), group)
    inputs = ["x", "ids", "gates", "up", "up_scales", "down", "down_scales", "numbers"]
    node = helper.make_node(
        "GridExperts", inputs, ["y"], domain="moec", k=k, expert_weight_bits=4, block_size=group,
        activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.25, activation_beta=0.5, swiglu_limit=limit,
    )  # fmt: skip
    feeds = {
        "x": exact_activations(random, tokens, width, group) / 256,
        "ids": np.stack([random.permutation(experts - 1)[:k] for _ in range(tokens)]).astype(np.int64),
        "gates": random.uniform(-0.5, 1, (tokens, k)).astype(np.float32),
    }
    weights = {"up": up, "up_scales": up_scales, "down": down, "down_scales": down_scales}
    model = model_of(node, feeds, weights, width)
    if asked == "body":
        (found,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)
    else:
        (found,) = run(model, feeds, kernels, asked)
    wanted = np.zeros((tokens, width))
    for e in range(experts):
        rows, places = np.nonzero(feeds["ids"] == e)
        both = feeds["x"][rows].astype(np.float64) @ up_values[e].T
        gate, linear = np.minimum(both[:, ::2], limit), np.clip(both[:, 1::2], -limit, limit)
        hidden = gate / (1 + np.exp(np.minimum(-1.25 * gate, 700))) * (linear + 0.5)
        hidden = hidden if asked == "body" else rounded(hidden, group)
        np.add.at(wanted, rows, feeds["gates"][rows, places][:, None] * (hidden @ down_values[e].T))
    assert np.abs(found - wanted).max() < 2e-3 * np.abs(wanted).max()


def test_numbers_that_are_no_int8_are_refused(kernels):
    model, x, _ = linear_model(np.random.default_rng(0), 2, 5, 64, 32, PAIRS + np.float32(0.5))
    with pytest.raises(Exception, match="no grid of int8"):
        run(model, {"x": x}, kernels)


def test_an_artifact_runs_them_and_needs_no_library(tmp_path, request):
    import onnx

    folder = request.config.rootpath / "examples/tiny-moe"
    plain = moec.compile(folder, out=tmp_path / "plain", quantize="grid4_g32", options={"kernels": "onnxruntime"})
    model = onnx.load(plain.folder / "model.onnx", load_external_data=False)
    kinds = {(n.domain, n.op_type) for n in model.graph.node}
    assert {("moec", "MatMulGrid"), ("moec", "GridExperts")} <= kinds and not {("", "Loop")} & kinds
    exact = moec.compile(folder, out=tmp_path / "exact", quantize="grid4_g32", accuracy="exact")
    ids = np.arange(3, 31)[None]
    feeds = ids, np.ones_like(ids), np.arange(28)[None]
    logits = [a.session(spinning=False).step(*feeds)[0] for a in (plain, exact)]
    assert np.abs(logits[0] - logits[1]).max() < 1e-4 * np.abs(logits[1]).max()
