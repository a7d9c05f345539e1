"""`moec plan --html`: a plan as one page that needs nothing else, its plots as SVG by matplotlib (the extra `plots`)."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

from ..cost.report import bytes_text
from .svg import draw_svg

Plan = dict[str, Any]

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
pre {{ background: #f4f4f4; padding: 1rem; overflow-x: auto; }}
figure {{ margin: 2rem 0; }} figure svg {{ max-width: 100%; height: auto; }} figcaption {{ color: #555; }}
</style></head><body>
<h1>{title}</h1>
<pre>{text}</pre>
{figures}
</body></html>
"""


def plan_page(plan: Plan, lines: list[str]) -> str:
    """Return the page of a plan: what the terminal shows, and the plots; MoecError where matplotlib is not installed."""
    title = f"{plan['model']} on {plan['system']['name']}"
    plots: list[tuple[Callable[[Any, Plan], None], str]] = [
        (_draw_parts, "What a token's time is made of, in the plan's decoding step."),
        (_draw_memory, "What one device holds."),
        (_draw_front, "What nothing beats: tokens a second of a user and of a device, by batch."),
        (_draw_roofline, "The decoding step under the roofs of one device: full rates, and what the engine reaches."),
    ]
    if plan["experts"] and plan["experts"]["physical_to_logical"]:
        plots.append((_draw_placement, "Where experts lie: how many devices hold each one, layer by layer."))
    figures = "\n".join(
        f"<figure>{draw_svg(draw, plan)}<figcaption>{html.escape(note)}</figcaption></figure>" for draw, note in plots
    )
    return _PAGE.format(title=html.escape(title), text=html.escape("\n".join(lines)), figures=figures)


def _draw_parts(axes: Any, plan: Plan) -> None:
    parts = sorted(plan["parts_ms"].items(), key=lambda part: part[1])
    axes.barh([name for name, _ in parts], [ms for _, ms in parts], color="#4878a8")
    low, high = plan["predicted"]["tpot_ms_interval"]
    axes.set_xlabel(f"ms of {plan['predicted']['tpot_ms']:.3g} ms a token ({low:.3g} to {high:.3g})")


def _draw_memory(axes: Any, plan: Plan) -> None:
    left = 0.0
    for name in ("weights", "cache", "activations", "workspace"):
        size = plan["memory"][name] / 1e9
        axes.barh(["a device"], [size], left=left, label=f"{name} {bytes_text(plan['memory'][name])}")
        left += size
    capacity = plan["memory"]["capacity"] / 1e9
    axes.axvline(capacity, color="#a03030", linestyle="--", label=f"capacity {capacity:.4g} GB")
    axes.set_xlabel("GB")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=2, frameon=False)


def _draw_front(axes: Any, plan: Plan) -> None:
    rows = plan["pareto"]
    axes.plot(
        [1e3 / row["tpot_ms"] for row in rows], [row["tokens_per_s_per_device"] for row in rows], "o-", color="#4878a8"
    )
    for row in rows:
        place = (1e3 / row["tpot_ms"], row["tokens_per_s_per_device"])
        axes.annotate(str(row["batch"]), place, textcoords="offset points", xytext=(4, 4))
    mine = plan["predicted"]
    axes.plot(
        [mine["tokens_per_s_per_user"]], [mine["tokens_per_s_per_device"]], "s", color="#a03030", label="the plan"
    )
    axes.set_xlabel("tokens/s of a user")
    axes.set_ylabel("tokens/s of a device")
    axes.legend(frameon=False)


def _draw_roofline(axes: Any, plan: Plan) -> None:
    system, token = plan["system"], plan["token"]
    intensity = token["flops"] / token["bytes"]
    reached = token["flops"] * plan["predicted"]["tokens_per_s_per_device"] / 1e12
    bandwidth = system["bandwidth"]
    points = [2.0**k for k in range(-4, 14)]
    for dtype, peak in sorted(system["peaks"].items()):
        axes.plot(points, [min(peak, p * bandwidth) / 1e12 for p in points], label=dtype)
    axes.plot([intensity], [reached], "s", color="#a03030", label="the plan")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs for each byte that is read")
    axes.set_ylabel("TFLOP/s of a device")
    axes.legend(frameon=False)


def _draw_placement(axes: Any, plan: Plan) -> None:
    placed = plan["experts"]
    counts = [[row.count(e) for e in range(placed["experts"])] for row in placed["physical_to_logical"]]
    image = axes.imshow(counts, aspect="auto", interpolation="nearest", cmap="Blues", vmin=0)
    axes.figure.colorbar(image, ax=axes, label="devices that hold it")
    axes.locator_params(integer=True)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer with experts")
