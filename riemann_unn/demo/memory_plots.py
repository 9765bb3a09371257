"""The picture of the memory tasks: losses, orthogonality and the spectrum of the recurrence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from .memory import Results
from .models import Learner
from .plots import accuracy_panel, epoch_axis, label_ends
from .style import BLUE, GREY, INK, LINES, finish, new_figure
from .tasks import Task

__all__ = ["draw"]


def draw(path: Path, results: Results) -> None:
    """Draw learning curves, orthogonality error and the spectrum of the recurrence into a PNG.

    Args:
        path: File to write.
        results: Of the run.
    """
    task, learners = results.task, results.learners
    figure = new_figure(task.title)
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 1))
    accuracy, loss = parts[0].subplots(1, 2)
    accuracy_panel(accuracy, task, learners)
    _loss(loss, task, learners)
    error, spectrum = parts[1].subplots(1, 2, width_ratios=(2.2, 1))
    _orthogonality(error, task, learners[0])
    _spectrum(spectrum, results.recurrence)
    figure.savefig(path)


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
    epoch_axis(axes, learners[0])
    last = [learner.history.test_loss[-1] for learner in learners]
    names = [learner.name for learner in learners]
    label_ends(axes, len(learners[0].history.test_loss), last, names, gap=0.08)
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
    low = min([1e-8, *(error for error in errors if error > 0)])
    axes.set_ylim(low / 1.5, max(1e-5, *errors) * 1.5)
    epoch_axis(axes, learner)
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
    axes.set_aspect("equal")
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
