"""Pictures of convolutions: their kernels, and their singular values at every frequency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from .conv import Results
from .plots import accuracy_panel
from .style import BLUE, GREY, VERMILION, finish, new_figure

__all__ = ["draw", "share_limits", "singular_values_panel"]

_SHOWN = 8


def draw(path: Path, results: Results) -> None:
    """Draw accuracy, singular values and kernels, before and after training, into a PNG.

    Args:
        path: File to write.
        results: Of the run.
    """
    task, learners = results.task, results.learners
    before, after = results.before, results.after
    figure = new_figure(f"ResNet-9 on {task.title}", width=12, height=5.8)
    parts: Any = figure.subfigures(2, 1, height_ratios=(2, 1))
    top, bottom = parts
    axes = top.subplots(1, 3)
    accuracy_panel(axes[0], task, learners)
    values = [[[s.values for s in states] for states in moment] for moment in (before, after)]
    for i, (learner, colour) in enumerate(zip(learners, (BLUE, VERMILION), strict=True)):
        title = f"Singular values, {learner.name}"
        singular_values_panel(axes[i + 1], values[0][i], values[1][i], colour, title)
    share_limits(axes[1:], [states for moment in values for states in moment])
    grid = bottom.subplots(2, 2)
    for row, learner in enumerate(learners):
        for column, (when, moment) in enumerate((("before", before), ("after", after))):
            title = f"{learner.name}, {when} training: kernels of layer 1"
            bound = max(states[row][0].kernel.abs().max().item() for states in (before, after))
            _kernels(grid[column, row], moment[row][0].kernel, title, bound)
    figure.savefig(path)


def singular_values_panel(
    axes: Axes, before: Sequence[Tensor], after: Sequence[Tensor], colour: str, title: str
) -> None:
    """Draw the singular values of every layer, from its lowest frequency to its highest.

    Args:
        axes: Where to draw.
        before: For each layer ``(h, w, count)``, before training.
        after: After training.
        colour: Of those after training.
        title: Of the axes.
    """
    # Side by side, for those of an orthogonal layer are all 1 at both times.
    for values, shade, left in ((before, GREY, -0.4), (after, colour, 0.05)):
        for layer, value in enumerate(values):
            x = layer + 1 + left + 0.35 * _order(value)
            x, y = x.unsqueeze(-1).expand_as(value).flatten(), value.flatten()
            axes.scatter(x.numpy(), y.numpy(), s=6, color=shade, alpha=0.5, lw=0, rasterized=True)
    axes.set_yscale("log")
    axes.set_xticks(range(1, len(before) + 1))
    finish(axes, title, "layer, by frequency; grey: before training", "")


def _order(values: Tensor) -> Tensor:
    """Rank each frequency by its distance from zero, from 0 to 1."""
    squares = [(torch.fft.fftfreq(n)).square() for n in values.shape[:2]]
    distance = squares[0][:, None] + squares[1]
    ranks = distance.flatten().argsort(stable=True).argsort().reshape(distance.shape)
    result: Tensor = ranks / max(ranks.numel() - 1, 1)
    return result


def share_limits(axes: Sequence[Axes], values: Sequence[Sequence[Tensor]]) -> None:
    """Set a common vertical range for panels of singular values.

    Args:
        axes: The panels.
        values: All that is drawn in them.
    """
    low = min(v.min().item() for layers in values for v in layers)
    high = max(v.max().item() for layers in values for v in layers)
    for panel in axes:
        panel.set_ylim(max(low, 1e-3) / 1.5, high * 1.5)


def _kernels(axes: Axes, kernel: Tensor, title: str, bound: float) -> None:
    """Show some channels of a kernel in a row, the site where it acts in the middle."""
    images = kernel[:_SHOWN, 0]
    if images.shape[-1] % 2 == 0:  # as large as the signal, with its origin in the corner
        images = torch.fft.fftshift(images, dim=(-2, -1))
    n = images.shape[-1]
    strip = torch.full((n, len(images) * (n + 1) - 1), torch.nan)
    for i, image in enumerate(images):
        strip[:, i * (n + 1) : i * (n + 1) + n] = image
    axes.imshow(strip.numpy(), cmap="RdBu_r", vmin=-bound, vmax=bound)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_axis_off()
