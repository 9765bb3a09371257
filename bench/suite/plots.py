"""The pictures: one figure each, log-log, in the demo's style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from riemann_unn.demo.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    finish,
    new_figure,
)

__all__ = ["Line", "curves"]

# Colours tell families apart, lines and marks tell their members apart.
FAMILIES = {
    "torch": INK,
    "ProjUNN-T": BLUE,
    "ProjUNN-D": GREEN,
    "Cayley": SKY,
    "Expm": PURPLE,
    "geoopt": VERMILION,
    "POGO": ORANGE,
    "parametrization": GREY,
    "geotorch": GREY,
    "projUNN": "#8C510A",
    "sketch tangent": BLUE,
    "sketch lsi": VERMILION,
    "sketch column": GREEN,
    "sketch svd": GREY,
}
_STYLES = ("-", "--", ":", "-.")
_MARKS = ("o", "s", "^", "D")

Line = Mapping[Any, float]  # from a size


def _family(name: str) -> str:
    return next((key for key in FAMILIES if name.startswith(key)), "torch")


def curves(
    path: Path, lines: Mapping[str, Line], *, title: str, x: str, y: str, panel: str
) -> None:
    """Draw lines on log-log axes into a PNG, with a legend at the right.

    Args:
        path: File to write.
        lines: For every name the values of y by x.
        title: Title of the figure.
        x: Label of the horizontal axis.
        y: Label of the vertical axis.
        panel: Title of the axes.
    """
    drawn = {name: line for name, line in lines.items() if line}
    figure = new_figure(title, width=9.5, height=5.6)
    axes: Axes = figure.subplots()
    members: dict[str, int] = {}
    for name, line in drawn.items():
        family = _family(name)
        index = members[family] = members.get(family, -1) + 1
        xs = sorted(line)
        axes.plot(
            xs,
            [line[value] for value in xs],
            _STYLES[index % 4],
            marker=_MARKS[index % 4],
            ms=4,
            lw=1.6,
            color=FAMILIES[family],
            label=name.removeprefix("sketch "),
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _ticks(axes, sorted({value for line in drawn.values() for value in line}))
    finish(axes, panel, x, y)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _ticks(axes: Axes, values: Sequence[float]) -> None:
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.set_xticklabels([f"{value:g}" for value in values])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
