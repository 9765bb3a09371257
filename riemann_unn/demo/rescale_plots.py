"""The picture of the rescaling demo: accuracy against epochs, with the spread over seeds."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from .labels import Label, label_lines
from .rescale import Results, Run
from .style import BLUE, GREY, finish, new_figure

__all__ = ["draw"]

_STYLES = ((GREY, "--", "as initialised"), (BLUE, "-", "path-conditioned"))


def draw(path: Path, results: Results) -> None:
    """Draw one panel for each case: median and range over the seeds.

    Args:
        path: PNG file to write.
        results: Of all runs.
    """
    cases, per_epoch = results.cases, results.per_epoch
    columns = len({name[:2] for name, _, _ in cases})
    rows = max(1, len(cases) // columns)
    title = "Handwritten digits: the same functions in weights that train well and badly"
    figure = new_figure(title, width=3.1 * columns + 0.6, height=2.7 * rows + 0.9)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for i, (name, *groups) in enumerate(cases):
        panel = axes[i % rows][i // rows]
        _panel(panel, groups, per_epoch)
        x = "epoch" if i % rows == rows - 1 else ""
        y = "test accuracy (%)" if i // rows == 0 else ""
        finish(panel, ", ".join(name), x, y)
    for panel in axes.flat:
        label_lines(panel, [Label(line, str(line.get_label())) for line in panel.lines[:2]])
    figure.savefig(path)


def _panel(panel: Axes, groups: list[list[Run]], per_epoch: int) -> None:
    for group, (colour, line, label) in zip(groups, _STYLES, strict=True):
        curves = 100 * torch.tensor([run.accuracy for run in group], dtype=torch.float64)
        epochs = torch.arange(curves.shape[1]) / per_epoch
        panel.plot(epochs, curves.quantile(0.5, 0), line, color=colour, lw=2, label=label)
        low, high = curves.amin(0), curves.amax(0)
        panel.fill_between(epochs, low, high, color=colour, alpha=0.18, lw=0)
    panel.axhline(90, color="#BBBBBB", lw=1, ls=":")
    panel.set_ylim(0, 106)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
