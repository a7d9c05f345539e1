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

VALUES = {bits: np.array(format_of(f"grid{bits}_g32").values, np.float32) for bits in (3, 4)}
# the operators, and their input `numbers`, by the bits of a code
LINEAR, EXPERTS = {3: "MatMulGrid3", 4: "MatMulGrid"}, {3: "GridExperts3", 4: "GridExperts"}
NUMBERS = {3: VALUES[3], 4: np.stack([VALUES[4][np.arange(256) & 15], VALUES[4][np.arange(256) >> 4]], 1)}
SETTINGS = settings(max_examples=25, deadline=None)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return write_library(tmp_path_factory.mktemp("kernels"))


def bits_packed(codes, bits):
    """Return codes in bytes, the first in the lowest bits."""
    each = codes[..., None] >> np.arange(bits) & 1
    return np.packbits(each.reshape(*codes.shape[:-1], -1).astype(np.uint8), axis=-1, bitorder="little")


def random_weight(random, shape, group, bits):
    """Return codes, scales of either sign, and the numbers that they stand for."""
    *lead, width = shape
    codes = random.integers(0, 1 << bits, shape)
    scales = random.uniform(0.5e-3, 1e-3, (*lead, width // group)) * random.choice([-1, 1], (*lead, width // group))
    scales = scales.astype(ml_dtypes.bfloat16)
    planes = [bits_packed(codes & 3, 2), bits_packed(codes >> 2, 1)] if bits == 3 else [bits_packed(codes, 4)]
    return np.concatenate(planes, -1), scales, VALUES[bits][codes] * scales.astype(np.float32).repeat(group, -1)


def exact_activations(random, rows, width, group):
    """Return numbers that rounding to int8 in groups does not change."""
    x = random.integers(-127, 128, (rows, width // group, group))
    x[..., 0] = 127
    return (x * 2.0 ** random.integers(-8, 8, (rows, width // group, 1))).astype(np.float32).reshape(rows, width)


def model_of(node, feeds, weights, width, numbers):
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


def linear_model(random, rows, out, width, group, bits, numbers):
    codes, scales, values = random_weight(random, (out, width), group, bits)
    node = helper.make_node(
        LINEAR[bits],
        ["x", "codes", "scales", "numbers"],
        ["y"],
        domain="moec",
        K=width,
        N=out,
        bits=bits,
        block_size=group,
    )
    x = exact_activations(random, rows, width, group)
    return model_of(node, {"x": x}, {"codes": codes, "scales": scales}, out, numbers), x, values


@st.composite
def linears(draw):
    bits = draw(st.sampled_from([3, 4]))
    group = draw(st.sampled_from([16, 32, 64, 128, 256][bits == 3 :]))
    return (
        draw(st.integers(1, 200)),
        draw(st.integers(1, 150)),
        group * draw(st.integers(1, 9)),
        group,
        bits,
        draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize("asked", [*SETS, "body"])
@SETTINGS
@given(case=linears())
def test_linear_is_the_product_with_the_numbers(case, asked, kernels):
    rows, out, width, group, bits, seed = case
    model, x, values = linear_model(np.random.default_rng(seed), rows, out, width, group, bits, NUMBERS[bits])
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
@pytest.mark.parametrize(
    ("tokens", "limit", "bits"),
    [(1, 7.0, 4), (1, np.inf, 3), (3, np.inf, 4), (90, np.inf, 4), (90, 3.0, 3), (600, 2.0, 4)],
)
def test_experts_are_what_is_computed_expert_by_expert(tokens, limit, bits, asked, kernels):
    random, experts, k, width, inner, group = np.random.default_rng(tokens), 6, 2, 96, 160, 32
    up, up_scales, up_values = random_weight(random, (experts, 2 * inner, width), group, bits)
    down, down_scales, down_values = random_weight(random, (experts, width, inner), group, bits)
    inputs = ["x", "ids", "gates", "up", "up_scales", "down", "down_scales", "numbers"]
    node = helper.make_node(
        EXPERTS[bits], inputs, ["y"], domain="moec", k=k, expert_weight_bits=bits, block_size=group,
        activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.25, activation_beta=0.5, swiglu_limit=limit,
    )  # fmt: skip
    feeds = {
        "x": exact_activations(random, tokens, width, group) / 256,
        "ids": np.stack([random.permutation(experts - 1)[:k] for _ in range(tokens)]).astype(np.int64),
        "gates": random.uniform(-0.5, 1, (tokens, k)).astype(np.float32),
    }
    weights = {"up": up, "up_scales": up_scales, "down": down, "down_scales": down_scales}
    model = model_of(node, feeds, weights, width, NUMBERS[bits])
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


@pytest.mark.parametrize("bits", [3, 4])
def test_numbers_that_are_no_int8_are_refused(bits, kernels):
    model, x, _ = linear_model(np.random.default_rng(0), 2, 5, 64, 32, bits, NUMBERS[bits] + np.float32(0.5))
    with pytest.raises(Exception, match="no grid of int8"):
        run(model, {"x": x}, kernels)


@pytest.mark.parametrize("bits", [pytest.param(3, marks=pytest.mark.long), 4])
def test_an_artifact_runs_them_and_needs_no_library(bits, tmp_path, request):
    import onnx

    folder, format = request.config.rootpath / "examples/tiny-moe", f"grid{bits}_g32"
    plain = moec.compile(folder, out=tmp_path / "plain", quantize=format, options={"kernels": "onnxruntime"})
    model = onnx.load(plain.folder / "model.onnx", load_external_data=False)
    kinds = {(n.domain, n.op_type) for n in model.graph.node}
    assert {("moec", LINEAR[bits]), ("moec", EXPERTS[bits])} <= kinds and not {("", "Loop")} & kinds
    exact = moec.compile(folder, out=tmp_path / "exact", quantize=format, accuracy="exact")
    ids = np.arange(3, 31)[None]
    feeds = ids, np.ones_like(ids), np.arange(28)[None]
    logits = [a.session(spinning=False).step(*feeds)[0] for a in (plain, exact)]
    assert np.abs(logits[0] - logits[1]).max() < 1e-4 * np.abs(logits[1]).max()
