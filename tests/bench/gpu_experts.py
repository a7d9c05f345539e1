"""The kernels of routed experts on a GPU, for gpu_check.py: numbers, and times beside torch and the prediction."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from moec.compiler.ir.dtypes import DTYPES
from moec.compiler.ops.moe import experts as reference
from moec.compiler.text.parser import parse_module
from moec.targets import declare_kernel_ops
from moec.targets.accelerator.artifact.objects import compile_kernels, write_files
from moec.targets.accelerator.artifact.spec import BUCKETS, kernel_specs
from moec.targets.accelerator.chip.profile import find_profile
from moec.targets.accelerator.run.artifact import Launch, read_kernels
from moec.targets.accelerator.run.launchers import Launcher, open_launcher
from moec.targets.accelerator.tile.expr import evaluate_expr

LAYER = """moec 1 stage kernel
source "none"
dim T in 1..8192
func @main(%x: f32[T, {hidden}], %ids: i64[T, {chosen}], %gates: f32[T, {chosen}]) -> (f32[T, {hidden}]) {{
  const %up : bf16[{experts}, {rows}, {hidden}] = tensor("up", bf16[{experts}, {rows}, {hidden}])
  const %down : bf16[{experts}, {hidden}, {inner}] = tensor("down", bf16[{experts}, {hidden}, {inner}])
  %order, %tiles = acc.sort(%ids) {{experts={experts}}} : i64[{chosen}*T], i64[5, 3, {chosen}*T]
  %h = acc.grouped_up(%x, %ids, %order, %tiles, %up, _) {{act=gated(silu)}} : f32[{chosen}*T, {inner}]
  %y = acc.grouped_down(%h, %ids, %order, %tiles, %gates, %down, _, _, _) : f32[T, {hidden}]
  return %y
}}
"""


def grouped_mm_layer(
    x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Return the layer (silu, gated, concat) by torch's own grouped product in bf16: what kernels are compared with."""
    chosen = ids.shape[1]
    found, order = ids.flatten().sort(stable=True)
    experts = torch.arange(up.shape[0], device=ids.device)
    ends = torch.searchsorted(found, experts, right=True).int()  # no bincount: it waits for the GPU
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    product = grouped_mm(x[order // chosen], up.transpose(1, 2), offs=ends)
    gate, value = product.chunk(2, dim=-1)
    rows = grouped_mm(torch.nn.functional.silu(gate) * value, down.transpose(1, 2), offs=ends)
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    y.index_add_(0, order // chosen, rows.float() * gates.flatten()[order, None])
    return y.to(x.dtype)


FLUSH = 1 << 28  # bytes written between two timed runs: more than any L2 holds
ORDER = ("sort", "experts_up", "experts_down")  # the groups of kernels, in the order in which they run


def median_seconds(run: Callable[[], Any], repeats: int = 20, warm: int = 3) -> float:
    """Return the median time of `run` on the GPU, each time with a cold L2."""
    for _ in range(warm):
        run()
    cold = torch.empty(FLUSH, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cold.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


@dataclass(frozen=True)
class Shape:
    """Routed experts of a model."""

    name: str
    experts: int
    chosen: int
    hidden: int
    inner: int

    @property
    def text(self) -> str:
        """The layer as a program of stage kernel."""
        sizes = {k: v for k, v in vars(self).items() if k != "name"}
        return LAYER.format(**sizes, rows=2 * self.inner)


SHAPES = (Shape("OLMoE-1B-7B", 64, 8, 2048, 1024), Shape("Qwen3-30B-A3B", 128, 8, 2048, 768))
SMALL = (Shape("small", 8, 2, 64, 32),)


def experts(run: Any, found: dict[str, Any]) -> None:
    """Time the kernels of each shape at every bucket of tokens; called by gpu_check.py with its run."""
    declare_kernel_ops()
    dry = run.options.dry_run
    for shape in SMALL if dry else SHAPES:
        tokens = (1, 4, 16) if dry else BUCKETS
        folder = run.options.work / f"experts-{shape.name}"
        launcher, launches, entries = prepare(shape, run.target, tokens, folder, dry)
        rows = found[shape.name] = {"runs on": launcher.runs, "tokens": {}}
        layer = _Layer.random(shape, launcher)
        for count in tokens:
            if run.left < 5:
                rows["left out"] = f"{count} tokens and more: no time was left"
                return
            try:
                chosen = [x for group in ORDER for x in launches[group] if x.low <= count <= x.high]
                rows["tokens"][str(count)] = layer.measure(count, chosen, entries, dry)
            except Exception as error:  # the other counts go on
                rows["tokens"][str(count)] = {"error": f"{type(error).__name__}: {error}"}
            run.write()


def prepare(
    shape: Shape, target: str, tokens: tuple[int, ...], folder: Path, dry: bool
) -> tuple[Launcher, Mapping[str, list[Launch]], Mapping[str, Any]]:
    """Choose and compile the kernels as an artifact's are; return what launches them, them by group, and their entries."""
    profile = find_profile(target, {})
    kernels, files = kernel_specs(parse_module(shape.text), profile, tokens), {}
    if not dry:
        made = compile_kernels(kernels, profile, "kernels")
        kernels, files = made.kernels, made.files
    data = kernels.to_json()
    folder.mkdir(parents=True, exist_ok=True)
    write_files({**files, "kernels.json": json.dumps(data).encode()}, folder)
    read = read_kernels(folder)
    launches: dict[str, list[Launch]] = {group: [] for group in ORDER}
    for launch in read.launches:
        launches[launch.group.rpartition("_")[0]].append(launch)
    entries = {k["name"]: k for k in data["kernels"]}
    return open_launcher("interpreter" if dry else "cuda", folder, read), launches, entries


@dataclass(frozen=True)
class _Layer:
    """A layer's weights, and what launches its kernels."""

    shape: Shape
    launcher: Launcher
    up: torch.Tensor
    down: torch.Tensor

    @staticmethod
    def random(shape: Shape, launcher: Launcher) -> _Layer:
        generator = torch.Generator(launcher.device).manual_seed(0)
        make = partial(torch.randn, generator=generator, device=launcher.device, dtype=torch.bfloat16)
        up = make((shape.experts, 2 * shape.inner, shape.hidden)) / shape.hidden**0.5
        return _Layer(shape, launcher, up, make((shape.experts, shape.hidden, shape.inner)) / shape.inner**0.5)

    def measure(self, count: int, launches: list[Launch], entries: Mapping[str, Any], dry: bool) -> dict[str, Any]:
        """Run the kernels on so many tokens, balanced over the experts at random."""
        s, device = self.shape, self.launcher.device
        generator = torch.Generator(device).manual_seed(count)
        x = torch.randn((count, s.hidden), generator=generator, device=device).bfloat16()
        ids = torch.rand((count, s.experts), generator=generator, device=device).topk(s.chosen).indices
        gates = torch.rand((count, s.chosen), generator=generator, device=device)
        tensors = self.buffers(launches, x, ids, gates)
        scalars = {"T": count}

        def one(launch: Launch) -> None:
            given = {a.name: tensors[a.name] for a in launch.program.arguments}
            self.launcher(launch, given, {name: scalars[name] for name in launch.program.scalars})

        def layer() -> None:
            for launch in launches:
                one(launch)

        layer()
        wanted = self.wanted(x, ids, gates)
        difference = float((tensors["y"].float() - wanted).abs().max() / wanted.abs().max())
        found: dict[str, Any] = {"relative difference": difference}
        chosen = [entries[launch.name] for launch in launches]
        found["kernels"] = {
            k["name"]: {"predicted": k["predicted"]["time"], "bound": k["predicted"]["bound"], "tile": k["tile"]}
            for k in chosen
        }
        found["predicted"] = sum(k["predicted"]["time"] for k in chosen)
        torch_layer = partial(grouped_mm_layer, x, ids, gates, self.up, self.down)
        if dry:
            found["torch's difference"] = None
            return found
        for launch in launches:
            found["kernels"][launch.name]["measured"] = median_seconds(graph(partial(one, launch)))
        found["measured"] = median_seconds(graph(layer))
        found["launched one by one"] = median_seconds(layer)
        try:
            found["torch's difference"] = float((torch_layer().float() - wanted).abs().max() / wanted.abs().max())
            found["torch, one by one"] = median_seconds(torch_layer)
            found["torch grouped_mm"] = median_seconds(graph(torch_layer))
        except (RuntimeError, AttributeError) as error:  # another torch may not have it, or not for this GPU
            found["torch's error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        return found

    def buffers(
        self, launches: list[Launch], x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return every tensor of the kernels by name."""
        tensors = {"x": x, "ids": ids.int().flatten(), "gates": gates.flatten(), "up": self.up, "down": self.down}
        for launch in launches:
            for a in launch.program.arguments:
                if a.name not in tensors:
                    shape = [int(evaluate_expr(n, {"T": len(x)})) for n in a.shape]
                    tensors[a.name] = torch.zeros(shape, dtype=DTYPES[a.dtype].torch, device=x.device)
        return tensors

    def wanted(self, x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """Return the layer's numbers in f32 from the reference of moe.experts, matrices in full f32 precision."""
        torch.backends.cuda.matmul.allow_tf32 = False
        options = {"act": "silu", "gated": True, "layout": "concat"}
        return reference(x.float(), ids, gates, self.up.float(), self.down.float(), None, None, **options)


def graph(run: Callable[[], Any]) -> Callable[[], None]:
    """Return a function that replays what `run` launches as a CUDA graph: no time of the host between kernels."""
    run()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    return captured.replay
