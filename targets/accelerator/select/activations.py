"""Which activations are rounded to a quantized format, so that the matrix unit multiplies the codes of the weights.

The choice changes numbers, so that no prediction makes it: `-D activations=` does, and what is rounded is in the program.
By default (`auto`) those that meet weights in FP8 are, on a chip that multiplies it: such checkpoints are made for it
(DeepSeek-V3's own inference rounds activations to E4M3 for each token and 128 values). Others keep bf16.
"""

from __future__ import annotations

from ....compiler.errors import MoecError
from ..chip.chip import Profile

FP8 = {"fp8_b128": "fp8_g128", "fp8_g128": "fp8_g128"}  # format of weights -> of the activations that they meet


def rounded_pairs(profile: Profile, activations: str) -> str:
    """Return the option of the pass quantize-activations for a chip; "" where nothing is rounded.

    MoecError where fp8 is asked for and the chip does not multiply it.
    """
    if activations == "bf16":
        return ""
    if profile.toolchain != "triton" or profile.unit("f8e4m3") is None:
        if activations == "fp8":
            raise MoecError(
                f"{profile.name} does not multiply activations in fp8", where="-D activations=fp8",
                todo="leave it out: quantized weights are widened to bf16",
            )  # fmt: skip
        return ""
    return ", ".join(f"{weights}:{rows}" for weights, rows in FP8.items())
