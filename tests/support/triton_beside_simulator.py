"""A pytest plugin: whatever a test simulates on a GPU is printed for Triton and interpreted too, and must come out equal.

Each kernel is tried as often as it is simulated, up to TRIES times. Cases of chips that Triton does not print for are left
out, and with --first-cases all but the first case of each test. Loaded with -p by test_source.py of tests/targets/accelerator/triton.
"""

from collections import Counter

import numpy as np
import torch
from moec.compiler.ir.dtypes import DTYPES, dtype_name
from moec.targets.accelerator.run.interpreter import mend_interpreter
from moec.targets.accelerator.run.launch import GpuKernel
from moec.targets.accelerator.tile import simulate as simulator

mend_interpreter()
TRIES, KERNELS = 3, 30  # most of a kernel, fewest kernels
UNITS = (("shared", "shared", "registers"),)
simulate = simulator.simulate_program
tried: Counter[str] = Counter()


def pytest_addoption(parser):
    """Add `--first-cases`."""
    parser.addoption("--first-cases", action="store_true", help="only the first case of each test")


def pytest_collection_modifyitems(config, items):
    """Leave out cases that would try nothing, or little that others do not."""
    from chips_for_tests import CHIPS  # it takes the name of what simulates, which has been replaced by now

    kept, begun = [], set()
    for item in items:
        named = getattr(item, "callspec", None)
        name = named and next((v for v in named.params.values() if isinstance(v, str) and v in CHIPS), None)
        function = item.nodeid.partition("[")[0]
        if (name and CHIPS[name][1].operands not in UNITS) or (config.option.first_cases and function in begun):
            continue
        begun.add(function)
        kept.append(item)
    items[:] = kept


def pytest_sessionfinish(session):
    """Let a run fail in which few kernels were tried, as where tests simulate by another name."""
    if len(tried) < KERNELS:
        print(f"only {len(tried)} kernels were interpreted: {', '.join(sorted(tried))}")
        session.exitstatus = 1


def to_torch(array):
    """Return an array of any dtype of the tile language as a tensor of its own."""
    made = torch.empty(array.shape, dtype=DTYPES[dtype_name(array.dtype)].torch)
    if array.size:
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy()
        made.reshape(-1).view(torch.uint8).copy_(torch.from_numpy(raw))
    return made


def both(program, tensors, scalars, chip):
    """Simulate, and interpret on copies; compare every tensor."""
    if chip.operands not in UNITS or tried[program.name] >= TRIES:
        return simulate(program, tensors, scalars, chip)
    tried[program.name] += 1
    copies = {name: to_torch(array) for name, array in tensors.items()}
    peak = simulate(program, tensors, scalars, chip)
    GpuKernel(program)(copies, scalars)
    for a in program.arguments:
        found, wanted = copies[a.name].float().numpy(), tensors[a.name].astype(np.float32)
        share = 2e-2 if a.dtype in ("bf16", "f16") else 1e-4
        size = np.abs(wanted[np.isfinite(wanted)]).max(initial=0.0)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=share * size, err_msg=f"{program.name}: {a.name}")
    return peak


simulator.simulate_program = both
