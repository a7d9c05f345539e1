"""While a model is imported, code of transformers that cannot be traced gives way to code that says the same in ops.

The tables hold functions of modelling files by name and methods by class; see recurrent.py, expert_modules.py, angles.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import angles, block_indexers, expert_modules, indexer, recurrent

FUNCTIONS = {**recurrent.FUNCTIONS}
LOCAL_FUNCTIONS = {**angles.LOCAL_FUNCTIONS}  # by modelling file too: others have functions of the same name
METHODS = {**recurrent.METHODS, **expert_modules.METHODS, **angles.METHODS, **block_indexers.METHODS}
CACHES = ("MiniMaxCache",)  # cache classes that a model insists on: a TraceCache is none of them


@contextmanager
def replaced(model: Any) -> Iterator[list[str]]:
    """Replace what stands in the tables in the code of a model's modules; yields what was replaced."""
    from transformers import Cache

    undo: list[tuple[Any, str, Any]] = []
    names: list[str] = []

    def put(owner: Any, name: str, value: Any) -> None:
        undo.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, value)
        names.append(f"{owner.__name__.rpartition('.')[2]}.{name}")

    types = sorted({type(module) for module in model.modules()}, key=lambda t: (t.__module__, t.__name__))
    sources = {t.__module__: sys.modules[t.__module__] for t in types if t.__module__.startswith("transformers.")}
    try:
        for path, source in sources.items():
            for name in sorted(vars(source)):
                local = LOCAL_FUNCTIONS.get(f"{path.rpartition('.')[2]}.{name}")
                if local or name in FUNCTIONS:
                    put(source, name, local or FUNCTIONS[name])
                elif name in CACHES:
                    put(source, name, Cache)
        for cls in types:
            for name in sorted(vars(cls)):
                if method := METHODS.get(f"{cls.__name__}.{name}"):
                    put(cls, name, method)
            if cls.__name__.endswith(indexer.NAME):
                put(cls, "forward", indexer.under_topk(cls.forward))
                put(sources[cls.__module__], "min", indexer.least)
        yield names
    finally:
        for owner, name, value in reversed(undo):
            setattr(owner, name, value) if value is not None else delattr(owner, name)
