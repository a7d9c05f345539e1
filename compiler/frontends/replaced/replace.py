"""While a model is imported, code of transformers that cannot be traced gives way to code that says the same in ops.

The tables hold functions of modelling files by name and methods by class; see recurrent.py, expert_modules.py, angles.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..transformers.cache import TraceCache
from . import angles, block_indexers, expert_modules, indexer, moving_rope, recurrent
from .stand_ins import StandIn, stand_in

FUNCTIONS = {**recurrent.FUNCTIONS}
LOCAL_FUNCTIONS = {**angles.LOCAL_FUNCTIONS}  # by modelling file too: others have functions of the same name
METHODS = {**recurrent.METHODS, **expert_modules.METHODS, **angles.METHODS, **block_indexers.METHODS}
CACHES = ("MiniMaxCache",)  # cache classes that a model insists on: a TraceCache is none of them


@dataclass(frozen=True)
class _Replacement:
    """What takes the place of a name of a modelling file or of a class; `own` is the function of moec that does the work.

    `key` is what it replaces, as the table of checked sources has it; without one it belongs to another replacement.
    """

    owner: Any
    name: str
    value: Any
    own: Any
    key: str = ""

    def stand_in(self) -> StandIn:
        """Describe what replaces what; to be called while the original is still in its place."""
        place = f"{self.owner.__name__.rpartition('.')[2]}.{self.name}"
        return stand_in(self.own, place, self.key, getattr(self.owner, self.name), self.owner)


@contextmanager
def replace_model_code(model: Any) -> Iterator[list[StandIn]]:
    """Replace what stands in the tables in the code of a model's modules; yields what was replaced."""
    chosen = list(_replacements_of_model(model))
    found = [r.stand_in() for r in chosen if r.key]
    undo = [(r.owner, r.name, vars(r.owner).get(r.name)) for r in chosen]
    try:
        for r in chosen:
            setattr(r.owner, r.name, r.value)
        yield found
    finally:
        for owner, name, value in reversed(undo):
            setattr(owner, name, value) if value is not None else delattr(owner, name)


def _replacements_of_model(model: Any) -> Iterator[_Replacement]:
    types = sorted({type(module) for module in model.modules()}, key=lambda t: (t.__module__, t.__name__))
    sources = {t.__module__: sys.modules[t.__module__] for t in types if t.__module__.startswith("transformers.")}
    for path, source in sources.items():
        yield from _of_file(path.rpartition(".")[2], source)
    yield from _of_lengths(model, types)
    for cls in types:
        methods = {name: METHODS[key] for name in sorted(vars(cls)) if (key := f"{cls.__name__}.{name}") in METHODS}
        if not cls.__name__.endswith(indexer.NAME):
            yield from (_Replacement(cls, n, m, m, f"{cls.__name__}.{n}") for n, m in methods.items())
            continue
        own = methods.get("forward")
        forward = indexer.under_topk(own or cls.forward)
        yield _Replacement(cls, "forward", forward, own or indexer.under_topk, f"{cls.__name__}.forward")
        if cls.__module__ in sources:
            yield _Replacement(sources[cls.__module__], "min", indexer.min_of_sizes, indexer.min_of_sizes)


def _of_lengths(model: Any, types: list[type]) -> Iterator[_Replacement]:
    """Replace what chooses rotary frequencies by the length of a sequence, in models that have such."""
    from transformers import modeling_rope_utils

    moving = {type(m) for m in model.modules() if moving_rope.kind_of(m)}
    chosen = [t for t in types if t in moving and moving_rope.follows_length(t.forward)]
    chosen = [t for t in chosen if f"{t.__name__}.forward" not in METHODS]
    for cls in chosen:
        yield _Replacement(cls, "forward", moving_rope.by_positions(cls.forward), moving_rope.by_positions)
    if chosen:  # what is replaced is the decorator, which stays where it is
        name, own = "dynamic_rope_update", moving_rope.by_positions
        yield _Replacement(modeling_rope_utils, name, modeling_rope_utils.dynamic_rope_update, own, name)


def _of_file(file: str, source: Any) -> Iterator[_Replacement]:
    from transformers import Cache

    for name in sorted(vars(source)):
        if local := LOCAL_FUNCTIONS.get(f"{file}.{name}"):
            yield _Replacement(source, name, local, local, f"{file}.{name}")
        elif function := FUNCTIONS.get(name):
            yield _Replacement(source, name, function, function, name)
        elif name in CACHES:
            yield _Replacement(source, name, Cache, TraceCache, name)
