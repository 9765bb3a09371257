"""How the demo's pictures look: colours told apart with any colour vision, and plain axes."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "INK",
    "LINES",
    "ORANGE",
    "PURPLE",
    "SKY",
    "VERMILION",
    "finish",
    "new_figure",
]

# Okabe and Ito's palette: told apart with any colour vision, and by line style in grey.
BLUE, VERMILION, GREEN, GREY, INK = "#0072B2", "#D55E00", "#009E73", "#767676", "#222222"
ORANGE, SKY, PURPLE = "#E69F00", "#56B4E9", "#CC79A7"
LINES = ((BLUE, "-"), (VERMILION, "--"), (GREEN, "-."))


def new_figure(title: str, *, width: float = 11, height: float = 7.6) -> Figure:
    """An empty figure with a title at the left.

    Args:
        title: The title; its first letter is made a capital.
        width: In inches.
        height: In inches.
    """
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.03, hspace=0.04)
    figure = Figure(figsize=(width, height), dpi=130, layout=layout)
    title = title[0].upper() + title[1:]
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold")
    return figure


def finish(axes: Axes, title: str, x: str, y: str) -> None:
    """Set title and labels, and take away what is not needed.

    Args:
        axes: The axes.
        title: Their title.
        x: Label of the horizontal axis.
        y: Label of the vertical axis.
    """
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, color="#E6E6E6", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
