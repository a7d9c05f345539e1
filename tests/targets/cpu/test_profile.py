"""What ONNX Runtime's profile of a model is read as: nodes with their times, and the modules of the source they are of."""

import time

import numpy as np
import onnxruntime
from moec.targets.cpu.run.profile import enable_profiling, read_profile
from onnx import TensorProto, helper, save_model


def test_nodes_of_functions_without_a_kernel_are_of_the_modules_of_their_calls(tmp_path):
    """Without a kernel the runtime puts the body in a call's place, under a name that says nothing of it."""
    body = [helper.make_node("MatMul", ["x", "x"], ["m"]), helper.make_node("Softmax", ["m"], ["y"])]
    function = helper.make_function("moec", "Twice", ["x"], ["y"], body, [helper.make_opsetid("", 21)])
    nodes = [
        helper.make_node("Twice", ["x"], ["a"], "layer.0/up/Twice", "mlp.experts", domain="moec"),
        helper.make_node("MatMul", ["a", "a"], ["b"], "layer.0/q/MatMul", "self_attn.q_proj, self_attn.k_proj"),
        helper.make_node("Twice", ["b"], ["c"], "head/Twice", "lm_head", domain="moec"),
        helper.make_node("Exp", ["c"], ["y"], "exp/Exp"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [8, 8]) for name in "xy"]
    graph = helper.make_graph(nodes, "main", values[:1], values[1:])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("moec", 1)]
    save_model(helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10), tmp_path / "m.onnx")
    options = onnxruntime.SessionOptions()
    enable_profiling(options)
    runtime = onnxruntime.InferenceSession(tmp_path / "m.onnx", options, providers=["CPUExecutionProvider"])
    before = time.monotonic_ns()
    runtime.run(None, {"x": np.eye(8, dtype=np.float32)})
    after = time.monotonic_ns()
    events = read_profile(runtime, tmp_path / "m.onnx")
    assert [(event.name, event.modules) for event in events] == [
        ("MatMul", ("mlp.experts",)), ("Softmax", ("mlp.experts",)), ("MatMul", ("self_attn.q_proj", "self_attn.k_proj")),
        ("MatMul", ("lm_head",)), ("Softmax", ("lm_head",)), ("Exp", ()),
    ]  # fmt: skip
    assert all(before <= event.start < after and 0 <= event.seconds < (after - before) / 1e9 for event in events)
