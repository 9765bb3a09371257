"""The picture of ordinary and orthogonal convolutions: accuracy, and what became of the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from riemann_unn.demo.plots import spread
from riemann_unn.demo.style import GREY, LINES, finish, new_figure

from .experiment import Result, median

__all__ = ["save_nets"]


def save_nets(path: Path, title: str, found: Sequence[Result], final: Mapping[str, float]) -> None:
    """Draw accuracy by epoch, and the range of singular values of every layer, into a PNG.

    Args:
        path: File to write.
        title: Of the picture.
        found: Results, one for each seed.
        final: Median of the last accuracies in percent, by network.
    """
    figure = new_figure(title, width=11, height=4.4)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    _accuracy(left, found, final)
    _values(right, found, list(final))
    figure.savefig(path)


def _accuracy(axes: Axes, found: Sequence[Result], final: Mapping[str, float]) -> None:
    low = max(min(min(final.values()) - 8, 92), 0)
    heights = spread(list(final.values()), gap=(100 - low) / 18)
    for (name, last), height, (colour, line) in zip(final.items(), heights, LINES, strict=True):
        runs = [[100 * share for share in run[name]["accuracy"]] for run in found]
        epochs = range(1, len(runs[0]) + 1)
        for run in runs:
            axes.plot(epochs, run, line, color=colour, lw=0.8, alpha=0.35)
        middle = [median(run[i] for run in runs) for i in range(len(epochs))]
        axes.plot(epochs, middle, line, color=colour, lw=2.2, marker="o", ms=4, label=name)
        axes.annotate(
            f"{last:.1f} %",
            (len(epochs), height),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
        )
    axes.set_ylim(low, 100)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    finish(axes, "Test accuracy", "epoch", "accuracy (%)")


def _values(axes: Axes, found: Sequence[Result], names: Sequence[str]) -> None:
    """A thin line from the least to the largest, a thick one around nine in ten."""
    axes.axhline(1, color=GREY, lw=1, ls=":")
    for i, (name, (colour, _)) in enumerate(zip(names, LINES, strict=True)):
        for layer, quantiles in enumerate(found[0][name]["values"]):
            x = layer + 1 + 0.22 * (i - 1)
            label = name if layer == 0 else None
            axes.plot([x, x], [quantiles[0], quantiles[-1]], color=colour, lw=1.2)
            axes.plot([x, x], [quantiles[1], quantiles[-2]], color=colour, lw=4, alpha=0.5)
            axes.plot(x, quantiles[len(quantiles) // 2], "o", color=colour, ms=4.5, label=label)
    axes.set_yscale("log")
    axes.set_xticks(range(1, len(found[0][names[0]]["values"]) + 1))
    axes.set_ylim(axes.get_ylim()[0] / 3, None)
    axes.legend(loc="lower center", frameon=False, fontsize=9, ncols=3)
    finish(axes, "Singular values of each convolution after training", "layer", "")
