"""A whole model in every stored format that kernels read, in the simulator, against the numbers that its codes stand for."""

import re

import moec
import numpy as np
import pytest
import torch
from moec.compiler.formats.table import NAMED
from moec.compiler.runtime.compare import token_differences
from moec.targets.accelerator.tile.packing import reads_format
from places import TINY
from tiny_models import meaning

CHIPS = ("nvidia-h200", "amd-mi355x", "ascend-950dt", "cambricon-mlu370")
SPECS = (  # every stored format that kernels read, integers in several groups, in experts and in linears
    "experts=int4,attention=uint8_g64,head=int4_g128",
    "int8",
    "experts=uint4_g16,attention=int8_g16,head=uint4_g256",
    "experts=mxfp4,attention=nvfp4,head=fp8_b128",
    "experts=nvfp4,attention=fp8_g128,head=mxfp4",
    "experts=mxfp8,attention=mxfp4,head=mxfp8",
    "experts=fp8_b128,attention=mxfp4,head=nvfp4",
)


@pytest.mark.long
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("spec", SPECS)
def test_stored_formats(spec, chip, tmp_path):
    """Against the program with the numbers that the codes stand for: a prefill and a cached step.

    It is the one before lowering, but for fp8: with its weights activations are rounded.
    """
    stage, tolerance = ("kernel", 0.03) if "fp8" in spec else ("moe", 0.01)
    options = {"kernels": "source", "buckets": "1,16"}
    artifact = moec.compile(TINY, target=chip, out=tmp_path / "a", quantize=spec, options=options)
    session, run = artifact.session(threads=1), meaning(TINY, spec, chip, stage)
    ids = np.arange(50, 61)[None]
    mask, positions = np.ones((1, 12), np.int64), np.arange(12)[None]
    found, states = session.step(ids, mask[:, :11], positions[:, :11])
    step, _ = session.step(np.array([[61]]), mask, positions[:, 11:], states)
    empty = [torch.zeros([{"B": 1, "P": 0}.get(n, n) for n in e["shape"]]) for e in artifact.manifest["states"]]
    whole = [torch.from_numpy(a) for a in (np.append(ids, [[61]], 1), mask, positions)]
    wanted = run([*whole, *empty])[0].numpy()
    off = token_differences(np.concatenate([found, step], 1), wanted)
    assert np.median(off) <= tolerance and off[-1] <= 2 * tolerance


def test_every_named_format_is_among_them():
    assert not {f.name for f in NAMED if reads_format(f)} - set(re.split("[=,]", ",".join(SPECS)))
