"""The picture the demo leaves: did it learn, did it stay orthogonal, what did it become."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from .models import Learner
from .style import BLUE, GREY, INK, LINES, finish, new_figure
from .tasks import Task

__all__ = ["accuracy_panel", "save_figure", "spread"]


def save_figure(path: Path, task: Task, learners: Sequence[Learner], recurrence: Tensor) -> None:
    """Draw learning curves, orthogonality error and the spectrum of the recurrence into a PNG.

    Args:
        path: File to write.
        task: The task the learners were trained on.
        learners: The learners, the orthogonal one first.
        recurrence: Its recurrent matrix ``(n, n)``.
    """
    figure = new_figure(task.title)
    axes = figure.subplots(2, 2)
    accuracy_panel(axes[0, 0], task, learners)
    _loss(axes[0, 1], task, learners)
    _orthogonality(axes[1, 0], task, learners[0])
    _spectrum(axes[1, 1], recurrence)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="upper right", ncols=2, frameon=False
    )
    figure.savefig(path)


def spread(values: Sequence[float], *, gap: float) -> list[float]:
    """Heights for labels near some values: in the same order, and a gap apart at least.

    Args:
        values: What the labels belong to; equal ones keep their order.
        gap: In the unit of the values.
    """
    order = sorted(range(len(values)), key=lambda i: (values[i], -i))
    heights = list(values)
    for below, above in pairwise(order):
        heights[above] = max(heights[above], heights[below] + gap)
    shift = max(heights[order[-1]] - max(values), 0) / 2 if order else 0
    return [height - shift for height in heights]


def accuracy_panel(axes: Axes, task: Task, learners: Sequence[Learner]) -> None:
    """Draw the held-out accuracy of every learner against epochs.

    Args:
        axes: Where to draw.
        task: The task the learners were trained on.
        learners: The learners, at most three.
    """
    last = [100 * learner.history.test_accuracy[-1] for learner in learners]
    for learner, height, (colour, line) in zip(learners, spread(last, gap=6), LINES, strict=False):
        values = [100 * value for value in learner.history.test_accuracy]
        epochs = range(1, len(values) + 1)
        axes.plot(epochs, values, line, color=colour, lw=2, marker="o", ms=4, label=learner.name)
        axes.annotate(
            f"{values[-1]:.1f} %",
            (len(values), height),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
        )
    axes.set_ylim(-2, 103)
    _epochs(axes, learners[0])
    finish(axes, f"Held-out {task.score}", "epoch", f"{task.score} (%)")


def _loss(axes: Axes, task: Task, learners: Sequence[Learner]) -> None:
    per_epoch = task.batches_per_epoch
    for learner, (colour, line) in zip(learners, LINES, strict=False):
        history = learner.history
        x = [(i + 1) / per_epoch for i in range(len(history.train_loss))]
        axes.plot(x, history.train_loss, color=colour, lw=0.7, alpha=0.3)
        epochs = range(1, len(history.test_loss) + 1)
        axes.plot(epochs, history.test_loss, line, color=colour, lw=2, label=learner.name)
    axes.axhline(task.baseline, color=GREY, lw=1.2, ls=":")
    axes.annotate(
        "no memory",
        (1, task.baseline),
        xycoords=("axes fraction", "data"),
        xytext=(-4, -13),
        textcoords="offset points",
        ha="right",
        color=GREY,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8},
    )
    axes.set_yscale("log")
    _epochs(axes, learners[0])
    finish(axes, "Loss: held-out (thick), each training batch (thin)", "epoch", "loss")


def _orthogonality(axes: Axes, task: Task, learner: Learner) -> None:
    errors = learner.history.orthogonality
    x = [(i + 1) / task.batches_per_epoch for i in range(len(errors))]
    axes.plot(x, errors, color=BLUE, lw=1.4)
    epsilon = torch.finfo(torch.float32).eps
    axes.axhline(epsilon, color=GREY, lw=1.2, ls=":")
    axes.annotate(
        "float32 epsilon",
        (1, epsilon),
        xycoords=("axes fraction", "data"),
        xytext=(-4, -12),
        textcoords="offset points",
        ha="right",
        color=GREY,
    )
    axes.set_yscale("log")
    axes.set_ylim(min(1e-8, *errors) / 1.5, max(1e-5, *errors) * 1.5)
    _epochs(axes, learner)
    title = f"Off the manifold after every step: at most {max(errors):.1e}"
    finish(axes, title, "epoch", r"$\|W^{H}W - I\|_F\,/\,\sqrt{n}$")


def _spectrum(axes: Axes, recurrence: Tensor) -> None:
    double = torch.complex128 if recurrence.is_complex() else torch.float64
    values = torch.linalg.eigvals(recurrence.detach().to(double)).cpu()
    angle = torch.linspace(0, 2 * torch.pi, 361)
    axes.plot(angle.cos(), angle.sin(), color=GREY, lw=1)
    axes.axhline(0, color=GREY, lw=0.5)
    axes.axvline(0, color=GREY, lw=0.5)
    axes.scatter(values.real, values.imag, s=26, color=BLUE, alpha=0.75, edgecolor="white", lw=0.5)
    axes.set_aspect("equal", anchor="W")
    axes.set_xlim(-1.2, 1.2)
    axes.set_ylim(-1.2, 1.2)
    axes.set_xticks([-1, 0, 1])
    axes.set_yticks([-1, 0, 1])
    farthest = (values.abs() - 1).abs().max().item()
    axes.annotate(
        f"all {len(values)} within\n{farthest:.0e} of\nthe unit circle",
        (0, 0),
        ha="center",
        va="center",
        color=INK,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 3},
    )
    finish(axes, "Eigenvalues of the recurrent matrix", "real part", "imaginary part")
    axes.grid(False)


def _epochs(axes: Axes, learner: Learner) -> None:
    last = len(learner.history.test_loss)
    axes.set_xlim(0, last * 1.04)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
