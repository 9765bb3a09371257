"""The picture of low rank: errors by rank, and accuracy of training from scratch."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from .labels import Label, label_lines, make_room
from .lowrank import METHODS, RANKS, STARTS, Results
from .style import BLUE, GREEN, GREY, INK, VERMILION, finish, new_figure

__all__ = ["draw"]

# The fourth covers the third, which is therefore drawn wider.
_METHOD_LINES = ((GREY, "--", 2), (VERMILION, ":", 2), (GREEN, "-", 5), (BLUE, "-", 2))
_START_LINES = ((VERMILION, "-."), (GREY, "--"), (BLUE, "-"))


def draw(path: Path, results: Results) -> None:
    """Draw accuracy and error by rank, and accuracy by epoch from every start, into a PNG.

    Args:
        path: File to write.
        results: Of the run.
    """
    figure = new_figure(f"Low rank that keeps the function of a layer, {results.title}")
    axes = figure.subplots(2, 2)
    _by_rank(axes[0, 0], axes[0, 1], results)
    for place, factors in zip(axes[1], ("plain", "orthonormal"), strict=True):
        by = "Adam" if factors == "plain" else "ProjUNN-T"
        _by_epoch(
            place, results, factors, f"Trained at rank {results.rank}: {factors} factors, {by}"
        )
    low = min(place.get_ylim()[0] for place in axes[1])
    for place in axes[1]:
        place.set_ylim(low, 102)
    for place, room in zip(axes.flat, (0.1, 0.5, 0.2, 0.2), strict=True):
        make_room(place, room)
        label_lines(place, [Label(line, str(line.get_label()), size=9) for line in place.lines])
    figure.savefig(path)


def _by_rank(accuracy: Axes, error: Axes, results: Results) -> None:
    for name, (colour, line, width) in zip(METHODS, _METHOD_LINES, strict=True):
        right = [100 * median(results.accuracy[name, rank]) for rank in RANKS]
        off = [median(results.error[name, rank]) for rank in RANKS]
        for place, values in ((accuracy, right), (error, off)):
            place.plot(
                RANKS, values, line, color=colour, lw=width, marker="o", ms=2 + width, label=name
            )
    dense = 100 * median(results.dense)
    accuracy.axhline(dense, color=INK, lw=1, label="full rank")
    accuracy.set_ylim(top=108)
    error.set_yscale("log")
    for place in (accuracy, error):
        place.set_xscale("log", base=2)
        place.set_xticks(RANKS, [str(rank) for rank in RANKS])
    finish(accuracy, "One layer compressed, without training", "rank", "accuracy (%)")
    finish(error, "Error of the layer's function, held out", "rank", "relative error")


def _by_epoch(axes: Axes, results: Results, factors: str, title: str) -> None:
    for start, (colour, line) in zip(STARTS, _START_LINES, strict=True):
        columns = list(zip(*results.trained[factors, start], strict=True))
        epochs = range(1, len(columns) + 1)
        middle = [100 * median(column) for column in columns]
        low, high = ([100 * pick(column) for column in columns] for pick in (min, max))
        axes.plot(epochs, middle, line, color=colour, lw=2, marker="o", ms=3, label=start)
        axes.fill_between(epochs, low, high, color=colour, alpha=0.12, lw=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    finish(axes, title, "epoch", "accuracy (%), median and range")
