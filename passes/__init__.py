"""The passes, one a file; a pass is in this table and nowhere else.

graph: raise-norm, raise-rope, lift-moe (leaves stage moe).
moe: fuse-router, fuse-dispatch, fuse-shared-experts, absorb-mla, fuse-attention, fuse-norm, keep-codes, quantize,
    round-weights.
Any stage: fold-constants, share-expressions, drop-dead, and cleanup, which is these three.
"""

from ..compiler.rewrite.pipeline import PassDef
from .absorb_mla import absorb_mla
from .cleanup import cleanup
from .drop_dead import drop_dead
from .fold_constants import fold_constants
from .fuse_attention import fuse_attention
from .fuse_dispatch import fuse_dispatch
from .fuse_norm import fuse_norm
from .fuse_router import fuse_router
from .fuse_shared_experts import fuse_shared_experts
from .keep_codes import keep_codes
from .lift_moe import lift_moe
from .quantize import quantize
from .raise_norm import raise_norm
from .raise_rope import raise_rope
from .round_weights import round_weights
from .share_expressions import share_expressions

PASSES: dict[str, PassDef] = {
    p.name: p
    for p in (
        cleanup, fold_constants, share_expressions, drop_dead, raise_norm, raise_rope, lift_moe,
        fuse_router, fuse_dispatch, fuse_shared_experts, absorb_mla, fuse_attention, fuse_norm, keep_codes, quantize,
        round_weights,
    )
}  # fmt: skip
