"""Panels that several pictures share, and labels that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from .labels import spread
from .models import Learner
from .style import LINES, finish
from .tasks import Task

__all__ = ["accuracy_panel", "epoch_axis", "label_ends"]


def label_ends(
    axes: Axes, x: float, heights: Sequence[float], labels: Sequence[str], *, gap: float
) -> None:
    """Label lines at their right ends, in the colours of :data:`LINES`, none over another.

    Args:
        axes: Where to draw.
        x: Where the lines end.
        heights: And at what height.
        labels: Their texts.
        gap: Between labels, as a share of the height of the axes.
    """
    low, high = axes.get_ylim()
    if axes.get_yscale() == "log":
        low, high = math.log10(low), math.log10(high)
        heights = [math.log10(height) if height > 0 else low for height in heights]
    shares = [(height - low) / (high - low) for height in heights]
    # A run that has diverged is labelled at the top; a name of two lines stays above the axis.
    shares = [min(x, 1.0) if math.isfinite(x) else 1.0 for x in shares]
    lows = [0.03 + 0.03 * label.count("\n") for label in labels]
    shares = spread([max(x, low) for x, low in zip(shares, lows, strict=True)], gap=gap)
    for share, label, (colour, _) in zip(shares, labels, LINES, strict=False):
        axes.annotate(
            label,
            (x, share),
            xycoords=("data", "axes fraction"),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
            annotation_clip=False,
        )


def accuracy_panel(axes: Axes, task: Task, learners: Sequence[Learner]) -> None:
    """Draw the held-out accuracy of every learner against epochs.

    Args:
        axes: Where to draw.
        task: The task the learners were trained on.
        learners: The learners, at most three.
    """
    for learner, (colour, line) in zip(learners, LINES, strict=False):
        values = [100 * value for value in learner.history.test_accuracy]
        epochs = range(1, len(values) + 1)
        axes.plot(epochs, values, line, color=colour, lw=2, marker="o", ms=4, label=learner.name)
    least = min(100 * value for x in learners for value in x.history.test_accuracy)
    axes.set_ylim(*((-2, 103) if least < 45 else (5 * (least // 5) - 2, 101)))
    epoch_axis(axes, learners[0])
    last = [100 * learner.history.test_accuracy[-1] for learner in learners]
    labels = [
        f"{learner.name}\n{value:.1f} %" for learner, value in zip(learners, last, strict=True)
    ]
    label_ends(axes, len(learners[0].history.test_accuracy), last, labels, gap=0.14)
    finish(axes, f"Held-out {task.score}", "epoch", f"{task.score} (%)")


def epoch_axis(axes: Axes, learner: Learner) -> None:
    """Let the horizontal axis be epochs.

    Args:
        axes: The axes.
        learner: How many it was trained for.
    """
    last = len(learner.history.test_loss)
    axes.set_xlim(0, last * 1.04)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
