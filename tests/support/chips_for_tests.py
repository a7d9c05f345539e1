"""Chips of every family for tests of tile programs: what a layout and a chip are, and how tensors are made and compared."""

import sys
from math import prod

import ml_dtypes
import numpy as np
import pytest
import torch
from moec.compiler.ir.dtypes import DTYPES
from moec.targets.accelerator.chip.profile import find_profile
from moec.targets.accelerator.tile.builder import Layout
from moec.targets.accelerator.tile.expr import evaluate_expr
from moec.targets.accelerator.tile.machine import chip_of, layout_of
from moec.targets.accelerator.tile.serialize import program_from_json, program_to_json
from moec.targets.accelerator.tile.simulate import Chip, simulate_program
from moec.targets.accelerator.tile.tiles import DEVICE, Dot, memory_footprint, round_up, walk_statements

KB = 1 << 10

# elsewhere it cannot be installed; where it can, a missing one is a failure
needs_triton = pytest.mark.skipif(sys.platform != "linux", reason="Triton comes for Linux only")


def _chip(layout, capacity, align, *paths):
    """Return a chip whose tiles also come from and leave to device memory by the ways that are named with it."""
    return layout, Chip({**capacity, DEVICE: 1 << 40}, align, frozenset(paths), layout.operands)


def _gpu(shared):
    layout = Layout(("shared",), ("shared",), "registers", "registers")
    return _chip(
        layout, {"shared": shared, "registers": 256 * KB}, {"shared": 16},
        (DEVICE, "shared"), (DEVICE, "registers"), ("registers", DEVICE), ("registers", "shared"),
    )  # fmt: skip


CHIPS = {
    "hopper": _gpu(232448),
    "amd": _gpu(64 * KB),
    "blackwell": _chip(
        Layout(("shared",), ("shared",), "tensor", "registers", leave=("registers",)),
        {"shared": 232448, "tensor": 256 * KB, "registers": 256 * KB}, {"shared": 16},
        (DEVICE, "shared"), (DEVICE, "registers"), ("registers", DEVICE), ("registers", "shared"),
        ("tensor", "registers"),
    ),
    "ascend-910b": _chip(
        Layout(("l1", "l0a"), ("l1", "l0b"), "l0c", "ub", leave=(DEVICE, "ub"), enter=(DEVICE,)),
        {"l1": 512 * KB, "l0a": 64 * KB, "l0b": 64 * KB, "l0c": 128 * KB, "ub": 192 * KB},
        {"ub": 32, "l1": 32, "l0a": 512, "l0b": 512, "l0c": 64},
        (DEVICE, "l1"), ("l1", "l0a"), ("l1", "l0b"), ("l0c", DEVICE), (DEVICE, "ub"), ("ub", DEVICE),
    ),
    "ascend-950": _chip(
        Layout(("l1", "l0a"), ("l1", "l0b"), "l0c", "ub", leave=("ub",)),
        {"l1": 512 * KB, "l0a": 64 * KB, "l0b": 64 * KB, "l0c": 256 * KB, "ub": 248 * KB},
        {"ub": 32, "l1": 32, "l0a": 512, "l0b": 512, "l0c": 64},
        (DEVICE, "l1"), ("l1", "l0a"), ("l1", "l0b"), ("l0c", "ub"), ("ub", "l1"), ("l1", "ub"), (DEVICE, "ub"),
        ("ub", DEVICE), ("l0c", DEVICE),
    ),
    "cambricon": _chip(
        Layout(("nram",), ("wram",), "nram", "nram"),
        {"nram": 512 * KB, "wram": 512 * KB}, {"nram": 128, "wram": 128},
        (DEVICE, "nram"), (DEVICE, "wram"), ("nram", "wram"), ("nram", DEVICE),
    ),
}  # fmt: skip


def run(program, chip, scalars, **tensors):
    """Simulate a program, read back from its JSON; return its outputs, which are made here where none are given."""
    program = program_from_json(program_to_json(program))
    given = {}
    for a in program.arguments:
        shape = tuple(int(evaluate_expr(n, scalars)) for n in a.shape)
        value = tensors.pop(a.name, None)
        assert value is not None or a.role in ("output", "scratch"), a.name
        given[a.name] = (
            np.full(shape, 77, DTYPES[a.dtype].numpy) if value is None else cast(value, a.dtype).reshape(shape)
        )
    assert not tensors, f"{program.name} has no {sorted(tensors)}"
    peak = simulate_program(program, given, scalars, chip)
    wanted = memory_footprint(program, chip.align)
    assert all(peak[memory] <= wanted[memory] for memory in peak)
    return {a.name: given[a.name] for a in program.arguments if a.role == "output"}


def cast(value, dtype):
    """Return a torch tensor or array as an array of a dtype of the tile language."""
    if isinstance(value, torch.Tensor):
        value = value.detach().to(torch.float32 if value.is_floating_point() else value.dtype).numpy()
    value = np.asarray(value)
    return np.array(value if value.dtype == DTYPES[dtype].numpy else value.astype(DTYPES[dtype].numpy))


def bf16(value):
    """Return numbers rounded to bf16, as f32 in torch: what a kernel with tensors of bf16 gets."""
    return value.to(torch.bfloat16).to(torch.float32)


def close(found, wanted, tolerance=2e-5):
    """Assert that a kernel's result is the reference's but for a part of its largest number."""
    found = torch.tensor(np.asarray(found, np.float32)).reshape(wanted.shape)
    assert torch.isfinite(found).all()
    worst = (found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6) if wanted.numel() else 0
    assert worst <= tolerance, f"off by {float(worst):.2e} of the largest number"


def weight(packing, rng, scale=0.1):
    """Return the parts of a random weight under their names and the same numbers in f32."""
    f = packing.quantized
    lead = (packing.experts,) if packing.experts else ()
    shape = (*lead, packing.rows, packing.columns)
    if f is None:
        numbers = (rng.standard_normal(shape) * scale).astype(DTYPES[packing.element].numpy)
        return packing.pack(numbers), torch.tensor(numbers.astype(np.float32))
    groups = -(-packing.columns // f.group)
    spread = lambda a: np.repeat(a, f.group, -1)[..., : packing.columns].astype(np.float32)  # noqa: E731
    if f.element == "int":
        low, high = (0, 2**f.bits) if f.zeros else (-(2 ** (f.bits - 1)), 2 ** (f.bits - 1))
        codes = rng.integers(low, high, shape).astype(np.uint8 if f.zeros else np.int8)
        scales = (rng.random((*shape[:-1], groups)) * 0.02).astype(np.float32)
        zeros = rng.integers(0, high, scales.shape).astype(np.uint8) if f.zeros else None
        parts = packing.pack(codes=codes, scales=scales, **({} if zeros is None else {"zeros": zeros}))
        numbers = (codes.astype(np.float32) - (0 if zeros is None else spread(zeros))) * spread(scales)
    elif f.element == "e2m1":
        codes = rng.integers(0, 16, shape).astype(np.uint8)
        table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
        scales = rng.integers(121, 125, (*shape[:-1], groups)).astype(np.uint8)
        parts = packing.pack(codes=codes, scales=scales)
        numbers = np.concatenate([table, -table])[codes] * spread(2.0 ** (scales.astype(np.float32) - 127))
    else:
        codes = rng.standard_normal(shape).astype(ml_dtypes.float8_e4m3fn)
        scales = (rng.random((*lead, -(-packing.rows // f.rows), groups)) * scale).astype(np.float32)
        parts = packing.pack(codes=codes, scales=scales)
        numbers = codes.astype(np.float32) * spread(np.repeat(scales, f.rows, -2)[..., : packing.rows, :])
    return parts, torch.tensor(numbers)


def named(parts, name):
    """Return a weight's parts under the names that a program declares them by."""
    return {f"{name}_{part}" if part else name: value for part, value in parts.items()}


UNKNOWN = {  # figures that nobody has published, as a user would give them
    "cambricon-mlu590": {
        "cores": "48", "memory.gm.bandwidth": "2.0TB/s", "unit.bf16.peak": "314TFLOPS", "unit.f16.peak": "314TFLOPS",
    },
}  # fmt: skip


def profile_of(name):
    return find_profile(name, UNKNOWN.get(name, {}))


def check_fits(choice, profile):
    """Check a choice against the profile, from its buffers and nothing else."""
    chip = chip_of(profile, layout_of(profile, choice.tile.m))
    for memory, used in choice.use.items():
        align = chip.align.get(memory, 1)
        buffers = [b for b in choice.program.buffers.values() if b.memory == memory]
        assert used <= chip.capacity[memory]
        assert used % align == 0
        # no more than all of them at once, no less than the largest
        sizes = [round_up(b.copies * prod(b.shape) * DTYPES[b.dtype].bits // 8, align) for b in buffers]
        assert max(sizes) <= used <= sum(sizes)
    for dot in (s for s in walk_statements(choice.program.body) if isinstance(s, Dot)):
        a, b, acc = (choice.program.buffers[n] for n in (dot.a, dot.b, dot.acc))
        assert (a.memory, b.memory, acc.memory) == chip.operands
        depths = [unit.k for unit in profile.units if unit.dtype == a.dtype]  # of its shapes
        m, n = acc.shape
        columns, depth = b.shape if dot.transpose else b.shape[::-1]
        assert (a.shape, columns) == ((m, depth), n)
        assert depth % min(depths, default=1) == 0
        if rows := profile.rule("fractal_rows"):
            assert m % rows == n % rows == 0
            assert a.shape[1] * DTYPES[a.dtype].bits // 8 % profile.rule("fractal_bytes") == 0
