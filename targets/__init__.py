"""The targets, by name. A target is a folder here and one line in `TARGETS`."""

from .cpu import TARGET as CPU
from .target import Target

TARGETS: dict[str, Target] = {CPU.name: CPU}


def declare_kernel_ops() -> None:
    """Import every target's own ops into the table of ops, so that programs of stage kernel can be read."""
    from .accelerator import ops as accelerator_ops  # noqa: F401
    from .cpu import ops, ops_quantized  # noqa: F401


__all__ = ["TARGETS", "Target", "declare_kernel_ops"]
