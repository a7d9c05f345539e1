"""A session on an artifact for an accelerator, with the face of every target's: start and step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ....compiler.artifact.manifest import State, check_files, read_manifest
from ....compiler.check.interpret import bind_dims
from ....compiler.errors import MoecError
from ....compiler.ir.dtypes import DTYPES
from ....compiler.ir.module import Value
from ...session import INPUTS, OpTime, check_step
from .artifact import read_kernels, read_program, read_weights
from .executor import Executor
from .graph import Graphs
from .launchers import Compiled, open_launcher
from .profile import TimedLauncher
from .slots import Held, Slots, tensor_of

ACCURACIES = ("fast", "exact")


@dataclass(frozen=True, eq=False)
class States:
    """What one step hands to the next: the states in the program's order, after `length` tokens of `batch` rows."""

    batch: int
    length: int
    held: tuple[Held, ...]

    def __len__(self) -> int:
        return len(self.held)


@dataclass(frozen=True, eq=False)
class Session:
    """An open artifact. `vocabulary` is the width of the logits, `context` the most tokens a sequence may have.

    `computes` is the dtype in which kernels hand numbers to each other, `runs` says in words what they run on. `graphs`
    runs steps of one token as a CUDA graph, where objects run.
    """

    folder: Path
    executor: Executor
    states: tuple[State, ...]
    context: int
    computes: str = "bf16"
    graphs: Graphs | None = None

    @property
    def runs(self) -> str:
        """What the kernels run on, in words."""
        return self.graphs.runs if self.graphs else self.executor.launcher.runs

    @property
    def slow(self) -> bool:
        """Whether it runs where a token takes long, so that little is compared unasked."""
        return self.executor.launcher.slow

    @property
    def vocabulary(self) -> int:
        """The width of the logits."""
        return int(self.executor.module.main.results[0].type.shape[-1])

    def events(self) -> tuple[OpTime, ...]:
        """Return the kernels that ran, in their order, of a session that was opened with profiling."""
        launcher = self.executor.launcher
        return launcher.events() if isinstance(launcher, TimedLauncher) else ()

    def start(self, batch: int) -> States:
        """Return the states before the first token: empty caches, and zeros where a state does not grow."""
        device = self.executor.launcher.device
        held = []
        for state in self.states:
            dtype = torch.bfloat16 if state.axis is not None and state.dtype == "f32" else DTYPES[state.dtype].torch
            held.append(torch.zeros(state.sizes(B=batch, P=0), dtype=dtype, device=device))
        return States(batch, 0, tuple(held))

    def step(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        position_ids: np.ndarray,
        states: States | None = None,
        last: int = 0,
    ) -> tuple[np.ndarray, States]:
        """Run new tokens i64[B, S] after P past ones; mask i64[B, P + S] (1 = token), positions i64[B, S].

        `states` are what the step before returned (None: nothing is past). Returns logits f32[B, S, vocabulary] and
        the new states; with `last` the logits of that many tokens at the end only. MoecError for sizes that do not fit.
        """
        arrays = dict(
            zip(INPUTS, (np.asarray(a, np.int64) for a in (input_ids, attention_mask, position_ids)), strict=True)
        )
        if states is None:
            states = self.start(len(arrays["input_ids"]))
        self._check(arrays, states)
        batch, new = arrays["input_ids"].shape
        given = iter(states.held)
        main = self.executor.module.main
        inputs = [next(given) if p.type.state else self._input(p, arrays) for p in main.params]
        dims = bind_dims(main.params, [_lying(held) for held in inputs], {"B": batch, "S": new, "P": states.length})
        results = (self.graphs or self.executor).run(inputs, dims)
        logits = tensor_of(results[0])
        found = (logits[:, -last:] if last else logits).float().cpu().numpy()
        kept = tuple(map(_kept_state, results[1:], self.states))
        return found, States(batch, states.length + new, kept)

    def _input(self, parameter: Value, arrays: dict[str, np.ndarray]) -> torch.Tensor:
        if parameter.name not in arrays:
            raise MoecError(f"the program has an unknown input {parameter.name}", where=str(self.folder))
        array = np.ascontiguousarray(arrays[parameter.name])
        return torch.from_numpy(array).to(DTYPES[parameter.type.dtype].torch).to(self.executor.launcher.device)

    def _check(self, arrays: dict[str, np.ndarray], states: States) -> None:
        """MoecError if the inputs do not belong together."""
        own = states if isinstance(states, States) else None
        padded = "position_ids" in {p.name for p in self.executor.module.main.params}
        check_step(arrays, own, self.states, self.context, self.vocabulary, padded)


def _lying(held: Held) -> torch.Tensor:
    """Return a value as it lies, for its sizes."""
    return held.taken if isinstance(held, Slots) else tensor_of(held)


def _kept_state(held: Held, state: State) -> Held:
    """Return a state as it is kept: caches that the framework appends to in bf16, as kernels hand them on."""
    if not isinstance(held, torch.Tensor) or state.axis is None or held.dtype != torch.float32:
        return held
    return held.to(torch.bfloat16)


def load_session(
    folder: Path | str, threads: int | None = None, spinning: bool = True, accuracy: str | None = None,
    device: str | None = None, profiling: bool = False,
) -> Session:  # fmt: skip
    """Open the artifact in `folder`; `device` is one of launchers.DEVICES. With `profiling` kernels are timed one by one (`events`).

    `threads` are those of ops that torch computes on the CPU. Of `spinning` and `accuracy` there is only one kind here:
    kernels compute in f32 and hand on bf16. MoecError if the artifact is not whole or the device does not run it.
    """
    folder = Path(folder)
    if accuracy is not None and accuracy not in ACCURACIES:
        raise MoecError(f"there is no accuracy {accuracy}", todo=f"there are {', '.join(ACCURACIES)}")
    if threads is not None:
        if threads < 1:
            raise MoecError(f"{threads} threads are asked for", todo="give 1 or more")
        torch.set_num_threads(threads)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    kernels = read_kernels(folder)
    launcher = open_launcher(device, folder, kernels)
    module = read_program(folder, kernels)
    weights = read_weights(folder, module, launcher.device)
    states = tuple(State.of(entry) for entry in manifest["states"])
    limit = manifest["dims"].get("S", (1, 1 << 31))[1]
    if profiling:
        launcher = TimedLauncher(launcher, module, kernels)
    executor = Executor(module, kernels, weights, launcher)
    graphs = Graphs(executor) if isinstance(launcher, Compiled) else None
    return Session(folder, executor, states, limit, graphs=graphs)
