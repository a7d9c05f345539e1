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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import transformers
from moec.compiler import driver
from moec.compiler.errors import MoecError
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.frontends.skeleton import make_model
from moec.compiler.ir.module import Module
from moec.compiler.rewrite.pipeline import remaining_passes, run_pipeline
from moec.targets import open_target
from moec.targets.accelerator.artifact.objects import compile_kernels
from moec.targets.accelerator.artifact.spec import BUCKETS, kernel_specs
from moec.targets.accelerator.chip.profile import find_profile

TARGETS = ("nvidia-h200", "amd-mi355x")


@dataclass(frozen=True)
class Row:
    """What came of a family on a chip: its kernels, those that spill or have no object, and ops that torch runs.

    `replaced`: kernels whose first tile spilled or did not compile, where one of the next does.
    """

    kernels: int
    spilled: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    framework: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
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
        replaced = f"; next tiles: {', '.join(self.replaced)}" if self.replaced else ""
        return f"{self.kernels:4d} kernels, {'; '.join(wrong) or 'no spills'}{replaced}; torch runs {', '.join(self.framework)}"


def compile_family(name: str, targets: Sequence[str], buckets: Sequence[int]) -> Iterator[tuple[str, Row]]:
    """Yield what came of a family on each chip; its model is imported once."""
    try:
        imported = driver.load(make_model(FAMILIES[name].config(), dtype=torch.float32).eval())
    except MoecError as error:
        yield "import", Row(0, error=str(error).replace("\n", " "))
        return
    for target in targets:
        try:
            yield target, compiled(imported, target, buckets)
        except MoecError as error:
            yield target, Row(0, error=str(error).replace("\n", " "))


def compiled(imported: Module, target: str, buckets: Sequence[int]) -> Row:
    """Return what came of an imported model on a chip; MoecError where it does not lower."""
    profile, chosen = find_profile(target, {}), open_target(target, {})
    table = driver.passes_for(chosen)
    passes = remaining_passes(imported, chosen.pipeline, table)
    module = run_pipeline(imported, passes, target=chosen, table=table).module
    searched = kernel_specs(module, profile, buckets)
    kernels = compile_kernels(searched, profile, "kernels").kernels
    objects = {k.name: k.objects[profile.arch or ""] for k in kernels.kernels}
    return Row(
        len(objects),
        tuple(name for name, found in objects.items() if found.get("spills")),
        tuple(name for name, found in objects.items() if "error" in found),
        tuple(sorted(entry["op"].removeprefix("core.") for entry in kernels.framework)),
        tuple(k.name for k, first in zip(kernels.kernels, searched.kernels, strict=True) if k.best != first.best),
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
        for target, row in compile_family(name, given.targets.split(","), tuple(map(int, given.buckets.split(",")))):
            wrong += not row.good
            print(f"{name:24s} {target:12s} {row}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
