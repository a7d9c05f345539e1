"""Plots as SVG by matplotlib (the extra `plots`), for pages that need nothing else."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

from ..errors import MoecError

WIDE, HIGH = 6.4, 3.2  # inches of a plot
_TEXT = "#010203"  # stands in matplotlib for the colour of the page's text


def draw_svg(draw: Callable[[Any, Any], None], data: Any, name: str = "", high: float = HIGH) -> str:
    """Return one plot as an SVG element, in the colour of the text around it; the same data give the same text.

    Plots of one page that are drawn by the same function have names of their own, as the ids in an SVG belong to the page.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MoecError(
            f"plots need matplotlib: {error}", todo="pip install 'moec[plots]', or leave out --html"
        ) from error
    style: Any = {  # matplotlib types each key by its name
        "svg.hashsalt": name or draw.__name__, "svg.fonttype": "none", "font.size": 9, "legend.framealpha": 0,
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _TEXT),
    }  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(WIDE, high), layout="constrained")
        draw(figure.add_subplot(), data)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    text = out.getvalue()
    drawn = text[text.index("<svg") :].replace(_TEXT, "currentColor")
    return re.sub(r'<g id="[^"]*"', "<g", drawn)  # groups are numbered in each plot anew, and nothing refers to them
