"""The picture of the certified network: accuracy against the size of a perturbation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes

from .conv_plots import share_limits, singular_values_panel
from .labels import Label, label_lines
from .lipschitz import EPSILONS, Results, Robustness
from .models import Learner
from .style import LINES, finish, new_figure

__all__ = ["draw"]


def draw(path: Path, results: Results) -> None:
    """Draw certified accuracy, accuracy under attack and singular values into a PNG.

    Args:
        path: File to write.
        results: Of the run.
    """
    learners, before, after = results.learners, results.before, results.after
    figure = new_figure(f"Certified robustness, {results.task.title}", width=14, height=4.6)
    axes = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
    _accuracy(axes[0], learners, results.held)
    for place, learner, one, last, (colour, _) in zip(
        axes[1:], learners, before, after, LINES, strict=False
    ):
        singular_values_panel(place, one, last, colour, f"Singular values, {learner.name}")
    share_limits(axes[1:], [*before, *after])
    label_lines(axes[0], [Label(line, str(line.get_label()), size=9) for line in axes[0].lines])
    figure.savefig(path)


def _accuracy(axes: Axes, learners: Sequence[Learner], held: Sequence[Robustness]) -> None:
    grid = torch.linspace(0, EPSILONS[-1], 201).tolist()
    for learner, one, (colour, line) in zip(learners, held, LINES, strict=False):
        certified = [100 * one.certified(e) for e in grid]
        label = f"{learner.name}, certified (L = {one.lipschitz:.3g})"
        axes.plot(grid, certified, line, color=colour, lw=2, label=label)
        clean = 100 * learner.history.test_accuracy[-1]
        attacked = [clean, *(100 * one.withstood(e) for e in EPSILONS)]
        label = f"{learner.name}, under attack (PGD)"
        axes.plot([0, *EPSILONS], attacked, "o:", color=colour, lw=1, ms=5, label=label)
    axes.set_ylim(-8, 103)
    title = "Certified accuracy (lines), accuracy under attack (dots)"
    finish(axes, title, "2-norm of the perturbation, pixels 0 to 1", "accuracy (%)")
