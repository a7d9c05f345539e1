"""What recipes read from: a checkpoint (checkpoint.py), tensors in memory, or pseudo-random numbers.

`read(name, box, expected)` is the whole interface. The leaf of a recipe knows its type and passes it as `expected`:
sources with tensors compare it, `RandomSource` makes numbers of it, so that a program runs without its weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

from ...errors import MoecError
from ...ir.deferred import torch
from ...ir.dtypes import DTYPES, dtype_name, find_dtype
from ...ir.recipes import FITTED, Recipe
from ...ir.types import TensorType
from .safetensors_header import TensorInfo

Box = tuple[tuple[int, int], ...]  # (start, stop) for every axis


class WeightSource(Protocol):
    """Something that recipes can be evaluated on."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors that are there; empty for a source that makes any tensor."""

    def read(self, name: str, box: Box | None = None, expected: TensorType | None = None) -> torch.Tensor:
        """Return the part of a tensor in `box` (all of it without one). The result must not be written to."""


@runtime_checkable
class ElsewhereSource(WeightSource, Protocol):
    """A source whose recipes other processes compute (workers.py)."""

    threads: int  # tiles that may be under way at once

    def run(self, function: Callable[..., Any], recipe: Recipe, box: Box | None, *others: Any) -> Any:
        """Return `function(recipe, source, box, *others)` of a process that has the source too."""

    def run_all(self, jobs: Sequence[Callable[[], Any]]) -> list[Any]:
        """Return the results of jobs, which call `run`, several at a time."""


class ModuleSource:
    """Tensors in memory, e.g. the state of a live `torch.nn.Module`; they are read in place, not copied."""

    def __init__(self, state: Mapping[str, torch.Tensor] | torch.nn.Module) -> None:
        """Take a state dict or a module; MoecError for a dtype that a program cannot hold."""
        self._state = dict(state.state_dict() if isinstance(state, torch.nn.Module) else state)
        for name, tensor in self._state.items():
            if find_dtype(tensor.dtype) is None:
                todo = f"known dtypes: {', '.join(DTYPES)}"
                raise MoecError(f"tensor {name!r} has the unknown dtype {tensor.dtype}", model=name, todo=todo)
            if tensor.is_meta:
                raise MoecError(f"tensor {name!r} has no data (device meta)", model=name, todo="load the weights first")
        types = {name: TensorType.of(dtype_name(t.dtype), *t.shape) for name, t in self._state.items()}
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType({n: TensorInfo(t) for n, t in types.items()})

    def read(self, name: str, box: Box | None = None, expected: TensorType | None = None) -> torch.Tensor:
        """Return a view of a tensor of the module (a copy only if it lies on another device)."""
        if name not in self._state:
            raise MoecError(f"the module has no tensor {name!r}", model=name)
        found = self.tensors[name].type
        if expected is not None and expected.plain != found:
            raise MoecError(f"tensor {name!r} is {found} in the module, {expected} is wanted", model=name)
        tensor = self._state[name].detach()
        return slice_box(tensor, box).cpu()


class RandomSource:
    """Pseudo-random tensors: the same name, type and seed always give the same numbers.

    Floats are normal with standard deviation 1/sqrt(last size), vectors and scalars 1 + 0.1 * normal (they scale
    norms; so do fitted factors), float8 the same through a cast; f8e8m0 are powers of two from 1/16 to 1; i8 lie in -8..7, other integers
    in 0..3. `types` is needed only by callers that read without `expected`; `below` names integer tensors whose numbers
    have to be smaller than that, such as indices.
    """

    def __init__(
        self, seed: int = 0, types: Mapping[str, TensorType] | None = None, below: Mapping[str, int] | None = None
    ) -> None:
        self.seed = seed
        self._below = dict(below or {})
        self.tensors: Mapping[str, TensorInfo] = {name: TensorInfo(t) for name, t in (types or {}).items()}
        # the tiles of a tensor are asked for one after the other: the last tensors are kept
        self._whole = lru_cache(maxsize=2)(self._make)

    def read(self, name: str, box: Box | None = None, expected: TensorType | None = None) -> torch.Tensor:
        """Return the part of the tensor in `box`; ValueError if neither `expected` nor `types` gives its type."""
        if expected is None:
            if name not in self.tensors:
                raise ValueError(f"the type of {name!r} is not known")
            expected = self.tensors[name].type
        return slice_box(self._whole(name, expected.dtype, expected.sizes), box)

    def _make(self, name: str, dtype: str, sizes: tuple[int, ...]) -> torch.Tensor:
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        target = DTYPES[dtype].torch
        if not target.is_floating_point:
            low, high = (
                (0, self._below[name]) if name in self._below else {"bool": (0, 2), "i8": (-8, 8)}.get(dtype, (0, 4))
            )
            return torch.randint(low, high, sizes, generator=generator).to(target)
        if dtype == "f8e8m0":
            return torch.randint(-4, 1, sizes, generator=generator).float().exp2().to(target)
        normal = torch.randn(sizes, generator=generator)
        values = 1 + 0.1 * normal if len(sizes) < 2 or name.endswith(FITTED) else normal / math.sqrt(max(1, sizes[-1]))
        return values.to(target)


def full_box(sizes: Sequence[int]) -> Box:
    """Return the box that covers a tensor."""
    return tuple((0, n) for n in sizes)


def check_box(box: Box, sizes: Sequence[int]) -> Box:
    """Return the box; ValueError if it has another rank than the tensor or lies outside."""
    if len(box) != len(sizes) or any(not 0 <= low <= high <= n for (low, high), n in zip(box, sizes, strict=False)):
        raise ValueError(f"box {box} does not lie in a tensor of shape {list(sizes)}")
    return box


def slice_box(tensor: torch.Tensor, box: Box | None) -> torch.Tensor:
    """Return the part of a tensor in a box, as a view."""
    if box is None:
        return tensor
    return tensor[tuple(slice(*span) for span in check_box(box, tensor.shape))]
