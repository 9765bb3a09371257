"""The picture of ordinary and orthogonal convolutions: accuracy and singular values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from riemann_unn.demo.plots import spread
from riemann_unn.demo.style import BLUE, GREY, ORANGE, SKY, VERMILION, finish, new_figure

from .experiment import Result, median

__all__ = ["save_nets"]

STYLES = {
    "orthogonal, BatchNorm": (BLUE, "-"),
    "ordinary, BatchNorm": (VERMILION, "-"),
    "orthogonal": (SKY, "--"),
    "ordinary": (ORANGE, "--"),
}


def save_nets(
    path: Path, title: str, nets: Mapping[str, Sequence[Result]], final: Mapping[str, float]
) -> None:
    """Draw accuracy by epoch, and the range of singular values of every layer, into a PNG.

    Args:
        path: File to write.
        title: Of the picture.
        nets: Results by network, one for each seed.
        final: Median of the last accuracies in percent, by network.
    """
    figure = new_figure(title, width=11, height=4.4)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    _accuracy(left, nets, final)
    _values(right, nets)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(nets), frameon=False)
    figure.savefig(path)


def _accuracy(axes: Axes, nets: Mapping[str, Sequence[Result]], final: Mapping[str, float]) -> None:
    low = max(min(min(final.values()) - 8, 92), 0)
    heights = spread(list(final.values()), gap=(100 - low) / 18)
    for (name, last), height in zip(final.items(), heights, strict=True):
        colour, line = STYLES[name]
        runs = [[100 * share for share in net["accuracy"]] for net in nets[name]]
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
    finish(axes, "Test accuracy", "epoch", "accuracy (%)")


def _values(axes: Axes, nets: Mapping[str, Sequence[Result]]) -> None:
    """A thin line from the least to the largest, a thick one around nine in ten."""
    axes.axhline(1, color=GREY, lw=1, ls=":")
    for i, (name, own) in enumerate(nets.items()):
        colour, _ = STYLES[name]
        for layer, quantiles in enumerate(own[0]["values"]):
            x = layer + 1 + 0.2 * (i - (len(nets) - 1) / 2)
            label = name if layer == 0 else None
            axes.plot([x, x], [quantiles[0], quantiles[-1]], color=colour, lw=1.2)
            axes.plot([x, x], [quantiles[1], quantiles[-2]], color=colour, lw=4, alpha=0.5)
            axes.plot(x, quantiles[len(quantiles) // 2], "o", color=colour, ms=4.5, label=label)
    axes.set_yscale("log")
    axes.set_xticks(range(1, 9))
    finish(axes, "Singular values of each convolution after training", "layer", "")
