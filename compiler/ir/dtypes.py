"""The dtypes of elements: their names in programs, their bits, and the types that numpy and torch have for them.

What a file format or another language calls a dtype (safetensors, ONNX, GGUF, Triton) is said where it is read or written.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ..formats.table import find_format

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class DType:
    """A dtype: its name in programs, the bits of an element, and its name in numpy, ml_dtypes and torch."""

    name: str
    bits: int
    common: str

    @cached_property
    def numpy(self) -> np.dtype:
        """The dtype of numpy; of ml_dtypes where numpy has none."""
        import ml_dtypes
        import numpy as np

        return np.dtype(getattr(ml_dtypes, self.common, self.common))

    @cached_property
    def torch(self) -> torch.dtype:
        """The dtype of torch, which is imported when it is asked for."""
        import torch

        return getattr(torch, self.common)


DTYPES = {
    name: DType(name, bits, common)
    for name, bits, common in (
        ("bool", 8, "bool"), ("u8", 8, "uint8"), ("i8", 8, "int8"), ("i16", 16, "int16"), ("i32", 32, "int32"),
        ("i64", 64, "int64"), ("f8e4m3", 8, "float8_e4m3fn"), ("f8e5m2", 8, "float8_e5m2"),
        ("f8e4m3fnuz", 8, "float8_e4m3fnuz"),
        ("f8e8m0", 8, "float8_e8m0fnu"), ("f16", 16, "float16"), ("bf16", 16, "bfloat16"), ("f32", 32, "float32"),
        ("f64", 64, "float64"),
    )
}  # fmt: skip
_NAMES = {dtype.common: name for name, dtype in DTYPES.items()}


def is_dtype(name: str) -> bool:
    """Return whether a name is that of a dtype, plain or quantized."""
    return name in DTYPES or find_format(name) is not None


def find_dtype(dtype: np.dtype | torch.dtype) -> str | None:
    """Return the name in programs of a dtype of numpy or torch; None where programs have none."""
    return _NAMES.get(str(dtype).removeprefix("torch."))


def dtype_name(dtype: np.dtype | torch.dtype) -> str:
    """Return the name in programs of a dtype of numpy or torch that they have."""
    return _NAMES[str(dtype).removeprefix("torch.")]


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype of the numbers that a value of a dtype holds: f32 for a quantized format."""
    return DTYPES["f32" if find_format(name) else name].torch
