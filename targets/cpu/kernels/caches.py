"""The functions that stand for moec's attention on a cache of f16, bf16 or int8 where the library is not.

ONNX Runtime's GroupQueryAttention wants a cache of f32: what is stored is made f32 in every step. New keys and values are rounded
before they are attended to, as the kernels do it. A buffer that has room for more tokens stays as long as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper

from ..onnx.graph import CONTRIB, END, ONNX_TYPES
from .body import Body
from .nodes import DOMAIN, OPERATORS

ATTENTIONS = {  # operator of the library by the dtype of its cache
    "f16": "GroupQueryAttentionF16", "bf16": "GroupQueryAttentionBF16", "i8": "GroupQueryAttentionInt8",
}  # fmt: skip
PACKED, TURNED = "packed", "turned"  # q, k and v come in one piece; heads are turned by angles
_PLAIN = "GroupQueryAttention"
_INPUTS = (
    "q", "k", "v", "past_key", "past_value", "last", "total", "cos", "sin", "rows", "bias", "sinks", "unused12",
    "unused13", "unused14", "unused15", "count",
)  # fmt: skip
_SCALES = ("key_scale", "value_scale")
_SMALLEST, _LARGEST_CODE, _LARGEST_HALF = 1e-30, 127.0, 65504.0


class _Rows(NamedTuple):
    """Rows of a cache, as they are stored, and of int8 their scales."""

    stored: str
    scales: str | None = None


def form_name(*, packed: bool, turned: bool) -> str:
    """Return the overload of a node: which of its inputs it has. Each has a function of its own."""
    return "_".join(name for name, has in ((PACKED, packed), (TURNED, turned)) if has)


def cache_functions(nodes: Iterable[NodeProto], opset: int) -> list[FunctionProto]:
    """Return the functions of the attention on stored caches that a model has."""
    dtypes = {kind: dtype for dtype, kind in ATTENTIONS.items()}
    found = sorted({(n.op_type, n.overload) for n in nodes if n.domain == DOMAIN and n.op_type in dtypes})
    return [_attention_function(kind, dtypes[kind], form, opset) for kind, form in found]


def _attention_function(kind: str, dtype: str, form: str, opset: int) -> FunctionProto:
    body, forms = _Body(dtype), form.split("_")
    q, k, v = body.split_packed() if PACKED in forms else ("q", "k", "v")
    rows = [body.as_heads(x) for x in (q, k, v)]
    if TURNED in forms:
        rows[:2] = (body.turned(x) for x in rows[:2])
    pasts = [_Rows(past, scale if dtype == "i8" else None) for past, scale in zip(_INPUTS[3:5], _SCALES, strict=True)]
    new = [body.stored(body.add("Transpose", x, perm=[0, 2, 1, 3])) for x in rows[1:]]
    given = [body.flat(body.add("Transpose", body.numbers(n), perm=[0, 2, 1, 3])) for n in new]
    inputs = [body.flat(rows[0]), *given, *(body.numbers(past) for past in pasts), "last", "total", "", "", ""]
    inputs += ["bias", "sinks", "", "", "", "", "count"]
    body.attend(inputs)
    presents = [
        [body.appended(a, b) for a, b in zip(past, n, strict=True) if a and b]
        for past, n in zip(pasts, new, strict=True)
    ]
    outputs = ["y"]
    for part in zip(*presents, strict=True):
        for name, value in zip(("key", "value"), part, strict=True):
            outputs.append(name if len(outputs) < 3 else f"{name}_scale_present")
            body.nodes.append(helper.make_node("Identity", [value], [outputs[-1]]))
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(CONTRIB, 1)]
    names = [*_INPUTS, *(_SCALES if dtype == "i8" else ())]
    attributes = list(OPERATORS[_PLAIN].attributes)
    return helper.make_function(DOMAIN, kind, names, outputs, body.nodes, opsets, attributes, overload=form)


class _Body(Body):
    """A body with what stores numbers in a cache of a dtype, and reads them."""

    def __init__(self, dtype: str) -> None:
        """Start without nodes."""
        super().__init__()
        self.dtype = dtype
        self.width = self.add("Shape", "past_key", start=3, end=4)
        self.new = self.add("Shape", "q", start=1, end=2)
        self.total = self.add("Reshape", self.add("Cast", "total", to=TensorProto.INT64), self.integers(1))

    def number(self, value: float) -> str:
        """Return a constant f32."""
        return self.add("Constant", value_float=value)

    def split_packed(self) -> list[str]:
        """Return q, k and v."""
        counts = [self.setting(name, AttributeProto.INT) for name in ("num_heads", "kv_num_heads", "kv_num_heads")]
        sizes = self.add("Concat", *(self.add("Mul", self.width, n) for n in counts), axis=0)
        return self.add("Split", "q", sizes, outputs=3, axis=2)

    def as_heads(self, x: str) -> str:
        """Return rows [B, S, H, D] of rows that have their heads one after the other."""
        return self.add("Reshape", x, self.add("Concat", self.integers(0, 0, -1), self.width, axis=0))

    def flat(self, x: str) -> str:
        """Return rows with their heads one after the other."""
        return self.add("Reshape", x, self.integers(0, 0, -1))

    def turned(self, x: str) -> str:
        """Return heads with the halves of their first numbers turned by the angles of their tokens."""
        half = self.add("Shape", "cos", start=1, end=2)
        rest = self.add("Sub", self.add("Sub", self.width, half), half)
        a, b, c = self.add("Split", x, self.add("Concat", half, half, rest, axis=0), outputs=3, axis=3)
        cos, sin = (self.add("Unsqueeze", self.add("Gather", t, "rows"), self.integers(2)) for t in ("cos", "sin"))
        first = self.add("Sub", self.add("Mul", a, cos), self.add("Mul", b, sin))
        second = self.add("Add", self.add("Mul", b, cos), self.add("Mul", a, sin))
        return self.add("Concat", first, second, c, axis=3)

    def stored(self, x: str) -> _Rows:
        """Return numbers as the cache stores them."""
        if self.dtype == "i8":
            largest = self.add("ReduceMax", self.add("Abs", x), self.integers(3), keepdims=1)
            largest = self.add("Max", largest, self.number(_SMALLEST))
            scales = self.add("Div", largest, self.number(_LARGEST_CODE))
            codes = self.add("Cast", self.add("Round", self.add("Div", x, scales)), to=TensorProto.INT8)
            return _Rows(codes, self.add("Squeeze", scales, self.integers(3)))
        if self.dtype == "f16":
            x = self.add("Clip", x, self.number(-_LARGEST_HALF), self.number(_LARGEST_HALF))
        return _Rows(self.add("Cast", x, to=ONNX_TYPES[self.dtype]))

    def numbers(self, rows: _Rows) -> str:
        """Return the f32 that rows of the cache stand for."""
        found = self.add("Cast", rows.stored, to=TensorProto.FLOAT)
        if rows.scales is None:
            return found
        return self.add("Mul", found, self.add("Unsqueeze", rows.scales, self.integers(-1)))

    def appended(self, past: str, new: str) -> str:
        """Return a cache with new rows after those of the past, as long as the buffer of the past if that has room."""
        axis = self.integers(2)
        before = self.add("Slice", past, self.integers(0), self.add("Sub", self.total, self.new), axis)
        return self.add("Concat", before, new, self.add("Slice", past, self.total, self.integers(END), axis), axis=2)

    def attend(self, inputs: list[str]) -> None:
        """Add ONNX Runtime's operator, which gives y."""
        node = helper.make_node(_PLAIN, inputs, ["y", "plain_key", "plain_value"], domain=CONTRIB, do_rotary=0)
        for name, type_ in OPERATORS[_PLAIN].attributes.items():
            if name != "do_rotary":
                node.attribute.append(AttributeProto(name=name, type=type_, ref_attr_name=name))
        self.nodes.append(node)
