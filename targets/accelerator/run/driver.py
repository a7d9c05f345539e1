"""Launches compiled kernels through the driver of the GPU's vendor: no compiler is needed, only torch for the memory.

What Triton compiles takes the tensors' addresses, the scalars as i32, and two addresses of scratch memory that moec's
kernels do not use. The grid has one axis.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ....compiler.errors import MoecError
from ..triton.architectures import architecture_of

MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
DEFAULT_SHARED = 48 << 10  # bytes that a kernel may have without asking, on NVIDIA


@dataclass(frozen=True)
class Driver:
    """A vendor's driver: its library, and what its functions are called.

    `prefix` begins the names of those that both vendors have. `attribute` allows a kernel more shared memory where it has
    to be asked for; `node` and `update` give a captured kernel and change what it is launched with (both may be empty).
    """

    name: str
    library: str
    tool: str
    prefix: str
    explain: str
    launch: str
    attribute: str = ""
    node: str = ""
    update: str = ""

    def call(self, name: str, *arguments: object) -> None:
        """Call a function of the driver; MoecError with what it says where it fails."""
        library = open_library(self)
        code = getattr(library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            getattr(library, self.explain)(code, ctypes.byref(text))
            raise MoecError(f"{name} of {self.name}: {(text.value or b'?').decode()} ({code})", exit_code=1)


NVIDIA = Driver(
    "NVIDIA's driver", "libcuda.so.1", "nvidia-smi", "cu", "cuGetErrorString", "cuLaunchKernel", "cuFuncSetAttribute",
    "cuStreamGetCaptureInfo_v2", "cuGraphExecKernelNodeSetParams",
)  # fmt: skip
AMD = Driver(
    "AMD's driver", "libamdhip64.so", "rocm-smi", "hip", "hipDrvGetErrorString", "hipModuleLaunchKernel"
)  # fmt: skip


def driver_of_torch() -> Driver:
    """Return the driver of the GPUs that torch is built for."""
    return AMD if torch.version.hip else NVIDIA


@cache
def open_library(driver: Driver) -> ctypes.CDLL:
    """Return a driver's library, the one that torch has loaded if it has; MoecError where there is none."""
    try:
        return ctypes.CDLL(_loaded_library(driver.library) or driver.library)
    except OSError as error:
        raise MoecError(f"{driver.name} is not there", todo=f"run it where {driver.tool} works", exit_code=1) from error


def _loaded_library(library: str) -> str | None:
    """Return the path of a library that this process has loaded: another copy would not know torch's memory."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = (line.split(maxsplit=5)[-1] for line in lines if "/" in line)
    return next((path for path in paths if Path(path).name.startswith(library)), None)


class _NodeParameters(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS: what a kernel of a graph is launched with."""

    _fields_ = (
        ("function", ctypes.c_void_p), ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint), ("arguments", ctypes.c_void_p), ("extra", ctypes.c_void_p),
    )  # fmt: skip


class _Arguments:
    """The arguments of a launch as a driver takes them: addresses of the values, which have to live until the call."""

    def __init__(self, tensors: Sequence[torch.Tensor], scalars: Sequence[int]) -> None:
        self._values = [
            *(ctypes.c_uint64(t.data_ptr()) for t in tensors), *(ctypes.c_int32(n) for n in scalars),
            ctypes.c_uint64(0), ctypes.c_uint64(0),
        ]  # fmt: skip
        self.addresses = (ctypes.c_void_p * len(self._values))(*(ctypes.addressof(v) for v in self._values))


class LoadedKernel:
    """A kernel that the driver has loaded. `name` is its symbol, `threads` those of a block, `shared` its shared memory."""

    def __init__(self, image: bytes, name: str, threads: int, shared: int) -> None:
        """Load an object; MoecError for one that is not for this GPU."""
        make_context()
        self._driver = driver_of_torch()
        self._threads, self._shared = threads, shared
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("ModuleLoadData", ctypes.byref(self._module), ctypes.c_char_p(image))
        self._call("ModuleGetFunction", ctypes.byref(self._function), self._module, name.encode())
        if self._driver.attribute and shared > DEFAULT_SHARED:
            self._driver.call(self._driver.attribute, self._function, MAX_DYNAMIC_SHARED, shared)

    def _call(self, name: str, *arguments: object) -> None:
        self._driver.call(self._driver.prefix + name, *arguments)

    def launch(self, points: int, tensors: Sequence[torch.Tensor], scalars: Sequence[int]) -> None:
        """Run so many points on torch's current stream, or capture that where the stream is being captured."""
        given = _Arguments(tensors, scalars)
        self._driver.call(
            self._driver.launch, self._function, points, 1, 1, self._threads, 1, 1, self._shared, _current_stream(),
            given.addresses, None,
        )  # fmt: skip

    def update(
        self, graph: int, node: int, points: int, tensors: Sequence[torch.Tensor], scalars: Sequence[int]
    ) -> None:
        """Change what a captured launch of this kernel runs with, in an instantiated graph."""
        given = _Arguments(tensors, scalars)
        parameters = _NodeParameters(
            self._function, (points, 1, 1), (self._threads, 1, 1), self._shared, ctypes.addressof(given.addresses), None
        )
        self._driver.call(self._driver.update, ctypes.c_void_p(graph), ctypes.c_void_p(node), ctypes.byref(parameters))


def captured_node() -> int:
    """Return the node of what was captured last on torch's current stream."""
    driver = driver_of_torch()
    status, number, graph = ctypes.c_int(), ctypes.c_uint64(), ctypes.c_void_p()
    nodes, count = ctypes.POINTER(ctypes.c_void_p)(), ctypes.c_size_t()
    places = (ctypes.byref(place) for place in (status, number, graph, nodes, count))
    driver.call(driver.node, _current_stream(), *places)
    if count.value != 1:
        raise MoecError(f"a captured kernel has {count.value} nodes", exit_code=1)
    return int(nodes[0] or 0)


def _current_stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def make_context() -> None:
    """Make torch's context, into which the driver loads."""
    torch.zeros(1, device="cuda")


def gpu_architecture() -> str:
    """Return the GPU's architecture as kernels.json names it, such as sm_90 or gfx942; MoecError where there is no GPU."""
    from .launch import check_gpu

    check_gpu()
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(0).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def is_for(objects: Mapping[str, object], arch: str) -> bool:
    """Return whether there is a compiled object for an architecture."""
    entry = objects.get(arch)
    return isinstance(entry, Mapping) and str(entry.get("file", "")).endswith(architecture_of(arch).suffix)
