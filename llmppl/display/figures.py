"""Figures as SVG inside a page, with the page's own text colour. Needs matplotlib."""

from __future__ import annotations

import html
import io
import itertools
import re
from collections.abc import Callable
from typing import Any

INK = "#010203"
"""Stands for the page's text colour while matplotlib draws; light on dark ground, dark on light."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "path",
    "svg.hashsalt": "llmppl",
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.framealpha": 0.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


class Figures:
    """Numbers the figures of one page, so that their ids do not meet."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    def __call__(self, draw: Callable[[Any], Any], caption: str) -> str:
        """What ``draw`` puts on the axes that it is given, as an HTML figure.

        :param caption: plain text; also what the figure is called for those who do not see it.
        """
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(4.8, 3.0), layout="constrained")
            FigureCanvasSVG(figure)
            figure.patch.set_visible(False)
            ax = figure.add_subplot()
            ax.patch.set_visible(False)
            draw(ax)
            stream = io.StringIO()
            figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
        text = html.escape(caption)
        svg = inline(stream.getvalue(), f"f{next(self._numbers)}-", text)
        return f"<figure>{svg}<figcaption>{text}</figcaption></figure>"


def inline(svg: str, prefix: str, label: str) -> str:
    """An SVG file as an element of a page: its own ids, no fixed size, the page's text colour."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}', svg)
    svg = svg.replace("url(#", f"url(#{prefix}").replace(INK, "currentColor")
    head, rest = svg.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{label}">{rest.strip()}'
