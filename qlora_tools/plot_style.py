"""How pictures look, and how a figure becomes a PNG: for every drawing of the package that is a file.

Through matplotlib's object interface, so no window system is touched and no global figure is left behind; a PNG holds no date and no version,
so equal data give equal bytes. matplotlib is imported by those who draw. Left out: what is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

BLUE, ORANGE, TEAL, PURPLE, GOLD, ROSE, GREEN, SLATE = "#2a6fdb", "#c2571a", "#1b9e8a", "#8a4fbf", "#b8860b", "#d0457e", "#4d7a1f", "#5c6470"
COLOURS = (BLUE, ORANGE, TEAL, PURPLE, GOLD, ROSE, GREEN, SLATE)
GREY, INK = "#9a9992", "#1d1d1b"
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "grid.color": "#e5e4df",
    "axes.axisbelow": True,
    "agg.path.chunksize": 10_000,  # a long noisy line overflows the renderer in one piece
    "text.parse_math": False,  # names are other people's: one with two `$` would be a formula, and mostly a wrong one
}


def styled() -> AbstractContextManager[None]:
    """Inside the block matplotlib draws in this style; make the figure, draw and call :func:`png` there."""
    from matplotlib import rc_context

    return rc_context(_STYLE)


def new_figure(width_inches: float, height_inches: float) -> Any:
    """An empty figure with a canvas of its own."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Any, dpi: int) -> bytes:
    """The figure as a file's content."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=dpi, metadata={"Software": None})
    return image.getvalue()


def number_powers(axis: Any, write: Callable[[float], str]) -> None:
    """Let ``write`` say the numbers at an axis of powers: matplotlib's own labels there are formulas, which this style does not read."""
    from matplotlib.ticker import LogFormatter, NullFormatter

    class Written(LogFormatter):
        def __call__(self, value: float, pos: int | None = None) -> str:
            return write(value) if super().__call__(value, pos) else ""  # which of them have room is matplotlib's to say

    axis.set_major_formatter(Written())
    if not isinstance(axis.get_minor_formatter(), NullFormatter):
        axis.set_minor_formatter(Written())
