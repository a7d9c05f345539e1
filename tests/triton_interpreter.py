"""Repairs Triton's interpreter where it computes otherwise than a GPU: import it before a kernel runs.

In 3.9 it multiplies the bits of bf16 as if they were numbers, cuts off instead of rounding to bf16, takes subnormal f8
wrongly, and makes a comparison of scalars an int where it meets a tile.
"""

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

FLOATS = {
    tl.float32: np.float32, tl.float16: np.float16, tl.bfloat16: ml_dtypes.bfloat16, tl.float8e5: ml_dtypes.float8_e5m2,
    tl.float8e4nv: ml_dtypes.float8_e4m3fn,
}  # fmt: skip
BITS = {8: np.uint8, 16: np.uint16, 32: np.uint32}
Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
convert_float, splat, dot = interpreter._convert_float, Builder.create_splat, Builder.create_dot


def _convert(data, source, target, rounding):
    if source not in FLOATS or target not in FLOATS:
        return convert_float(data, source, target, rounding)
    numbers = np.ascontiguousarray(data).view(FLOATS[source]).astype(np.float32)
    return numbers.astype(FLOATS[target]).view(BITS[target.primitive_bitwidth])


def _splat(self, shape, value):
    made = splat(self, shape, value)
    return Handle(made.data.astype(np.bool_), tl.int1) if value.data.dtype == np.bool_ else made


def _dot(self, a, b, acc, *precision):
    a, b = (
        Handle(_convert(x.data, x.dtype.scalar, tl.float32, None).view(np.float32), tl.float32)
        if x.dtype.scalar in FLOATS
        else x
        for x in (a, b)
    )
    return dot(self, a, b, acc, *precision)


interpreter._convert_float = _convert
Builder.create_splat = _splat
Builder.create_dot = _dot
