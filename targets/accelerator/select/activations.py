"""Which activations are rounded to a quantized format, so that the matrix unit multiplies the codes of the weights.

The choice changes numbers, so that no prediction makes it: `-D activations=` does, and what is rounded is in the program.
By default (`auto`) those that meet weights in FP8 are, on a chip that multiplies it: such checkpoints are made for it
(DeepSeek-V3's own inference rounds activations to E4M3 for each token and 128 values), as are MXFP8's. MXFP4 meets
bf16, which gpt-oss is made for, unless `fp8` (activations in MXFP8) or `fp4` (in MXFP4) is asked for; NVFP4, whose scales
are no powers of two, meets NVFP4 where `fp4` is asked for.

Divergence from the source in f32 with activations in bf16 and rounded, examples/tiny-moe, 224 tokens that it sampled:
experts and attention in fp8_b128 0.0074 and 0.0095, experts in mxfp4 0.0221 and 0.0221 (fp8) or 0.0327 (fp4).
"""

from __future__ import annotations

from ....compiler.errors import MoecError
from ....compiler.formats.table import find_format
from ..chip.chip import Profile
from ..triton.architectures import nearest_architecture

FNUZ = "f8e4m3fnuz"
CHOICES = ("auto", "bf16", "fp8", "fp4")
# format of weights -> of the activations that they meet, and what a profile calls the product
BLOCKS = {"fp8_b128": "fp8_g128", "fp8_g128": "fp8_g128"}
UNITS = {"fp8_g128": ("f8e4m3", FNUZ), **{name: (name,) for name in ("mxfp8", "mxfp4", "nvfp4")}}


def rounded_pairs(profile: Profile, activations: str) -> str:
    """Return the option of the pass quantize-activations for a chip; "" where nothing is rounded.

    MoecError where fp8 or fp4 is asked for and the chip does not multiply it.
    """
    if activations == "bf16":
        return ""
    wanted = {**BLOCKS, "mxfp8": "mxfp8"}
    if activations == "fp4" or (activations == "fp8" and nearest_architecture(profile.arch or "").mixed):
        wanted["mxfp4"] = "mxfp8" if activations == "fp8" else "mxfp4"
    if activations == "fp4":
        wanted["nvfp4"] = "nvfp4"
    there = {weights: rows for weights, rows in wanted.items() if _has_matrix_unit(profile, rows)}
    possible = {"auto": True, "fp8": bool(there), "fp4": "mxfp4" in there}
    if not possible[activations]:
        raise MoecError(
            f"{profile.name} does not multiply activations in {activations}", where=f"-D activations={activations}",
            todo="leave it out: quantized weights are widened to bf16",
        )  # fmt: skip
    return ", ".join(f"{weights}:{rows}" for weights, rows in there.items())


def cache_types(profile: Profile) -> tuple[str, ...]:
    """Return in what caches of attention can lie on a chip: fp8 where it reads E4M3, bf16 everywhere."""
    return ("bf16", "fp8") if _has_matrix_unit(profile, "fp8_g128") else ("bf16",)


def _has_matrix_unit(profile: Profile, rows: str) -> bool:
    """Return whether a chip multiplies codes: of MX formats also an Ascend, whose cube adds under no other scales."""
    compiled = profile.toolchain == "triton" or (profile.toolchain == "triton-ascend" and rows in UNITS[rows])
    return compiled and any(profile.unit(name) for name in UNITS[rows])


def bits_of(profile: Profile, format: str) -> str:
    """Return the dtype as which a chip's matrix unit takes the bits of E4M3 codes; "" where it is E4M3 itself."""
    form = find_format(format)
    coded = form is not None and form.element == "e4m3" and form.scale == "f32"
    return FNUZ if coded and profile.unit("f8e4m3") is None and profile.unit(FNUZ) else ""
