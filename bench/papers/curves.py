"""Pictures of what a run measured while it was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from riemann_unn.demo.labels import Label, label_lines, make_room
from riemann_unn.demo.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    VERMILION,
    finish,
    new_figure,
)

__all__ = ["Curve", "Panel", "curves"]

# Okabe and Ito's, with line styles that differ in grey too.
LOOKS: tuple[tuple[str, Any], ...] = (
    (BLUE, "-"),
    (VERMILION, "--"),
    (GREEN, "-."),
    (PURPLE, (0, (1, 1))),
    (GREY, "-"),
    (ORANGE, (0, (5, 1, 1, 1, 1, 1))),
)
_APART = 0.04  # of the height of the axes


@dataclass(frozen=True)
class Curve:
    """A line with its label.

    Attributes:
        label: At its end.
        x: Of its points.
        y: Of its points.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """A pair of axes.

    Attributes:
        title: What is seen.
        x: Label of the horizontal axis.
        y: Label of the vertical axis.
        lines: The curves.
        level: A value to compare with, and its name.
        log: Whether the vertical axis is logarithmic.
        limits: Of the vertical axis.
        percent: Whether the values are shares.
    """

    title: str
    x: str
    y: str
    lines: Sequence[Curve]
    level: tuple[float, str] | None = None
    log: bool = False
    limits: tuple[float, float] | None = None
    percent: bool = False


def curves(file: Path, title: str, panels: Sequence[Panel]) -> None:
    """Draw panels side by side.

    Args:
        file: The picture.
        title: Above all.
        panels: One or two.
    """
    figure = new_figure(title, width=5.6 * len(panels) if len(panels) > 1 else 7.6, height=4.4)
    names = dict.fromkeys(curve.label for panel in panels for curve in panel.lines)
    looks = dict(zip(names, LOOKS, strict=False))  # the same label looks the same in every panel
    named: set[str] = set()
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        lines = _draw(axes, panel, looks)
        make_room(axes, 0.35)
        label_lines(axes, [Label(lines[name], name, 9) for name in _to_name(axes, lines, named)])
        named |= set(lines)
    figure.savefig(file)


def _to_name(axes: Axes, lines: Mapping[str, Line2D], named: set[str]) -> list[str]:
    """Names that are new, or whose line ends apart from the others."""
    ends = {
        name: axes.transLimits.transform(axes.transScale.transform(line.get_xydata()[-1]))[1]
        for name, line in lines.items()
    }
    return [
        name
        for name, end in ends.items()
        if name not in named
        or all(abs(end - other) > _APART for n, other in ends.items() if n != name)
    ]


def _draw(axes: Axes, panel: Panel, looks: Mapping[str, tuple[str, Any]]) -> dict[str, Line2D]:
    lines: dict[str, Line2D] = {}
    for curve in panel.lines:
        colour, line = looks[curve.label]
        (lines[curve.label],) = axes.plot(curve.x, curve.y, color=colour, ls=line, lw=1.9)
    if panel.level is not None:
        value, name = panel.level
        axes.axhline(value, color=INK, lw=1.1, ls=(0, (6, 3)))
        axes.annotate(
            name,
            (0.99, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, -3),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=9,
            color=INK,
        )
    if panel.log:
        axes.set_yscale("log")
    if panel.limits is not None:
        axes.set_ylim(*panel.limits)
    if panel.percent:
        axes.yaxis.set_major_formatter("{x:.0%}")
    finish(axes, panel.title, panel.x, panel.y)
    return lines
