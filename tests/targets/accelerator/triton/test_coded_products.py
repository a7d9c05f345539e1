"""Products of codes use the chip's instructions for them: fp8 ones, and those that take scales."""

import pytest
from chips_for_tests import needs_triton
from moec.targets.accelerator.chip.profile import find_profile
from moec.targets.accelerator.kernels.choices import Tile
from moec.targets.accelerator.kernels.dense import Linear, linear_kernel
from moec.targets.accelerator.select.activations import bits_of
from moec.targets.accelerator.tile.machine import layout_of
from moec.targets.accelerator.tile.packing import Packing
from moec.targets.accelerator.triton.compile import compile_request, compile_request_of


@needs_triton
@pytest.mark.parametrize(
    ("chip", "given", "form", "instruction"),
    [
        pytest.param(*case, marks=pytest.mark.long if i else ())
        for i, case in enumerate(
            (
                ("nvidia-h200", "fp8_g128", "fp8_b128", "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3"),
                ("nvidia-b200", "fp8_g128", "fp8_b128", "tcgen05.mma.cta_group::1.kind::f8f6f4"),
                ("nvidia-rtx5090", "fp8_g128", "fp8_b128", "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"),
                ("amd-mi355x", "fp8_g128", "fp8_b128", "v_mfma_f32_32x32x64_f8f6f4"),
                ("amd-mi300x", "fp8_g128", "fp8_b128", "v_mfma_f32_32x32x16_fp8_fp8"),
                ("nvidia-b200", "mxfp8", "mxfp8", "tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale"),
                ("nvidia-b200", "mxfp8", "mxfp4", "tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale"),
                ("nvidia-b200", "mxfp4", "mxfp4", "tcgen05.mma.cta_group::1.kind::mxf4.block_scale"),
                (
                    "nvidia-rtx5090",
                    "mxfp8",
                    "mxfp8",
                    "kind::mxf8f6f4.block_scale.scale_vec::1X.f32.e4m3.e4m3.f32.ue8m0",
                ),
                ("nvidia-rtx5090", "mxfp4", "mxfp4", "block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0"),
                ("nvidia-b200", "nvfp4", "nvfp4", "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.block16"),
                (
                    "nvidia-rtx5090",
                    "nvfp4",
                    "nvfp4",
                    "kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3",
                ),
                ("amd-mi355x", "mxfp8", "mxfp4", "v_mfma_scale_f32_32x32x64_f8f6f4"),
                ("amd-mi355x", "mxfp4", "mxfp4", "v_mfma_scale_f32_32x32x64_f8f6f4"),
            )
        )
    ],
)
def test_the_matrix_unit_multiplies_codes(chip, given, form, instruction):
    profile = find_profile(chip, {})
    p = Linear(
        256, 1024, Packing(form, 256, 1024, pairs=form in ("mxfp4", "nvfp4"), bits=bits_of(profile, form)), dtype=given
    )
    program = linear_kernel(p, Tile(128, 128, 128), layout_of(profile))
    made = compile_request(compile_request_of(program, profile.arch, 8))
    assert instruction in made.assembly and made.spills == 0
