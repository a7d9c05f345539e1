"""Compiles the kernels of tiny models of the families for chips, with objects, and counts what spills or does not compile.

    python tests/bench/families.py                                  # every family, nvidia-h200 and amd-mi355x, all buckets
    python tests/bench/families.py --families jamba,olmoe --targets nvidia-b200 --buckets 1,64

A line for each family and chip is printed as it is found; the exit code is 1 where a family does not compile, a kernel has
no object, or one spills. No GPU is needed; all of it takes an hour or more, but kernels that are in the user's cache since an
earlier run are not compiled again.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers
from moec.compiler import driver
from moec.compiler.errors import MoecError
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.frontends.skeleton import make_model
from moec.compiler.ir.module import Module
from moec.targets.accelerator.artifact.objects import compile_kernels
from moec.targets.accelerator.artifact.spec import BUCKETS, kernel_specs
from moec.targets.accelerator.chip.profile import find_profile

TARGETS = ("nvidia-h200", "amd-mi355x")


@dataclass(frozen=True)
class Row:
    """What came of a family on a chip: its kernels, those that spill or have no object, and ops that torch runs."""

    kernels: int
    spilled: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    framework: tuple[str, ...] = ()
    error: str = ""

    @property
    def good(self) -> bool:
        """Whether every kernel has an object that does not spill."""
        return not (self.error or self.spilled or self.failed)

    def __str__(self) -> str:
        """Return the row as the script prints it."""
        if self.error:
            return self.error
        wrong = [f"spill: {', '.join(self.spilled)}"] * bool(self.spilled)
        wrong += [f"no object: {', '.join(self.failed)}"] * bool(self.failed)
        return f"{self.kernels:4d} kernels, {'; '.join(wrong) or 'no spills'}; torch runs {', '.join(self.framework)}"


def compiled(module: Module, target: str, buckets: Sequence[int]) -> Row:
    """Return what came of the kernels of a lowered module."""
    profile = find_profile(target, {})
    kernels = compile_kernels(kernel_specs(module, profile, buckets), profile, "kernels").kernels
    objects = {k.name: k.objects[profile.arch or ""] for k in kernels.kernels}
    return Row(
        len(objects),
        tuple(name for name, found in objects.items() if found.get("spills")),
        tuple(name for name, found in objects.items() if "error" in found),
        tuple(sorted(entry["op"].removeprefix("core.") for entry in kernels.framework)),
    )


def main() -> int:
    """Compile what the arguments say and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--buckets", default=",".join(map(str, BUCKETS)))
    given = parser.parse_args()
    if unknown := set(given.families.split(",")) - set(FAMILIES):
        parser.error(f"there is no family {', '.join(sorted(unknown))}; moec list families shows them")
    warnings.filterwarnings("ignore")
    wrong = 0
    for name in given.families.split(","):
        if not hasattr(transformers, FAMILIES[name].config_class):
            print(
                f"{name:24s} transformers {transformers.__version__} has no {FAMILIES[name].config_class}", flush=True
            )
            continue
        model = make_model(FAMILIES[name].config(), dtype=torch.float32).eval()
        for target in given.targets.split(","):
            try:
                module = driver.compile(model, target, stop_after="kernel")
                row = compiled(module, target, tuple(map(int, given.buckets.split(","))))
            except MoecError as error:
                row = Row(0, error=str(error).replace("\n", " "))
            wrong += not row.good
            print(f"{name:24s} {target:12s} {row}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
