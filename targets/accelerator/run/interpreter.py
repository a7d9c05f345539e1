"""Mends Triton's interpreter where it computes otherwise than a GPU.

In 3.9 it multiplies the bits of bf16 as if they were numbers, cuts off instead of rounding to bf16, takes subnormal f8
wrongly, and makes a comparison of scalars an int where it meets a tile.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

BITS = {8: np.uint8, 16: np.uint16, 32: np.uint32}


@cache
def mend_interpreter() -> None:
    """Replace what the interpreter does wrong, once in a process, before a kernel runs. Triton has to be installed."""
    import triton.language as tl
    from triton.runtime import interpreter

    floats: dict[Any, Any] = {
        tl.float32: np.float32, tl.float16: np.float16, tl.bfloat16: ml_dtypes.bfloat16,
        tl.float8e5: ml_dtypes.float8_e5m2, tl.float8e4nv: ml_dtypes.float8_e4m3fn,
        tl.float8e4b8: ml_dtypes.float8_e4m3fnuz,
    }  # fmt: skip
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    convert_float, splat, dot = interpreter._convert_float, builder.create_splat, builder.create_dot

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source not in floats or target not in floats:
            return convert_float(data, source, target, rounding)
        numbers = np.ascontiguousarray(data).view(floats[source]).astype(np.float32)
        return numbers.astype(floats[target]).view(BITS[target.primitive_bitwidth])

    def make_splat(self: Any, shape: Any, value: Any) -> Any:
        made = splat(self, shape, value)
        return handle(made.data.astype(np.bool_), tl.int1) if value.data.dtype == np.bool_ else made

    def widened(x: Any) -> Any:
        if x.dtype.scalar not in floats:
            return x
        return handle(convert(x.data, x.dtype.scalar, tl.float32, None).view(np.float32), tl.float32)

    def make_dot(self: Any, a: Any, b: Any, acc: Any, *precision: Any) -> Any:
        return dot(self, widened(a), widened(b), acc, *precision)

    for place, name, mended in (
        (interpreter, "_convert_float", convert), (builder, "create_splat", make_splat), (builder, "create_dot", make_dot),
    ):  # fmt: skip
        setattr(place, name, mended)
