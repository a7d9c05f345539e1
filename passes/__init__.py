"""The passes, one a file; a pass is in this table and nowhere else.

graph: raise-norm, raise-rope, lift-moe (leaves stage moe). moe: fuse-router, quantize. Any stage: cleanup.
"""

from ..compiler.pipeline import PassDef
from .cleanup import cleanup
from .fuse_router import fuse_router
from .lift_moe import lift_moe
from .quantize import quantize
from .raise_norm import raise_norm
from .raise_rope import raise_rope

PASSES: dict[str, PassDef] = {p.name: p for p in (cleanup, raise_norm, raise_rope, lift_moe, fuse_router, quantize)}
