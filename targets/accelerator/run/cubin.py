"""Launches compiled kernels (cubins) through NVIDIA's driver: no compiler is needed, only torch for the memory.

What Triton compiles takes the tensors' addresses, the scalars as i32, and two addresses of scratch memory that moec's
kernels do not use. The grid has one axis.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache

import torch

from ....compiler.errors import MoecError

MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
DEFAULT_SHARED = 48 << 10  # bytes that a kernel may have without asking
LANES = 32


@cache
def driver() -> ctypes.CDLL:
    """Return NVIDIA's driver library; MoecError where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise MoecError("NVIDIA's driver is not there", todo="run it where nvidia-smi works", exit_code=1) from error


def _call(name: str, *arguments: object) -> None:
    code = getattr(driver(), name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(code, ctypes.byref(text))
        raise MoecError(f"{name} of NVIDIA's driver: {(text.value or b'?').decode()} ({code})", exit_code=1)


class Cubin:
    """A kernel that the driver has loaded. `name` is its symbol, `shared` its bytes of shared memory."""

    def __init__(self, image: bytes, name: str, warps: int, shared: int) -> None:
        """Load an object; MoecError for one that is not for this GPU."""
        torch.cuda.current_stream()  # the driver loads into torch's context, which this makes
        torch.zeros(1, device="cuda")
        self._warps, self._shared = warps, shared
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        _call("cuModuleLoadData", ctypes.byref(self._module), ctypes.c_char_p(image))
        _call("cuModuleGetFunction", ctypes.byref(self._function), self._module, name.encode())
        if shared > DEFAULT_SHARED:
            _call("cuFuncSetAttribute", self._function, MAX_DYNAMIC_SHARED, shared)

    def launch(self, points: int, tensors: Sequence[torch.Tensor], scalars: Sequence[int]) -> None:
        """Run so many points on torch's current stream."""
        values = [
            *(ctypes.c_uint64(t.data_ptr()) for t in tensors), *(ctypes.c_int32(n) for n in scalars),
            ctypes.c_uint64(0), ctypes.c_uint64(0),
        ]  # fmt: skip
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        _call(
            "cuLaunchKernel", self._function, points, 1, 1, LANES * self._warps, 1, 1, self._shared, stream, addresses,
            None,
        )  # fmt: skip


def architecture() -> str:
    """Return the GPU's architecture as kernels.json names it, such as sm_90; MoecError where there is no GPU."""
    from .launch import check_gpu

    check_gpu()
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def is_for(objects: Mapping[str, object], arch: str) -> bool:
    """Return whether there is a compiled object for an architecture."""
    entry = objects.get(arch)
    return isinstance(entry, Mapping) and str(entry.get("file", "")).endswith(".cubin")
