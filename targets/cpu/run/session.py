"""Runs an artifact of target cpu in ONNX Runtime; caches.py keeps the states between steps."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ....compiler.artifact.manifest import State, check_files, read_manifest
from ....compiler.errors import MoecError
from ...session import INPUTS, OpTime, check_step
from ..kernels.register import register_kernels
from ..model_file import open_model
from .caches import ELEMENTS, States, initial_states
from .profile import enable_profiling, read_profile

MODEL, DATA = "model.onnx", "model.onnx.data"
LOGITS = "logits"
_APART = "moec.json and the model do not belong together: compile it again"
KEEP = "logits_to_keep"  # how many tokens at the end get logits; a model without it gives them all


@dataclass(frozen=True)
class Session:
    """An open model.

    `width` is that of the logits, `vocabulary` how many tokens have an embedding, `context` the most tokens that a
    sequence may have. `kernels` says what computes the quantized layers.
    """

    folder: Path
    runtime: Any  # onnxruntime.InferenceSession
    inputs: tuple[str, ...]
    states: tuple[State, ...]
    width: int
    vocabulary: int
    context: int
    keeps: bool = False  # whether the model can leave out the logits of earlier tokens
    in_host_memory: bool = True  # what a step reads
    kernels: str = ""

    def step(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        position_ids: np.ndarray,
        states: States | None = None,
        last: int = 0,
    ) -> tuple[np.ndarray, States]:
        """Run new tokens i64[B, S] after P past ones; mask i64[B, P + S] (1 = token), positions i64[B, S].

        `states` are what the step before returned (None: nothing is past). Returns logits f32[B, S, width] and
        the new states; with `last` the logits of that many tokens at the end only. Raises MoecError for sizes that do
        not fit, for tokens beyond the vocabulary and for what the runtime refuses.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        arrays = {name: _int64_array(name, array) for name, array in given.items()}
        if states is None:
            states = self.start(len(arrays["input_ids"]))
        past = self._check(arrays, states)
        batch, new = arrays["input_ids"].shape
        kept = min(last, new) if last and self.keeps else new
        logits = np.empty((batch, kept, self.width), np.float32)
        states = states.with_room(self._in_place, new)
        with reword_errors(
            "ONNX Runtime cannot run the model", self.folder / MODEL, todo=f"{new} new tokens after {past}"
        ):
            binding = self._binding(states)
            for name in self.inputs:
                binding.bind_cpu_input(name, arrays[name])
            if self.keeps:
                binding.bind_ortvalue_input(KEEP, _ort_value(np.array([kept], np.int64)))
            binding.bind_output(LOGITS, "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
            self.runtime.run_with_iobinding(binding)
            others = tuple(binding.get_outputs()[len(self._in_place) :][: len(states.others)]) if states.others else ()
        states.buffers.filled = past + new
        logits = logits[:, -last:] if last and not self.keeps else logits
        return logits, replace(states, length=past + new, others=others)

    def events(self) -> tuple[OpTime, ...]:
        """End the profiling that the session was opened with; return the nodes that ran, in their order."""
        return read_profile(self.runtime, self.folder / MODEL)

    def start(self, batch: int) -> States:
        """Return the states before the first token: empty caches, and zeros where a state does not grow."""
        return initial_states(self.states, batch)

    @property
    def _in_place(self) -> list[State]:
        return [state for state in self.states if state.in_place]

    def _binding(self, states: States) -> Any:
        """Return a binding of the states: buffers as past and present at once, others as inputs with new outputs."""
        binding = states.buffers.binding
        if binding is None:
            binding = self.runtime.io_binding()
            for state, array in zip(self._in_place, states.buffers.arrays, strict=True):
                place = ("cpu", 0, ELEMENTS[state.dtype], array.shape, array.ctypes.data)
                binding.bind_input(state.past, *place)
                binding.bind_output(state.present, *place)
            states.buffers.binding = binding
        # get_outputs gives outputs in the order in which they were bound first: buffers, then these, then the logits
        for state, value in zip((s for s in self.states if not s.in_place), states.others, strict=True):
            binding.bind_ortvalue_input(state.past, value)
            binding.bind_output(state.present, "cpu")
        return binding

    def _check(self, arrays: dict[str, np.ndarray], states: States) -> int:
        """Return the number of past tokens; MoecError if the inputs do not belong together."""
        own = states if isinstance(states, States) else None
        padded = "position_ids" in self.inputs
        return check_step(arrays, own, self.states, self.context, self.vocabulary, padded)


def _int64_array(name: str, given: Any) -> np.ndarray:
    """Return an input as an array of the runtime's integers; MoecError for numbers that are none."""
    try:
        array = np.asarray(given)
        with np.errstate(invalid="ignore"):  # a number beyond them, which the comparison finds
            found = np.ascontiguousarray(array, np.int64)
    except (OverflowError, ValueError, TypeError) as error:
        raise MoecError(f"{name} is no array of 64-bit integers: {error}") from error
    if array.dtype.kind not in "bi" and not (found == array).all():
        raise MoecError(f"{name} holds numbers that are no 64-bit integers")
    return found


def load_session(
    folder: Path, threads: int | None = None, spinning: bool = True, accuracy: str | None = None,
    profiling: bool = False,
) -> Session:  # fmt: skip
    """Open a language model in `folder`; the options are those of `open.open_artifact`."""
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    path = folder / MODEL
    if not path.is_file():
        raise MoecError(
            f"the artifact has no {MODEL}", where=str(folder), todo=f"it is for target {manifest['target']}"
        )
    states = tuple(State.of(entry) for entry in manifest["states"])
    for state in states:
        if state.dtype not in ELEMENTS:
            raise MoecError(
                f"the state {state.past} is {state.dtype}, which ONNX Runtime cannot hold", where=str(folder)
            )
    runtime, kernels = open_runtime(folder, manifest, threads, spinning, accuracy, profiling)
    _check_names(path, runtime, states)
    outputs = {output.name: output for output in runtime.get_outputs()}
    width = outputs[LOGITS].shape[-1]
    if not isinstance(width, int) or outputs[LOGITS].type != "tensor(float)":
        raise MoecError(
            f"the logits are {outputs[LOGITS].type} {outputs[LOGITS].shape}, not f32 [B, S, number]", str(path)
        )
    taken = tuple(i.name for i in runtime.get_inputs() if i.name in INPUTS)
    limit = manifest["dims"].get("S", (1, 1 << 31))[1]
    keeps = KEEP in {i.name for i in runtime.get_overridable_initializers()}
    # without a record the width of the logits bounds them: no model has a logit for a token that it cannot read
    vocabulary = manifest["vocabulary"] or width
    return Session(folder, runtime, taken, states, width, vocabulary, limit, keeps, kernels=kernels)


def open_runtime(
    folder: Path,
    manifest: Mapping[str, Any],
    threads: int | None,
    spinning: bool,
    accuracy: str | None,
    profiling: bool,
) -> tuple[Any, str]:
    """Return the model of an artifact, open in ONNX Runtime, and what computes it; for the options see `open.open_artifact`."""
    import onnxruntime

    path, options = folder / MODEL, _session_options(threads, spinning)
    with reword_errors(
        "ONNX Runtime cannot open the model", path, todo="the file is damaged or too new: compile it again"
    ):
        model, beside = open_model(path, DATA, accuracy)
        if isinstance(model, bytes):
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(beside))
        kernels = register_kernels(options, folder, manifest)
        if profiling:
            enable_profiling(options)
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]), kernels


def _session_options(threads: int | None, spinning: bool) -> Any:
    import onnxruntime

    if threads is not None and threads < 1:
        raise MoecError(f"{threads} threads are asked for", todo="give 1 or more")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.inter_op_num_threads = 1  # the program is one chain; a second pool would only wait
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    # plans are kept for every input shape, and each step of a growing cache has another one
    options.enable_mem_pattern = False
    options.log_severity_level = 3  # errors; they come as exceptions too, which are reworded
    return options


def _check_names(path: Path, runtime: Any, states: tuple[State, ...]) -> None:
    """Check that the model and the manifest agree on inputs and outputs, and on the sizes of states."""
    shapes = {i.name: i.shape for i in runtime.get_inputs()}
    has = set(shapes)
    gives = {o.name for o in runtime.get_outputs()}
    lacking = [s.past for s in states if s.past not in has]
    lacking += [name for name in (LOGITS, *(s.present for s in states)) if name not in gives]
    unknown = sorted(has - set(INPUTS) - {s.past for s in states})
    if lacking or unknown:
        what = f"the model has no {lacking[0]}" if lacking else f"the model asks for an unknown input {unknown[0]}"
        raise MoecError(what, where=str(path), todo=_APART)
    order = {state.past: n for n, state in enumerate(states)}
    pasts = sorted(order, key=[i.name for i in runtime.get_inputs()].index)
    presents = [o.name for o in runtime.get_outputs() if o.name in {s.present for s in states}]
    for past, present in zip(pasts, presents, strict=True):  # the model has both in one order
        if states[order[past]].present != present:
            what = (
                f"the state {past} comes back as {states[order[past]].present} in moec.json, as {present} in the model"
            )
            raise MoecError(what, where=str(path), todo=_APART)
    for state in states:
        # a size that is a number is the same in both; one that is an expression has a name of its own in the model
        numbers = [size if isinstance(size, int) else None for size in state.shape]
        if numbers != [size if isinstance(size, int) else None for size in shapes[state.past]]:
            what = f"the state {state.past} is {list(state.shape)} in moec.json, {shapes[state.past]} in the model"
            raise MoecError(what, where=str(path), todo=_APART)


def _ort_value(array: np.ndarray) -> Any:
    """Return a value of the runtime; an input that has a default can be bound only as one."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


@lru_cache(maxsize=1)
def native_errors() -> tuple[type[Exception], ...]:
    """Return what the runtime raises: its exceptions share no base class, and binding raises RuntimeError."""
    from onnxruntime.capi import onnxruntime_pybind11_state as native

    return (RuntimeError, ValueError, *(e for e in vars(native).values() if _is_exception(e)))


def _is_exception(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, Exception)


def without_code(message: str) -> str:
    """Return a message of the runtime without the code that it starts with."""
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", message)


@contextmanager
def reword_errors(what: str, path: Path, todo: str) -> Iterator[None]:
    """Reword what the runtime raises."""
    try:
        yield
    except native_errors() as error:
        reason = without_code(" ".join([line.strip() for line in str(error).splitlines() if line.strip()][:3]))
        raise MoecError(f"{what}: {reason}", where=str(path), todo=todo) from error


# --- threads ---------------------------------------------------------------------------------------------------


def usable_cores() -> int:
    """Return the number of physical cores that this process may use.

    Two threads on one core, or more threads than a container is given time for, wait for each other while they spin.
    """
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cores = {_core_siblings(cpu) for cpu in cpus}
    return max(1, min(len(cores), _cpu_quota()))


def _core_siblings(cpu: int) -> str:
    """Return a text that is the same for the logical CPUs of one core."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _cpu_quota() -> int:
    """Return the number of CPUs that a container's time limit amounts to (a large number without a limit)."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return int(limit) // int(period)
    except (OSError, ValueError):  # no such file, or "max"
        return 1 << 16
