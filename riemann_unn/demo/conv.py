"""Experiment: a ResNet-9 of orthogonal convolutions beside the same one of ordinary ones."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .cli import Parser, add_common_options, add_validation, positive, positive_float
from .conv_models import ResNet9, adam, conv_layers, projunn, singular_values
from .experiment import aligned, one_thread
from .images import DigitImages
from .models import Learner
from .training import train_by_options

__all__ = ["LayerState", "Results", "add_arguments", "layer_states", "run", "table"]

_PLAIN_LR = 3e-3


@dataclass(frozen=True)
class LayerState:
    """The state of a convolution.

    Attributes:
        kernel: A copy of its weight.
        values: Singular values of its operator ``(h, w, min(out, in))``, by frequency.
    """

    kernel: Tensor
    values: Tensor


@dataclass(frozen=True)
class Results:
    """The results of a run.

    Attributes:
        task: What was trained on.
        learners: The orthogonal network and the ordinary one.
        before: Their convolutions before training.
        after: And after it.
    """

    task: DigitImages
    learners: Sequence[Learner]
    before: Sequence[Sequence[LayerState]]
    after: Sequence[Sequence[LayerState]]


def add_arguments(parser: Parser, task: str) -> None:
    """Add the options of this experiment.

    Args:
        parser: Takes them.
        task: Its name.
    """
    add_common_options(parser, epochs=12)
    add_validation(parser)
    add = parser.add_argument
    add("--width", type=positive, default=16, help="channels of the first layer (default: 16)")
    add("--rank", type=positive, default=8, help="rank of the updates (default: 8)")
    add(
        "--lr", type=positive_float, default=3e-3, help="rate of the orthogonal net (default: 3e-3)"
    )


def run(args: argparse.Namespace) -> Results:
    """Train both networks on the same batches.

    Args:
        args: As parsed with the options of :func:`add_arguments`.
    """
    task = DigitImages(validation=args.validation, standardized=True)
    torch.manual_seed(args.seed)
    orthogonal = projunn(
        "orthogonal", ResNet9(args.width), lr=args.lr, rank=args.rank, epochs=args.epochs
    )
    torch.manual_seed(args.seed)
    plain = adam("ordinary", ResNet9(args.width, plain=True), lr=_PLAIN_LR, epochs=args.epochs)
    learners = (orthogonal, plain)
    print(f"ResNet-9 on {task.title}, circular convolutions")
    images, _ = task.test_batch()
    before = [layer_states(learner.model, images) for learner in learners]
    with one_thread():
        train_by_options(task, learners, args)
    return Results(task, learners, before, [layer_states(x.model, images) for x in learners])


def layer_states(model: nn.Module, images: Tensor) -> list[LayerState]:
    """Return the kernels and the singular values of every convolution.

    Args:
        model: The network.
        images: An input to find the shapes with.
    """
    layers = conv_layers(model, images)
    kernels = [layer.get_parameter("weight").detach().clone() for layer, _ in layers]
    values = singular_values(model, images)
    return [LayerState(*state) for state in zip(kernels, values, strict=True)]


def table(results: Results) -> str:
    """The final numbers.

    Args:
        results: Of the run.
    """
    head = ["", "parameters", "accuracy", "loss", "seconds", "singular values before"]
    rows = [[*head, "after", "orthogonality error", "kernels"]]
    for learner, first, last in zip(results.learners, results.before, results.after, strict=True):
        history = learner.history
        errors = history.orthogonality
        rows.append(
            [
                learner.name,
                f"{learner.parameters:,}",
                f"{history.test_accuracy[-1]:.1%}",
                f"{history.test_loss[-1]:.3f}",
                f"{sum(history.seconds):.1f}",
                _range(first),
                _range(last),
                f"{max(errors):.1e}" if errors else "-",
                "complex" if any(state.kernel.is_complex() for state in last) else "real",
            ]
        )
    return aligned(rows)


def _range(states: Sequence[LayerState]) -> str:
    low = min(state.values.min().item() for state in states)
    high = max(state.values.max().item() for state in states)
    if max(abs(low - 1), abs(high - 1)) < 1e-3:
        return f"1 ± {max(abs(low - 1), abs(high - 1)):.0e}"
    return f"{low:.2g} to {high:.2g}"
