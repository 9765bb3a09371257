"""The picture of the warm start demo: accuracy against epochs from every start."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from .labels import Label, label_lines, make_room
from .style import BLUE, GREEN, GREY, INK, VERMILION, finish, new_figure
from .warmstart import Results, Trial

__all__ = ["draw"]

# The third covers the second, which is therefore drawn wider.
_STYLES = (
    (GREY, ":", "s", 2),
    (BLUE, "-", "o", 6),
    (VERMILION, "--", "x", 2),
    (GREEN, "-.", "D", 2),
)
_TICKS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)


def draw(path: Path, results: Results) -> None:
    """Draw one panel for each net: the median and the range over seeds from every start.

    Args:
        path: PNG file to write.
        results: Of the run.
    """
    trials = results.trials
    nets = list(dict.fromkeys(trial.net.title for trial in trials))
    figure = new_figure(f"Warm start on {results.task.title}", width=5.6 * len(nets), height=5.4)
    panels = figure.subplots(1, len(nets), squeeze=False, sharey=True)[0]
    for panel, net in zip(panels, nets, strict=True):
        _panel(panel, [trial for trial in trials if trial.net.title == net])
        finish(panel, net[0].upper() + net[1:], "epochs on the manifold", "")
    panels[0].set_ylabel("held-out accuracy (%), logit scale", labelpad=8)
    for panel in panels:
        make_room(panel, 0.26)
        label_lines(panel, [Label(line, str(line.get_label())) for line in panel.lines])
    figure.savefig(path)


def _panel(panel: Axes, trials: Sequence[Trial]) -> None:
    for i, (colour, line, marker, width) in enumerate(_STYLES):
        starts = [trial.starts[i] for trial in trials]
        curves = torch.tensor([start.accuracy for start in starts], dtype=torch.float64)
        curves = curves.clamp(0.02, 0.995)  # a logit scale excludes 0 and 1
        epochs = range(curves.shape[1])
        panel.plot(
            epochs,
            curves.quantile(0.5, 0),
            line,
            color=colour,
            marker=marker,
            lw=width,
            ms=3 + width,
            label=starts[0].name,
        )
        if len(starts) > 1:
            panel.fill_between(epochs, curves.amin(0), curves.amax(0), color=colour, alpha=0.15)
    free = torch.tensor([trial.free for trial in trials], dtype=torch.float64).median().item()
    panel.axhline(free, color=INK, lw=1, label="the trained net")
    panel.set_yscale("logit")
    panel.yaxis.set_major_locator(FixedLocator(_TICKS))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f}"))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.set_ylim(0.05, 0.996)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
