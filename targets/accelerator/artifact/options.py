"""Options of an artifact for an accelerator, as -D gives them beside the figures of the chip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ....compiler.errors import MoecError
from ..select.activations import CHOICES as ACTIVATIONS

CHOICES = {  # the first by default
    "kernels": ("objects", "source"), "toolchain": ("found", "make"), "activations": ACTIVATIONS,
}  # fmt: skip
ENGINES = ("vllm", "sglang")


@dataclass(frozen=True)
class Tuning:
    """Which engines get tuning files of their fused-MoE kernels, and how they divide experts over devices.

    `tp` ranks share a layer by tensor parallelism, `ep` by expert parallelism. `device` is what torch calls the device
    (empty: as engine_files.py knows the chip).
    """

    engines: tuple[str, ...] = ()
    tp: int = 1
    ep: int = 1
    device: str = ""


@dataclass(frozen=True)
class Options:
    """The options of an artifact.

    `compiled`: kernels are compiled where the toolchain is installed. `make_toolchain`: triton-ascend's environment is
    made if there is none. `activations`: what is multiplied with quantized weights, see select/activations.py. `buckets`: the most tokens of a step that kernels are tuned for (None: spec.BUCKETS).
    """

    compiled: bool = True
    make_toolchain: bool = False
    activations: str = CHOICES["activations"][0]
    buckets: tuple[int, ...] | None = None
    tuning: Tuning = field(default_factory=Tuning)


NAMES = (*CHOICES, "buckets", "engines", "tp", "ep", "device")


def read_options(given: Mapping[str, str]) -> Options:
    """Read the options among what -D gives; MoecError for a value that one does not take."""
    chosen = {key: given.get(key, choices[0]) for key, choices in CHOICES.items()}
    for key, value in chosen.items():
        if value not in CHOICES[key]:
            raise _refused_option(key, value, f"give {' or '.join(CHOICES[key])}")
    engines = tuple(part.strip() for part in given["engines"].split(",")) if "engines" in given else ()
    if not set(engines) <= set(ENGINES):
        raise _refused_option("engines", given["engines"], f"give {' or '.join(ENGINES)}, or both with a comma between")
    for key in ("tp", "ep", "device"):
        if key in given and not engines:
            todo = f"give the engines too: -D engines={','.join(ENGINES)}"
            raise MoecError(
                f"{key} says for whom tuning files of engines are", where=f"-D {key}={given[key]}", todo=todo
            )
    tuning = Tuning(
        engines, _read_ranks("tp", given), _read_ranks("ep", given), given.get("device", "").strip().replace(" ", "_")
    )
    return Options(
        chosen["kernels"] == "objects",
        chosen["toolchain"] == "make",
        chosen["activations"],
        _read_buckets(given),
        tuning,
    )


def _read_ranks(key: str, given: Mapping[str, str]) -> int:
    text = given.get(key, "1")
    if not text.isdecimal() or int(text) < 1:
        raise _refused_option(key, text, "give a number of devices, as in 8")
    return int(text)


def _read_buckets(given: Mapping[str, str]) -> tuple[int, ...] | None:
    if "buckets" not in given:
        return None
    parts = given["buckets"].split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise _refused_option("buckets", given["buckets"], "give numbers, as in 1,16,256")
    return tuple(sorted({int(part) for part in parts}))


def _refused_option(key: str, value: str, todo: str) -> MoecError:
    return MoecError(f"{key} cannot be {value}", where=f"-D {key}={value}", todo=todo)
