"""What `moec inspect` says about a module, as plain data.

Every figure is counted from the IR (cost.py); none is measured. GB are 10^9 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact.manifest import MANIFEST
from ..cost.count import CallCost, Costs, FunctionCost, module_costs
from ..cost.report import (
    CONTEXT,
    _bf16_per_token,
    _cost_figures,
    _parameter_counts,
    _per_token,
    _state_figures,
    bytes_text,
    left_out_of,
)
from ..driver import fused_module
from ..errors import MoecError
from ..errors.json_files import read_json
from ..errors.paths import check_source
from ..ir.module import Module, Value
from ..ir.types import TensorType
from ..ops.define import any_size_text
from ..runtime.artifact import Artifact

KERNELS = "kernels.json"  # of an artifact for an accelerator


@dataclass(frozen=True)
class Opened:
    """A source that is looked at: its program, what that does not read, and moec.json of an artifact."""

    module: Module
    left_out: Mapping[str, TensorType]
    manifest: Mapping[str, Any]
    imported: bool = False  # from a checkpoint, and not yet rewritten by any pass

    @property
    def counted(self) -> Module:
        """The program that figures are of: what is imported, as any target takes it.

        A model's own way to write its layers may be far from what is run: MLA as DeepSeek-V3 writes it makes the keys and
        values of all cached tokens in every step.
        """
        return fused_module(self.module) if self.imported else self.module

    def context(self, wanted: int | None) -> int:
        """Return the past tokens to cost a token at; MoecError for more than the program takes."""
        past = next((d.high for d in self.module.dims if d.name == "P"), CONTEXT)
        chosen = min(CONTEXT, past) if wanted is None else wanted
        if not 0 <= chosen <= past:
            raise MoecError(f"a context of {chosen} tokens is outside the program's 0..{past}")
        return chosen


def open_source(source: Path | str, *, trust_remote_code: bool = False) -> Opened:
    """Open a checkpoint folder (config.json is enough), an artifact or a `.moir` file; MoecError."""
    from ...targets import declare_kernel_ops
    from ..frontends.load import load

    declare_kernel_ops()
    manifest = _artifact_manifest(Path(source))
    loaded = load(source, trust_remote_code=trust_remote_code)
    return Opened(loaded.module, loaded.left_out, manifest, imported=Path(source).suffix != ".moir")


def inspect(source: Path | str, *, context: int | None = None, trust_remote_code: bool = False) -> dict[str, Any]:
    """Return the figures of a checkpoint folder (config.json is enough), an artifact or a .moir file, as `moec inspect --json`.

    >>> moec.inspect("examples/tiny-moe")["parameters"]["total"]  # doctest: +SKIP
    """
    return inspect_source(open_source(check_source(source), trust_remote_code=trust_remote_code), context=context)


def inspect_source(opened: Opened, *, context: int | None = None) -> dict[str, Any]:
    """Return the figures of a source.

    `context` is the number of past tokens at which one decoded token is costed. The keys: source, stage, target,
    parameters, bytes, left_out, per_token, state, formulas, dims, inputs, outputs, kinds, layers; of an artifact also unfused,
    files and (for an accelerator) kernels. Raises MoecError.
    """
    module, chosen = opened.counted, opened.context(context)
    return _module_report(module, module_costs(module), chosen, opened.manifest, opened.left_out)


def _artifact_manifest(path: Path) -> Mapping[str, Any]:
    """Return moec.json of an artifact folder, with the sizes of its files; nothing for another source."""
    if not (path / MANIFEST).is_file():
        return {}
    artifact = Artifact.open(path)
    kernels = {"kernels": read_json(path / KERNELS)} if (path / KERNELS).is_file() else {}
    return {**artifact.manifest, "sizes": artifact.report["files"], **kernels}


def _module_report(
    module: Module, costs: Costs, context: int, manifest: Mapping[str, Any], left_out: Mapping[str, TensorType]
) -> dict[str, Any]:
    total = costs.total
    report = {
        "source": module.source,
        "stage": module.stage,
        "target": manifest.get("target"),
        "parameters": _parameter_counts(total),
        "bytes": {"checkpoint": total.stored_bytes, "compiled": total.compiled_bytes},
        "left_out": left_out_of(left_out),
        "per_token": {"context": context, **_per_token(costs, total, context)},
        "state": {**_state_figures(costs, total, context), "bf16_bytes_per_token": _bf16_per_token(costs, context)},
        "formulas": {"flops": any_size_text(total.flops), "state_bytes": any_size_text(total.state_bytes)},
        "dims": [{"name": d.name, "low": d.low, "high": d.high} for d in module.dims],
        "inputs": [_value_entry(v) for v in module.main.params],
        "outputs": [_value_entry(v) for v in module.main.results],
        "kinds": [_function_entry(costs, kind, context) for kind in costs.kinds],
        "layers": [_layer_entry(costs, layer, context) for layer in costs.layers],
    }
    if manifest:
        report |= {"unfused": manifest["unfused"], "files": manifest["sizes"]}
    if "kernels" in manifest:
        report["kernels"] = manifest["kernels"]
    return report


def left_out_text(found: Mapping[str, Any]) -> str:
    """Return it as one line for people."""
    names = ", ".join(found["names"])
    return f"left out of the program: {found['tensors']} tensors {names}, {bytes_text(found['bytes'])}"


def _value_entry(value: Value) -> dict[str, Any]:
    return {"name": value.name, "type": str(value.type.plain), "state": value.type.state}


def _function_entry(costs: Costs, kind: FunctionCost, context: int) -> dict[str, Any]:
    return {
        "function": kind.function.name,
        "calls": len(kind.layers),
        "layers": [int(n) for layer in kind.layers if (n := layer.bindings.get("layer", "")).isdigit()],
        "ops": len(kind.function.ops),
        **_cost_figures(costs, kind.cost, context),
    }


def _layer_entry(costs: Costs, layer: CallCost, context: int) -> dict[str, Any]:
    return {"function": layer.function, "bindings": dict(layer.bindings), **_cost_figures(costs, layer.cost, context)}


def ranges_text(numbers: list[int]) -> str:
    """Return sorted numbers as text: `0..2, 5`."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)
