"""`onnx.node`: an operator of an ONNX model that no other op stands for, carried through to targets that are ONNX."""

from __future__ import annotations

from typing import Any

from ..errors import MoecError
from ..ir.deferred import torch
from ..ir.dims import Size
from ..ir.types import TensorType
from .define import Attributes, Types, op

OPSET = 23  # the version of ONNX's operators that a carried node is written in


def _infer_node(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    dtypes, shapes = attributes["dtypes"], attributes["shapes"]
    return tuple(TensorType.of(dtype, *shape) for dtype, shape in zip(dtypes, shapes, strict=True))


@op("onnx.node", "xs: any[*X]?... -> ys: any[*Y]...", infer=_infer_node)
def node(
    *xs, kind: str, reason: str, dtypes: tuple[str, ...], shapes: tuple[tuple[Size, ...], ...], domain: str = "",
    settings: tuple[tuple[Any, ...], ...] = (),
):  # fmt: skip
    """Compute what the operator `kind` of ONNX does; `settings` are its attributes, `reason` says why no other op does it.

    The types of the results are those that ONNX's own inference gives.
    """
    import onnx
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    if domain:
        raise MoecError(f"{domain}.{kind} has no reference", todo="leave out --check")
    names = ["" if x is None else f"x{i}" for i, x in enumerate(xs)]
    arrays = {name: x.numpy() for name, x in zip(names, xs, strict=True) if x is not None}
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in arrays.items()
    ]
    results = [f"y{i}" for i in range(len(dtypes))]
    made = helper.make_node(kind, names, results, **dict(settings))
    outputs = [helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None) for name in results]
    graph = helper.make_graph([made], "node", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    found = tuple(torch.from_numpy(y) for y in ReferenceEvaluator(model).run(None, arrays))
    return found if len(found) > 1 else found[0]
