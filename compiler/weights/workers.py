"""Divide the weight work of a compile over the workers of a Dask cluster: tiles are computed there and written here.

A task is a tile: a function, a recipe, a box, and what it takes to open the checkpoint where the worker is (its path, which all
see). Dask runs it again where a worker dies. Bytes are those of a compile alone: the same functions compute them, in one
thread each, and this process writes them where it would have written its own.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import MoecError
from ..ir.deferred import torch
from ..ir.recipes import WEIGHT, Recipe, Step, steps_of, tensors_of
from ..ir.types import TensorType
from ..version import __version__
from .calibrated import Calibrated, factor_from, inputs_of
from .sources.checkpoint import Checkpoint, open_checkpoint
from .sources.gguf import open_gguf
from .sources.safetensors_header import TensorInfo
from .sources.source import Box, WeightSource
from .unchanged import Opened

AHEAD = 2  # tiles under way for each worker, so that none waits for this process
PATIENCE = 20.0  # seconds between two looks at whether any worker is left
_FACTORS = 64  # of gptq, that the cluster keeps


@dataclass(frozen=True)
class Place:
    """Where a worker finds the weights: a folder or a file, and the fingerprint that it has to have."""

    path: Path
    fingerprint: str
    version: str = __version__


@dataclass(frozen=True, eq=False)
class DividedSource:
    """A source whose recipes are computed by workers. Thread-safe."""

    source: WeightSource
    place: Place
    client: Any
    threads: int
    _factors: OrderedDict[tuple[str, int | None], Any] = field(default_factory=OrderedDict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors that are there."""
        return self.source.tensors

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the weights that an artifact records."""
        return self.place.fingerprint

    @property
    def opened(self) -> Opened | None:
        """The files of the source as they were opened."""
        return getattr(self.source, "opened", None)

    def read(self, name: str, box: Box | None = None, expected: TensorType | None = None) -> torch.Tensor:
        """Return a part of a tensor, read by this process."""
        return self.source.read(name, box, expected)

    def run(self, function: Callable[..., Any], recipe: Recipe, box: Box | None, *others: Any) -> Any:
        """Return `function(recipe, source, box, *others)` as a worker computes it."""
        fitted: dict[str, torch.Tensor] = {}
        factors: dict[tuple[str, int | None], Any] = {}
        if isinstance(self.source, Calibrated):
            fitted = {t.name: self.source.fitted[t.name] for t in tensors_of(recipe) if t.name in self.source.fitted}
            factors = self._factors_of(self.source, recipe, box)
        threads = torch.get_num_threads()  # as here: sums of other numbers of threads may round otherwise
        return self.compute(_run_task, self.place, threads, function, recipe, box, others, fitted, factors)

    def divide(self, source: WeightSource) -> DividedSource:
        """Return another source, made of this one's, whose recipes the same workers compute."""
        return replace(self, source=source)

    def compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what a worker computes; MoecError where it raised one, or where workers keep dying."""
        from distributed import KilledWorker

        future = self.client.submit(function, *arguments, pure=False)
        try:
            while True:
                try:
                    return future.result(timeout=PATIENCE)
                except TimeoutError:
                    if not self.client.scheduler_info()["workers"]:
                        todo = "start workers and compile again with --resume, or without --workers"
                        raise MoecError("no worker is left", "--workers", todo=todo, exit_code=1) from None
        except KilledWorker as error:
            what = "one worker after the other died while it worked on the same weight"
            todo = "give them more memory, or a smaller --memory-limit; --resume goes on"
            raise MoecError(what, "--workers", todo=todo, exit_code=1) from error
        finally:
            future.release()

    def run_all(self, jobs: Sequence[Callable[[], Any]]) -> list[Any]:
        """Return the results of jobs, which call `run`, several at a time."""
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(self.threads, "moec-workers", torch.set_num_threads, (threads,)) as pool:
            return list(pool.map(lambda job: job(), jobs))

    def _factors_of(self, source: Calibrated, recipe: Recipe, box: Box | None) -> dict[tuple[str, int | None], Any]:
        """Return gptq's factors of the weights in a box, each the future of a task of its own."""
        found: dict[tuple[str, int | None], Any] = {}
        for quantized in steps_of(recipe):
            if quantized.attributes.get("method") != "gptq":
                continue
            name, sizes = str(quantized.attributes.get(WEIGHT)), quantized.type.sizes
            direct = recipe is quantized or quantized in getattr(recipe, "items", ())  # the weight, or a part of it
            span = box[0] if box is not None and direct else (0, sizes[0])
            experts = range(*span) if len(sizes) == 3 else (None,)
            for expert in experts:
                found[name, expert] = self._factor(source, quantized, expert)
        return found

    def _factor(self, source: Calibrated, quantized: Step, expert: int | None) -> Any:
        key = (str(quantized.attributes.get(WEIGHT)), expert)
        with self._lock:
            if key not in self._factors:
                pieces = inputs_of(quantized, source.inputs).pieces(expert)
                rows = None if pieces is None else [piece.to(torch.bfloat16) for piece in pieces]  # as they were kept
                width = quantized.type.sizes[-1]
                self._factors[key] = rows and self.client.submit(_make_factor, rows, width, pure=False)
            while len(self._factors) > _FACTORS:
                self._factors.popitem(last=False)
            return self._factors[key]


@contextmanager
def divided_source(source: WeightSource, workers: str | int | None) -> Iterator[DividedSource | None]:
    """Yield a source whose recipes are computed by workers, `tcp://HOST:PORT` of a cluster or the number of local ones.

    Without `workers` it is None. MoecError where the cluster does not answer, and for weights that are in no file.
    """
    if workers is None:
        yield None
        return
    if not isinstance(source, Checkpoint):
        todo = "compile a folder of safetensors or a GGUF file, or leave out --workers"
        raise MoecError("workers read the weights from files, and these are of a model in memory", todo=todo)
    with _open_client(str(workers)) as client:
        count = len(client.scheduler_info()["workers"])
        place = Place(source.folder.resolve(), source.fingerprint)
        yield DividedSource(source, place, client, AHEAD * count)


@contextmanager
def _open_client(workers: str) -> Iterator[Any]:
    """Yield the client of a cluster that has workers of this version of moec."""
    from distributed import Client, LocalCluster

    if workers.isdecimal():
        options: Any = {
            "n_workers": int(workers),
            "threads_per_worker": 1,
            "dashboard_address": None,
            "memory_limit": 0,
        }
        with LocalCluster(**options) as cluster, Client(cluster) as client:
            yield client
        return
    try:
        client = Client(workers, timeout=10)
    except (OSError, ValueError) as error:
        todo = "start it (dask scheduler, then dask worker ADDRESS), or give a number of local workers"
        raise MoecError(f"no Dask scheduler answers: {error}", f"--workers {workers}", todo=todo) from None
    with client:
        if not client.scheduler_info()["workers"]:
            todo = f"start some where the weights can be read: dask worker {workers}"
            raise MoecError("the cluster has no workers", f"--workers {workers}", todo=todo)
        yield client


# --- what a worker does --------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _open_place(place: Place) -> Checkpoint:
    """Return the weights as this worker sees them; MoecError where they or moec are not those of the compile."""
    if place.version != __version__:
        what = f"a worker has moec {__version__}, the compile is by {place.version}"
        raise MoecError(what, todo="install the same version everywhere")
    if not place.path.exists():
        todo = "put the checkpoint where all workers see it under the same path"
        raise MoecError("a worker does not see the weights", str(place.path), todo=todo)
    found = open_checkpoint(place.path) if place.path.is_dir() else open_gguf(place.path).checkpoint
    if found.fingerprint != place.fingerprint:
        raise MoecError("a worker sees other weights than the compile", str(place.path), todo="give all the same files")
    return found


def _run_task(
    place: Place, threads: int, function: Callable[..., Any], recipe: Recipe, box: Box | None, others: tuple[Any, ...],
    fitted: Mapping[str, torch.Tensor], factors: Mapping[tuple[str, int | None], torch.Tensor | None],
) -> Any:  # fmt: skip
    """Compute a tile in this worker."""
    torch.set_num_threads(threads)
    source: WeightSource = _open_place(place)
    if fitted or factors:
        source = Calibrated(source, {}, fitted, _factors=OrderedDict(factors))
    return function(recipe, source, box, *others)


def _make_factor(pieces: list[torch.Tensor], width: int) -> torch.Tensor | None:
    """Return gptq's factor of a weight from the rows that it is multiplied with."""
    torch.set_num_threads(1)  # as in the threads that write tiles, which make it where there are no workers
    return factor_from(pieces, width)
