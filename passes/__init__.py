"""The passes, one a file: a file here is a pass, and nowhere else is a list of them.

graph: raise-experts, raise-norm, raise-rope, lift-moe (leaves stage moe).
moe: fuse-router, fuse-dispatch, fuse-shared-experts, absorb-mla, fuse-attention, fuse-norm, fold-weights, keep-codes, quantize,
    round-weights.
kernel: quantize-activations, store-caches, round-caches.
Any stage: fold-constants, share-expressions, drop-dead, and cleanup, which is these three.
"""

from pathlib import Path
from pkgutil import iter_modules

from ..compiler.rewrite.declare import PassDef, read_pass

_FOLDER = Path(__file__).parent

PASSES: dict[str, PassDef] = {
    found.name: found
    for found in (
        read_pass(f"{__name__}.{m.name}", _FOLDER / (f"{m.name}/__init__.py" if m.ispkg else f"{m.name}.py"))
        for m in iter_modules([str(_FOLDER)])
    )
}
