"""moec: an ahead-of-time compiler for Mixture-of-Experts language models.

This file is a thin face: the names below are imported from where they live on first use, so that
`import moec` stays quick (torch, transformers and onnxruntime are imported where they are needed).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .compiler.version import __version__

if TYPE_CHECKING:
    from . import targets
    from .compiler.cli.report import inspect
    from .compiler.driver import compile, load, opt, parse, plan, register
    from .compiler.errors import MoecError
    from .compiler.errors.progress import watch_progress
    from .compiler.runtime.artifact import Artifact
    from .compiler.runtime.measure import verify

__all__ = [
    "Artifact", "MoecError", "__version__", "compile", "inspect", "load", "opt", "parse", "plan", "register", "targets", "verify",
    "watch_progress",
]  # fmt: skip

_HOMES = {
    "compile": ".compiler.driver",
    "load": ".compiler.driver",
    "inspect": ".compiler.cli.report",
    "opt": ".compiler.driver",
    "parse": ".compiler.driver",
    "register": ".compiler.driver",
    "plan": ".compiler.driver",
    "verify": ".compiler.runtime.measure",
    "Artifact": ".compiler.runtime.artifact",
    "MoecError": ".compiler.errors",
    "watch_progress": ".compiler.errors.progress",
}


def __getattr__(name: str) -> Any:
    if name == "targets":
        return import_module(".targets", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module 'moec' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
