"""A stand-in for the driver of a GPU: it runs kernels in the simulator, from the addresses that a launch gives.

`install` puts it in the place of NVIDIA's or AMD's driver, and of what torch does to capture a graph: operators of torch
are recorded and run again when a graph is replayed, kernels are run with what their nodes were last told.
"""

import ctypes
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch
from moec.compiler.ir.dtypes import DTYPES
from moec.targets.accelerator.run import driver, launchers
from moec.targets.accelerator.tile.expr import evaluate_expr
from moec.targets.accelerator.tile.simulate import simulate_program
from torch.utils._python_dispatch import TorchDispatchMode

CAPTURED = 1 << 20  # nodes have numbers from here


class FakeLibrary:
    """The functions of a driver, those of both vendors. `calls` are their names in order."""

    def __init__(self, kernels):
        self.kernels, self.by_name = kernels, {launch.name: launch for launch in kernels.launches}
        self.modules, self.recording, self.nodes, self.calls = [], None, {}, []

    def __getattr__(self, name):
        own = getattr(type(self), "_" + name.removeprefix("cu").removeprefix("hip"), None)
        if own is None:
            raise AttributeError(name)

        def call(*arguments):
            self.calls.append(name)
            return own(self, *arguments) or 0

        return call

    def _ModuleLoadData(self, module, image):
        self.modules.append(image.value.decode())
        module._obj.value = len(self.modules)

    def _ModuleGetFunction(self, function, module, name):
        assert self.by_name[self.modules[module.value - 1]].program.name == name.decode()
        function._obj.value = module.value

    def _FuncSetAttribute(self, function, attribute, value):
        assert attribute == 8 and value > 48 << 10

    def _LaunchKernel(self, function, *given):
        (points, *others), (threads, *more), shared, stream, addresses, extra = given[:3], given[3:6], *given[6:]
        assert others == [1, 1] and more == [1, 1] and stream.value == 7 and extra is None and shared >= 0
        launch = self.by_name[self.modules[function.value - 1]]
        self.lanes = threads // launch.warps
        run = self._read(launch, points, addresses)
        if self.recording is None:
            run()
        else:
            number = CAPTURED + len(self.nodes)
            self.nodes[number] = (launch, run)
            self.recording.append(number)

    _ModuleLaunchKernel = _LaunchKernel

    def _StreamGetCaptureInfo_v2(self, stream, status, number, graph, nodes, count):
        self.last = (ctypes.c_void_p * 1)(self.recording[-1])
        nodes._obj.contents = ctypes.c_void_p.from_buffer(self.last)
        count._obj.value = 1

    def _GraphExecKernelNodeSetParams(self, graph, node, parameters):
        p, (launch, _) = parameters._obj, self.nodes[node.value]
        count = len(launch.program.arguments) + len(launch.program.scalars) + 2
        addresses = (ctypes.c_void_p * count).from_address(p.arguments)
        assert graph.value == 42 and self.modules[p.function - 1] == launch.name
        self.nodes[node.value] = (launch, self._read(launch, p.grid[0], addresses))

    def _read(self, launch, points, addresses):
        """Return a function that runs a kernel on what a launch was given."""
        program = launch.program
        count = len(program.arguments)
        assert len(addresses) == count + len(program.scalars) + 2
        pointers = [ctypes.c_uint64.from_address(a).value for a in addresses[:count]]
        numbers = [ctypes.c_int32.from_address(a).value for a in addresses[count:-2]]
        assert [ctypes.c_uint64.from_address(a).value for a in addresses[-2:]] == [0, 0]
        scalars = dict(zip(program.scalars, numbers, strict=True))
        assert points == np.prod([int(evaluate_expr(n, scalars)) for _, n in program.grid])

        def run():
            arrays = {a.name: memory(a, at, scalars) for a, at in zip(program.arguments, pointers, strict=True)}
            simulate_program(program, arrays, scalars, self.kernels.chip_for(launch))

        return run


def memory(a, address, scalars):
    """Return the memory of an argument as an array."""
    shape, kind = tuple(int(evaluate_expr(n, scalars)) for n in a.shape), np.dtype(DTYPES[a.dtype].numpy)
    size = int(np.prod(shape)) * kind.itemsize
    if not size:
        return np.zeros(shape, kind)
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8).view(kind).reshape(shape)


class FakeGraph:
    """What torch.cuda.CUDAGraph is: the recorded work, done again by `replay`."""

    def __init__(self, library):
        self.library, self.work, self.replays = library, [], 0

    def instantiate(self):
        pass

    def raw_cuda_graph_exec(self):
        return 42

    def replay(self):
        self.replays += 1
        for item in self.work:
            if isinstance(item, int):
                self.library.nodes[item][1]()
                continue
            operator, arguments, keywords, result = item
            again = operator(*arguments, **keywords)
            if isinstance(result, torch.Tensor):
                result.copy_(again)


class Recording(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.graph.work.append((func, args, kwargs or {}, result))
        return result


def install(monkeypatch, kernels, hip=None):
    """Put the driver in place; return its library and the graphs that are captured."""
    library, graphs = FakeLibrary(kernels), []

    def new_graph(keep_graph):
        assert keep_graph
        graphs.append(FakeGraph(library))
        return graphs[-1]

    @contextmanager
    def capture(graph):
        library.recording = graph.work
        try:
            with Recording(graph):
                yield
        finally:
            library.recording = None

    monkeypatch.setattr(driver, "open_library", lambda _: library)
    monkeypatch.setattr(driver, "make_context", lambda: None)
    monkeypatch.setattr(launchers.Compiled, "device", torch.device("cpu"))
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", new_graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return library, graphs
