"""The picture of a lattice's memory: norms, accuracy by delay, and the pictures that are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes

from riemann_unn.demo.convrnn_plots import mosaic
from riemann_unn.demo.style import GREY, LINES, PURPLE, finish, new_figure

from .experiment import Result, median

__all__ = ["save_lattice"]

_CEILING = 1e3
_STYLES = (*LINES, (PURPLE, ":"))


def save_lattice(
    path: Path, waves: Result, found: Mapping[str, Sequence[Result]], names: Mapping[str, str]
) -> None:
    """Draw what happens to the norm, to the class and to the pictures, into a PNG.

    Args:
        path: File to write.
        waves: Result of the run without training.
        found: Results of networks that were read, by kernel, one for each seed.
        names: Of the kernels.
    """
    last = next(iter(found.values()))[0]["marks"][-1]
    title = f"One look at a picture, then {last:,} steps without input; {waves['pictures']}"
    figure = new_figure(title, width=12, height=6.8)
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.3, 1))
    top, bottom = parts
    left, right = top.subplots(1, 2)
    _norms(left, waves["norms"])
    _accuracy(right, found, names)
    trained = {kernel: own for kernel, own in found.items() if "trained" in own[0]} or found
    _pictures(bottom.subplots(1, len(trained) + 1), trained, names)
    figure.savefig(path)


def _norms(axes: Axes, norms: Mapping[str, Sequence[float]]) -> None:
    for (name, norm), (colour, line) in zip(norms.items(), LINES, strict=True):
        axes.plot(range(1, len(norm)), norm[1:], line, color=colour, lw=2.2, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(1e-2, _CEILING)
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    finish(axes, "Norm of the state, kernels not trained", "step", "norm / first norm")


def _accuracy(axes: Axes, found: Mapping[str, Sequence[Result]], names: Mapping[str, str]) -> None:
    for (kernel, own), (colour, line) in zip(found.items(), _STYLES, strict=False):
        marks = own[0]["marks"]
        runs = [[100 * value for value in run["accuracy"]] for run in own]
        middle = [median(run[i] for run in runs) for i in range(len(marks))]
        for run in runs:
            axes.plot(marks, run, line, color=colour, lw=0.8, alpha=0.35)
        axes.plot(marks, middle, line, color=colour, lw=2.2, marker="o", ms=5, label=names[kernel])
    axes.axhline(10, color=GREY, lw=1.2, ls=":")
    axes.annotate("guessing", (marks[-1], 5), ha="right", color=GREY, fontsize=9)
    axes.set_ylim(0, 100)
    axes.legend(loc="center right", frameon=False, fontsize=9, bbox_to_anchor=(1, 0.64))
    finish(axes, "Class read from the state", "steps since the picture", "test accuracy (%)")


def _pictures(
    places: Sequence[Axes], found: Mapping[str, Sequence[Result]], names: Mapping[str, str]
) -> None:
    first = next(iter(found.values()))[0]
    seen = torch.tensor(first["seen"])
    limits = (seen.min().item(), seen.max().item())
    mosaic(places[0], [seen], ["seen"], limits, "test pictures")
    for place, (kernel, own) in zip(places[1:], found.items(), strict=True):
        rows = [torch.tensor(read) for read in own[0]["read"][1:]]
        labels = [f"step {mark}" for mark in own[0]["marks"][1:]]
        mosaic(place, rows, labels, limits, names[kernel].replace(", ", ",\n"))
