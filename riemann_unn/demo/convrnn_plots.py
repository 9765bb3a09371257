"""The picture of states over time: norms, and what a linear readout recovers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from .convrnn import Results, Trace
from .images import DigitImages
from .labels import Label, label_lines
from .models import Learner
from .style import GREY, LINES, finish, new_figure

__all__ = ["draw", "mosaic"]

_FLOOR, _CEILING = 1e-12, 1e12


def draw(path: Path, results: Results) -> None:
    """Draw norms, accuracy of a linear readout, and the images it reads, into a PNG.

    Args:
        path: File to write.
        results: Of the run.
    """
    task, learners, traces = results.task, results.learners, results.traces
    last = max(traces[0].accuracy)
    figure = new_figure(f"One look, then {last} steps without input, {task.title}", height=6.4)
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    top, bottom = parts
    axes = top.subplots(1, 3)
    _norms(axes[0], learners, results.before, "Norm of the state, before training")
    _norms(axes[1], learners, results.after, "Norm of the state, after training")
    limits = [limit for panel in axes[:2] for limit in panel.get_ylim()]
    for panel in axes[:2]:
        panel.set_ylim(max(min(limits), _FLOOR), min(max(limits), _CEILING))
    for learner, trace, (colour, line) in zip(learners, traces, LINES, strict=False):
        accuracy = [100 * value for value in trace.accuracy.values()]
        style = {"color": colour, "lw": 2, "marker": "o", "ms": 4, "label": learner.name}
        axes[2].plot(list(trace.accuracy), accuracy, line, **style)
    axes[2].axhline(10, color=GREY, lw=1.2, ls=":")
    axes[2].annotate("guessing", (0, 10), xytext=(2, 3), textcoords="offset points", color=GREY)
    axes[2].set_ylim(-2, 103)
    finish(axes[2], "Told by a linear readout", "step", "accuracy (%)")
    _images(bottom.subplots(1, len(learners) + 1), task, learners, traces)
    for panel in axes:
        lines = panel.lines[: len(learners)]
        label_lines(panel, [Label(line, _name(str(line.get_label())), size=9) for line in lines])
    figure.savefig(path)


def _norms(axes: Axes, learners: Sequence[Learner], norms: Sequence[Tensor], title: str) -> None:
    for learner, values, (colour, line) in zip(learners, norms, LINES, strict=False):
        shown = values.nan_to_num(_CEILING, posinf=_CEILING).clamp(_FLOOR / 10, _CEILING * 10)
        axes.plot(shown, line, color=colour, lw=2, label=learner.name)
    axes.set_yscale("log")
    finish(axes, title, "step", "")


def _images(
    axes: Sequence[Axes], task: DigitImages, learners: Sequence[Learner], traces: Sequence[Trace]
) -> None:
    marks = [0, *sorted(traces[0].pictures)[-3::2]]
    truth = task.test_batch()[0][: len(traces[0].pictures[0]), 0]
    low, high = truth.min().item(), truth.max().item()
    mosaic(axes[0], [truth], ["seen"], (low, high), "held-out images")
    for place, learner, trace in zip(axes[1:], learners, traces, strict=True):
        rows = [trace.pictures[mark] for mark in marks]
        labels = [f"step {mark}" for mark in marks]
        mosaic(place, rows, labels, (low, high), _name(learner.name))


def _name(name: str) -> str:
    """A long one in two lines."""
    return name.replace(", ", ",\n")


def mosaic(
    axes: Axes,
    rows: Sequence[Tensor],
    labels: Sequence[str],
    limits: tuple[float, float],
    title: str,
) -> None:
    """Show rows of images, each with a label.

    Args:
        axes: Where to draw.
        rows: Images ``(N, height, width)``.
        labels: One for each row.
        limits: Values that are white and black.
        title: Of the axes.
    """
    height, width = rows[0].shape[1:]
    tall, wide = height + 1, width + 1
    canvas = torch.full((tall * len(rows) - 1, wide * len(rows[0]) - 1), torch.nan)
    for i, images in enumerate(rows):
        for j, image in enumerate(images):
            canvas[tall * i : tall * i + height, wide * j : wide * j + width] = image
    axes.imshow(canvas.numpy(), cmap="gray_r", vmin=limits[0], vmax=limits[1])
    middle = (height - 1) / 2
    axes.set_yticks([tall * i + middle for i in range(len(rows))], labels)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left", fontsize=10)
