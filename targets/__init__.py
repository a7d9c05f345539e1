"""The targets, by name. A target is a folder here and one line in `TARGETS`."""

from .cpu import TARGET as CPU
from .target import Target

TARGETS: dict[str, Target] = {CPU.name: CPU}

__all__ = ["TARGETS", "Target"]
