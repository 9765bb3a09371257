"""Experiment: how long a recurrent convolution keeps an image in its state.

A network sees a digit at step 0 and no input after it. At every step the state, an image on a
torus, is convolved with a kernel; after some tens of steps a linear layer has to classify the
digit, for which all is trained. Then the recurrence continues, many times longer than in training,
and at chosen steps a linear readout, fitted in closed form on the training images, shows what can
still be recovered from the state.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import riemann_unn as ru

from ..linalg import conv_singular_values
from ..nn import ConvRNN
from .cli import Choice, Parser, add_common_options, add_validation, positive, positive_float
from .experiment import aligned, one_thread
from .images import DigitImages, PictureImages
from .models import Learner
from .tasks import Batch, Task
from .training import train_by_options

__all__ = ["ImageMemory", "Results", "Trace", "add_arguments", "norms", "read_out", "run", "table"]

_NONLINEARITIES = ("modrelu", "phase_sigmoid", "identity")
_SHOWN = 4
_RIDGE = 1e-3
_CHUNK = 25
_NUMBERS = 25_000_000  # at most so many in the states held at once


class ImageMemory(nn.Module):
    """A ConvRNN that sees an image once, runs without input, and classifies it.

    Args:
        channels: Of the state.
        steps: From the image to the answer.
        nonlinearity: Of the recurrence; modReLU's thresholds start at zero.
        kernel: ``"unitary"``; ``"same"``, the same first kernel without its constraint; or
            ``"default"``, first values of ``nn.Conv2d`` on 3 by 3 sites without a constraint.
        size: Sites of the lattice, as many as an image has pixels along each side.
        dtype: Of the state.
    """

    def __init__(
        self,
        channels: int,
        *,
        steps: int,
        nonlinearity: str = "modrelu",
        kernel: str = "unitary",
        size: tuple[int, int] = (8, 8),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.steps = steps
        self.rnn = ConvRNN(1, channels, size, nonlinearity, dtype=dtype)
        if nonlinearity == "modrelu":
            nn.init.zeros_(self.rnn.activation.get_parameter("bias"))
        if kernel != "unitary":
            ru.untag_(self.rnn.kernel)
        if kernel == "default":
            values = nn.Conv2d(channels, channels, 3, dtype=dtype).weight
            with torch.no_grad():
                height, width = size
                whole = functional.pad(values, (0, width - 3, 0, height - 3))
                self.rnn.kernel.copy_(whole.roll((-1, -1), (-2, -1)))
        numbers = math.prod(size) * channels * (2 if dtype.is_complex else 1)
        self.head = nn.Linear(numbers, 10)

    def first(self, images: Tensor) -> Tensor:
        """The state after an image.

        Args:
            images: ``(N, 1, height, width)``.
        """
        state: Tensor = self.rnn(images.unsqueeze(0))[1]
        return state

    def forward(self, images: Tensor) -> Tensor:
        """Classify after ``steps`` steps.

        Args:
            images: ``(N, 1, height, width)``.
        """
        logits: Tensor = self.head(
            features(self.rnn.evolve(self.first(images), steps=self.steps)[-1])
        )
        return logits


class ClippedLearner(Learner):
    """Clips gradients to norm 1, as is usual for recurrent networks, and skips those not finite."""

    def step(self, task: Task, inputs: Tensor, targets: Tensor) -> float:
        self.model.train()
        self.optimizer.zero_grad()
        loss = task.loss(self.model(inputs), targets)
        loss.backward()
        if torch.isfinite(nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)):
            self.optimizer.step()
        return loss.item()


@dataclass(frozen=True)
class Trace:
    """The results of a linear readout of the states of a trained network.

    Attributes:
        accuracy: Share of held-out images classified correctly, by step.
        pictures: The first few held-out images as read from the state, by step.
        explained: Share of the variance of held-out pixels that is recovered, by step.
    """

    accuracy: dict[int, float]
    pictures: dict[int, Tensor]
    explained: dict[int, float]


@dataclass(frozen=True)
class Results:
    """The results of a run.

    Attributes:
        task: What was trained on.
        learners: The three networks.
        before: Norm of the state at every step before training.
        after: And after it.
        traces: The readouts of the states after training.
    """

    task: DigitImages
    learners: Sequence[Learner]
    before: Sequence[Tensor]
    after: Sequence[Tensor]
    traces: Sequence[Trace]


def add_arguments(parser: Parser, task: str) -> None:
    """Add the options of this experiment.

    Args:
        parser: Takes them.
        task: Its name.
    """
    add_common_options(parser, epochs=2)
    add_validation(parser)
    add = parser.add_argument
    add("--channels", type=positive, default=4, help="channels of the state (default: 4)")
    add("--steps", type=positive, default=500, help="steps to keep the picture (default: 500)")
    add("--train-steps", type=positive, default=50, help="steps in training (default: 50)")
    add("--complex", action="store_true", help="complex states and a unitary kernel")
    add(
        "--nonlinearity",
        type=Choice(_NONLINEARITIES),
        default="modrelu",
        metavar="|".join(_NONLINEARITIES),
        help="of the recurrence (default: modrelu)",
    )
    add("--rank", type=positive, default=4, help="rank of the updates (default: 4)")
    add("--lr", type=positive_float, default=1e-2, help="learning rate (default: 0.01)")


def run(args: argparse.Namespace) -> Results:
    """Train the networks on the same batches, and read out their states over many steps.

    Args:
        args: As parsed with the options of :func:`add_arguments`.
    """
    task = DigitImages(validation=args.validation, standardized=True)
    learners = [build(kind, args) for kind in ("unitary", "same", "default")]
    print(
        f"One look at {task.title}, then {args.steps} steps without input, "
        f"after training over {args.train_steps}"
    )
    images, _ = task.test_batch()
    with one_thread():
        before = [norms(learner.model, images[:64], args.steps) for learner in learners]
        train_by_options(task, learners, args)
        after = [norms(learner.model, images[:64], args.steps) for learner in learners]
        marks = sorted({0, args.steps // 20, args.steps // 5, args.steps // 2, args.steps})
        traces = [read_out(learner.model, task, marks) for learner in learners]
    return Results(task, learners, before, after, traces)


def build(kernel: str, args: argparse.Namespace, size: tuple[int, int] = (8, 8)) -> ClippedLearner:
    """One network and its optimizer; the three differ in the kernel alone.

    Args:
        kernel: As for :class:`ImageMemory`.
        args: The options.
        size: Of the lattice.
    """
    torch.manual_seed(args.seed)
    model = ImageMemory(
        args.channels,
        steps=args.train_steps,
        nonlinearity=args.nonlinearity,
        kernel=kernel,
        size=size,
        dtype=torch.complex64 if args.complex else torch.float32,
    )
    # The recurrence and the thresholds act at every step, so their gradients are larger by the
    # number of steps, and small changes accumulate.
    slow = [model.rnn.kernel]
    thresholds = list(model.rnn.activation.parameters())
    ids = {id(p) for p in slow + thresholds}
    groups = [
        {"params": slow, "lr": args.lr / 32},
        {"params": thresholds, "lr": args.lr / 1000},
        {"params": [p for p in model.parameters() if id(p) not in ids]},
    ]
    optimizer: torch.optim.Optimizer
    if kernel == "unitary":
        optimizer = ru.optim.ProjUNNT(groups, lr=args.lr, rank=args.rank, base=torch.optim.Adam)
    else:
        optimizer = torch.optim.Adam(groups, lr=args.lr)
    orthogonal = "unitary" if args.complex else "orthogonal"
    names = {
        "unitary": orthogonal,
        "same": f"ordinary, from the same {orthogonal} kernel",
        "default": "ordinary, default initial kernel",
    }
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    return ClippedLearner(names[kernel], model, optimizer, schedule)


def features(states: Tensor) -> Tensor:
    """States as rows of real numbers.

    Args:
        states: ``(N, channels, height, width)``, real or complex.
    """
    real = torch.view_as_real(states) if states.is_complex() else states
    return real.flatten(1)


@torch.no_grad()
def norms(model: nn.Module, images: Tensor, steps: int) -> Tensor:
    """Mean norm of the state at steps 0, 1, ..., ``steps``.

    Args:
        model: A :class:`ImageMemory`.
        images: ``(N, 1, height, width)``.
        steps: The last step.
    """
    assert isinstance(model, ImageMemory)
    state = model.first(images)
    result = [_norm(state).unsqueeze(0)]
    for start in range(0, steps, _CHUNK):
        states = model.rnn.evolve(state, steps=min(_CHUNK, steps - start))
        result.append(torch.stack([_norm(one) for one in states]))
        state = states[-1]
    return torch.cat(result)


def _norm(states: Tensor) -> Tensor:
    mean: Tensor = features(states).double().norm(dim=1).mean()
    return mean


@torch.no_grad()
def read_out(
    model: nn.Module,
    task: PictureImages,
    marks: Sequence[int],
    *,
    limit: int | None = None,
    class_ridge: float = _RIDGE,
) -> Trace:
    """Fit a linear readout of the state at each of some steps, and measure what it recovers.

    Ridge regression from the states of the training images onto their pixels and classes. States
    are first scaled to mean square 1, all by one number, so that their size does not matter, only
    the information above a noise of about 3 %.

    Args:
        model: A :class:`ImageMemory`.
        task: Gives the images.
        marks: Steps of the readout, ascending.
        limit: At most so many images to fit on, and so many held-out ones; all by default.
        class_ridge: Penalty of the readout of classes; few images need a larger one for classes
            than for pixels.
    """
    assert isinstance(model, ImageMemory)
    batches: list[Batch] = list(task.train_batches(torch.Generator().manual_seed(0)))
    images = torch.cat([inputs for inputs, _ in batches])[:limit]
    classes = torch.cat([targets for _, targets in batches])[:limit]
    held, held_classes = (part[:limit] for part in task.test_batch())
    count = len(images)
    state = model.first(torch.cat([images, held]))
    wanted = torch.cat([images.flatten(1), functional.one_hot(classes, 10)], dim=1).double()
    trace = Trace({}, {}, {})
    chunk = max(1, min(_CHUNK, _NUMBERS // state.numel()))
    step = 0
    for mark in marks:
        while step < mark:
            steps = min(chunk, mark - step)
            state = model.rnn.evolve(state, steps=steps)[-1].clone()
            step += steps
        rows = features(state).double()
        pixels, scores = _ridge(rows, count, wanted).split([held[0].numel(), 10], dim=1)
        if class_ridge != _RIDGE:
            scores = _ridge(rows, count, wanted[:, -10:], class_ridge)
        trace.accuracy[mark] = task.accuracy(scores, held_classes)
        truth = held.flatten(1).double()
        wrong = (pixels - truth).square().sum() / (truth - truth.mean(0)).square().sum()
        trace.explained[mark] = 1 - wrong.item()
        trace.pictures[mark] = pixels[:_SHOWN].reshape(-1, *held.shape[2:])
    return trace


def _ridge(x: Tensor, count: int, wanted: Tensor, penalty: float = _RIDGE) -> Tensor:
    """Fit on the first ``count`` rows, and predict the others, or the mean without information."""
    mean = wanted.mean(0)
    # Zero, infinite or NaN: such a state holds no information.
    size = x.abs().amax()
    if not (torch.isfinite(size) and size > 0):
        return mean.expand(len(x) - count, -1)
    x = x / size
    x = x - x[:count].mean(0)
    spread = x[:count].square().mean().sqrt()
    if spread == 0:
        return mean.expand(len(x) - count, -1)
    x = x / spread
    rows, wanted = x[:count], wanted - mean
    if x.shape[1] < count:
        gram = rows.mT @ rows + penalty * count * torch.eye(x.shape[1], dtype=x.dtype)
        weights = torch.linalg.solve(gram, rows.mT @ wanted)
    else:  # the same solution by a smaller system
        gram = rows @ rows.mT + penalty * count * torch.eye(count, dtype=x.dtype)
        weights = rows.mT @ torch.linalg.solve(gram, wanted)
    predicted: Tensor = x[count:] @ weights + mean
    return predicted


def table(results: Results) -> str:
    """The final numbers.

    Args:
        results: Of the run.
    """
    last = max(results.traces[0].accuracy)
    nets = [["", "parameters", "accuracy, trained", "singular values", "orthogonality error"]]
    nets[0].append("seconds")
    states = [["", f"read at step {last}", "pixels recovered", f"norm at step {last} / 0"]]
    for learner, norm, trace in zip(results.learners, results.after, results.traces, strict=True):
        history = learner.history
        values = conv_singular_values(learner.model.get_parameter("rnn.kernel").detach(), ndim=2)
        errors = history.orthogonality
        nets.append(
            [
                learner.name,
                f"{learner.parameters:,}",
                f"{history.test_accuracy[-1]:.1%}",
                f"{values.min().item():.4g} to {values.max().item():.4g}",
                f"{max(errors):.1e}" if errors else "-",
                f"{sum(history.seconds):.1f}",
            ]
        )
        states.append(
            [
                learner.name,
                f"{trace.accuracy[last]:.1%}",
                f"{trace.explained[last]:.1%}",
                f"{(norm[-1] / norm[0]).item():.3g}",
            ]
        )
    return f"{aligned(nets)}\n\n{aligned(states)}"
