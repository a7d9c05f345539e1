"""The library of moec's own kernels, and models of one node that run with it."""

import platform

import onnxruntime
import pytest
from moec.targets.cpu.kernels import library
from moec.targets.cpu.kernels.nodes import OPERATORS, use_kernels
from onnx import TensorProto, helper, numpy_helper

NONE, PLAIN = "none", "plain"  # what MOEC_CPU_KERNELS may ask for, beside what the processor has
SETS = [None, "avx2", PLAIN] if platform.machine() in ("x86_64", "AMD64") else [None, PLAIN]


def write_library(folder):
    """Write the library for this platform; skip the test where there is no compiler, or no kernels for it."""
    compiler, place = library.find_compiler(), library.this_platform()
    if compiler is None or place is None:
        pytest.skip("ziglang is not installed, or moec has no kernels for this platform")
    path = folder / place.file
    path.write_bytes(library.compile_library(place, compiler))
    return path


def open_session(model, kernels, asked=None):
    """Return a session of a model with the library; `asked` names other kernels than the processor's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEC_CPU_KERNELS", asked) if asked else patch.delenv("MOEC_CPU_KERNELS", raising=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        options.register_custom_ops_library(str(kernels))
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model, feeds, kernels, asked=None):
    """Return the results of a model."""
    return open_session(model, kernels, asked).run(None, feeds)


def node_model(node, feeds, weights, results):
    """Return a model of one node that the kernels compute; `results` are the shapes of its outputs by name."""
    initializers = {name: numpy_helper.from_array(array, name) for name, array in weights.items()}
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert OPERATORS[node.op_type].why_not(node, given, initializers) is None, (
        "the node is none that the kernels compute"
    )
    functions = use_kernels([node])
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), [None] * a.ndim)
        for n, a in feeds.items()
    ]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in results.items()]
    opsets = [helper.make_opsetid(*o) for o in (("", 23), ("com.microsoft", 1), ("moec", 1))]
    graph = helper.make_graph([node], "one", inputs, outputs, list(initializers.values()))
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=11)
