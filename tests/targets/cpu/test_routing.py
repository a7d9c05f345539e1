"""Routing on the cpu target: every scheme of the file tests, and moe.route with any attributes, equal the reference."""

from __future__ import annotations

import tempfile
from functools import cache
from math import inf
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from moec.compiler.check.interpret import interpret, random_inputs
from moec.compiler.driver import opt
from moec.compiler.errors import MoecError
from moec.compiler.ir.dims import dim
from moec.compiler.ir.module import Dim, Function, Module, Op, Value
from moec.compiler.ir.types import TensorType, make_attrs
from moec.compiler.ops import OPS
from moec.compiler.text.parser import parse_module
from moec.compiler.weights.sources.source import RandomSource
from moec.targets import open_target
from moec.targets.cpu.lower.ranges import gate_sum, not_negative
from moec.targets.cpu.onnx.emit import emit_model
from onnx_session import open_session
from places import FILES

T = dim("T")
EXPERTS = 8
SCHEMES = {
    path.stem.removeprefix("fuse_router_"): path
    for path in sorted(FILES.glob("fuse_router_*.moir"))
    if "# ---- expect" in path.read_text("utf-8")
}
# factor and shift of the logits. The second makes scores down to 1e-26, of which eps and min_sum are the larger part,
# and no two that are equal; where sigmoids are 1 to float32, which of them is chosen means nothing
EXTREMES = ((1.0, 0.0), (10.0, -30.0))
FLOAT32 = {"rtol": 1e-4, "atol": 1e-30}  # of every single weight, however small


def session(module: Module) -> ort.InferenceSession:
    """Return a session of a module of stage kernel without weights."""
    with tempfile.TemporaryDirectory() as folder:
        emit_model(module, RandomSource(), Path(folder))
        return open_session(Path(folder))


def no_weights(recipe: object) -> torch.Tensor:
    raise AssertionError("the program has no weights")


def inputs_of(module: Module, factor: float, shift: float, seed: int) -> list[torch.Tensor]:
    """Return random inputs; the first one are the logits."""
    logits, *rest = random_inputs(module, "main", {"T": 33}, seed)
    return [logits * factor + shift, *rest]


def check(module: Module, runner: ort.InferenceSession, inputs: list[torch.Tensor]) -> None:
    """Compare the session's results with the module's, each expert's weight for each token by itself."""
    want = [x.numpy() for x in interpret(module, inputs, no_weights)]
    got = runner.run(None, {p.name: x.numpy() for p, x in zip(module.main.params, inputs, strict=True)})
    if len(want) == 2 and want[1].dtype == np.int64:
        want, got = [spread_out(*want)], [spread_out(*got)]
    for a, b in zip(got, want, strict=True):
        if module.main.results[0].name == "y":  # what experts make of the weights
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=0)
        else:
            np.testing.assert_allclose(a, b, **FLOAT32)


def spread_out(gates: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return the weight of each expert: which of two experts without weight was chosen makes no difference."""
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    wide = np.zeros((len(ids), EXPERTS + 1), gates.dtype)
    np.put_along_axis(wide, ids, gates, axis=1)
    return wide


@pytest.mark.parametrize("name", SCHEMES)
def test_scheme_on_the_cpu(name: str) -> None:
    module = parse_module(SCHEMES[name].read_text("utf-8").partition("# ---- expect")[0])
    fused = opt(module, "fuse-router,cleanup")
    assert sum(op.name == "moe.route" for op in fused.main.ops) == 1
    runner = session(open_target("cpu", {}).lower(fused, None).module)
    for factor, shift in EXTREMES:
        for seed in range(3):
            check(module, runner, inputs_of(module, factor, shift, seed))


# --- any attributes --------------------------------------------------------------------------------------------

Operands = tuple[bool, bool, bool]  # whether there are a bias, given experts, a scale for each expert


@cache
def program(attrs: tuple, operands: Operands) -> Module:
    """Return a program of one moe.route."""
    k = dict(attrs)["k"]
    types = [TensorType.of("f32", EXPERTS), TensorType.of("i64", T, k), TensorType.of("f32", EXPERTS)]
    values = [Value(f"x{i}", t) if wanted else None for i, (t, wanted) in enumerate(zip(types, operands, strict=True))]
    logits = Value("logits", TensorType.of("f32", T, EXPERTS))
    op_types = OPS["moe.route"].infer([logits.type, *(v and v.type for v in values)], dict(attrs))
    results = (Value("gates", op_types[0]), Value("ids", op_types[1]))
    op = Op("moe.route", (logits, *values), results, attrs)
    params = (logits, *(v for v in values if v))
    return Module("kernel", (Dim("T", 1, 64),), (Function("main", params, (), (op,), results),))


@cache
def runner_of(attrs: tuple, operands: Operands) -> ort.InferenceSession:
    """Return the session of a program, made once."""
    return session(program(attrs, operands))


def one_of(*values: Any) -> st.SearchStrategy:
    return st.sampled_from(values)


@st.composite
def routings(draw) -> tuple[tuple, Operands]:
    """Draw attributes and operands that fit each other."""
    attrs: dict[str, Any] = {"scale": draw(one_of(1.0, 2.5)), "renorm": draw(one_of("none", "sum", "sum", "norm"))}
    attrs["score"] = draw(one_of("softmax", "softmax", "sigmoid", "sqrtsoftplus", "identity", "sparsemixer"))
    bias = given_ids = False
    if attrs["score"] == "sparsemixer":
        attrs |= {"k": draw(st.integers(1, 3)), "jitter": draw(one_of(0.0, 0.05, 0.3))}
    else:
        attrs["order"] = draw(one_of("score_select", "score_select", "select_score"))
        early = attrs["order"] == "score_select"
        given_ids = draw(one_of(False, False, False, True))
        bias = not given_ids and draw(st.booleans())
        weights = ["scores", *["logits"] * early, *["choice"] * (not given_ids)]
        attrs["weigh"] = draw(one_of("scores", *weights))
        if not given_ids and draw(st.booleans()):
            attrs["groups"] = draw(one_of(2, 4))
            attrs["topk_groups"] = draw(st.integers(1, attrs["groups"]))
            attrs |= {"group_score": draw(one_of("max", "top2")), "mask": draw(one_of(-inf, 0.0))}
        most = attrs.get("topk_groups", 1) * EXPERTS // attrs.get("groups", 1)
        attrs["k"] = draw(st.integers(1, min(most, 4)))
    if attrs["renorm"] != "none":
        attrs |= {"eps": draw(one_of(0.0, 1e-20, 0.1)), "min_sum": draw(one_of(0.0, 1e-12, 0.7))}
    if attrs["renorm"] == "norm":
        attrs["p"] = draw(one_of(1.0, 2.0, 3.0))
    return make_attrs(attrs), (bias, given_ids, draw(st.booleans()))


@settings(deadline=None, max_examples=200, derandomize=True)
@given(routings(), st.integers(0, 99))
def test_any_routing(routing: tuple[tuple, Operands], seed: int) -> None:
    module = program(*routing)
    inputs = inputs_of(module, 1.0, 0.0, seed)
    attributes = OPS["moe.route"].complete(dict(routing[0]))
    sums = attributes["renorm"] != "none" and (attributes["score"] == "identity" or attributes["weigh"] != "scores")
    if sums or attributes["mask"] == 0:  # a sum around 0 says nothing about rounding; masked experts are all equal
        inputs[0] = inputs[0].abs() + 0.1
        inputs[1:] = [x.abs() if x.is_floating_point() else x for x in inputs[1:]]
    check(module, runner_of(*routing), inputs)
    gates, _ = interpret(module, inputs, no_weights)
    if not_negative(module.main, module.main.results[0]):
        assert (gates >= 0).all()
    total = gate_sum(module.main, module.main.results[0])
    if total is not None:
        torch.testing.assert_close(gates.sum(1), torch.full((len(gates),), total))


@pytest.mark.parametrize(
    ("attrs", "operands"),
    [
        ({}, ()), ({"eps": 1e-20, "min_sum": 1e-12}, ()), ({"eps": 0.1}, ()), ({"min_sum": 0.7}, ()),
        ({"weigh": "logits"}, ()), ({"groups": 2}, ()), ({"renorm": "norm"}, ()), ({"renorm": "none"}, ()),
        ({}, ("bias",)), ({"weigh": "choice"}, ("bias",)), ({}, ("given",)), ({"score": "sigmoid"}, ()),
    ],
)  # fmt: skip
def test_softmax_of_the_chosen_only_where_it_is_the_same(attrs: dict[str, Any], operands: tuple[str, ...]) -> None:
    """Softmax, chosen and divided by the sum, is emitted as the softmax of the chosen; its neighbours are not."""
    key = (
        make_attrs({"k": 2, "score": "softmax", "renorm": "sum", **attrs}),
        ("bias" in operands, "given" in operands, False),
    )
    module = program(*key)
    for seed in range(3):
        check(
            module,
            runner_of(*key),
            [inputs_of(module, 1.0, 0.0, seed)[0].abs(), *inputs_of(module, 1.0, 0.0, seed)[1:]],
        )


@pytest.mark.parametrize("weigh", ["scores", "choice"])
def test_a_mask_of_0_is_more_than_negative_scores(weigh: str) -> None:
    """Where every score is negative the two masked experts are chosen, with their own scores or with 0."""
    groups = {"groups": 4, "topk_groups": 3, "mask": 0.0}
    attrs = make_attrs({"k": 2, "score": "identity", "weigh": weigh, **groups})
    module = program(attrs, (False, False, False))
    inputs = [-inputs_of(module, 1.0, 0.0, 0)[0].abs() - 0.1]
    gates, _ = interpret(module, inputs, no_weights)
    assert (gates == 0).all() if weigh == "choice" else (gates < 0).all()
    check(module, runner_of(attrs, (False, False, False)), inputs)


@pytest.mark.parametrize(
    ("attrs", "operands", "message"),
    [
        ({"k": 9}, (), "k=9 of 8 experts"),
        ({"k": 2, "score": "relu"}, (), "does not know score=relu; it knows softmax, sigmoid"),
        ({"k": 2, "mask": 1.0}, (), "does not know mask=1.0; it knows -inf, 0.0"),
        ({"k": 2, "groups": 3}, (), "topk_groups=1 of groups=3 with 8 experts"),
        ({"k": 2, "groups": 8, "topk_groups": 2, "group_score": "top2"}, (), "wants groups of two experts or more"),
        ({"k": 3, "groups": 4}, (), "k=3, but 1 groups of 2 leave 2 experts"),
        ({"k": 2, "eps": 0.1}, (), "renorm=none has none"),
        ({"k": 2, "renorm": "sum", "p": 2.0}, (), "belongs to renorm=norm"),
        ({"k": 2, "renorm": "sum", "eps": -0.1}, (), "eps and min_sum are 0 or more"),
        ({"k": 2, "jitter": 0.1}, (), "belongs to score=sparsemixer"),
        ({"k": 2, "score": "sparsemixer"}, ("bias",), "chooses by itself"),
        ({"k": 2}, ("bias", "given"), "where the experts are given nothing is chosen"),
        ({"k": 2, "order": "select_score", "weigh": "logits"}, (), "weigh=logits takes them as they are"),
    ],
)
def test_nonsense_is_refused(attrs: dict[str, Any], operands: tuple[str, ...], message: str) -> None:
    with pytest.raises(MoecError, match=message):
        program(make_attrs(attrs), ("bias" in operands, "given" in operands, False))
