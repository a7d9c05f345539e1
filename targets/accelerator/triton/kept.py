"""Keeps compiled kernels in the user's cache: models share many, and who compiles a model again wants all of them again.

The name of a file is a hash of everything that its kernel depends on: the request, the version of Triton, the variables
that change what Triton does, and the source of what compiles.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import zlib
from dataclasses import asdict
from pathlib import Path

from ....compiler.artifact.user_cache import cache_folder, keep_file
from . import architectures, compile
from .compile import Compiled, Request, triton_module


def recall_kernel(wanted: Request) -> Compiled | None:
    """Return what was kept of a request; None where nothing was, or where the file is damaged."""
    try:
        facts = json.loads(zlib.decompress(_kept_file(wanted).read_bytes()))
        return Compiled(**facts | {"object": base64.b64decode(facts["object"]), "uses": frozenset(facts["uses"])})
    except (OSError, zlib.error, ValueError, TypeError, KeyError):
        return None


def keep_kernel(wanted: Request, made: Compiled) -> None:
    """Keep what was made of a request for the next compile."""
    facts = asdict(made) | {"object": base64.b64encode(made.object).decode(), "uses": sorted(made.uses)}
    keep_file(_kept_file(wanted), zlib.compress(json.dumps(facts).encode()))


def _kept_file(wanted: Request) -> Path:
    settings = sorted(item for item in os.environ.items() if item[0].startswith("TRITON_"))
    digest = hashlib.sha256(repr((wanted, triton_module().__version__, settings)).encode())
    for module in (compile, architectures):
        digest.update(Path(str(module.__file__)).read_bytes())
    return cache_folder() / "objects" / digest.hexdigest()
