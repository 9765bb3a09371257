"""The two learners that are compared: an orthogonal RNN and an LSTM of no fewer parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor, nn

import riemann_unn as ru

from ..nn import OrthogonalRNN
from .tasks import Task

__all__ = [
    "History",
    "Learner",
    "SequenceModel",
    "count_parameters",
    "lstm_learner",
    "orthogonal_learner",
    "smallest",
]

_RECURRENT_SLOWDOWN = 32  # the recurrence acts at every step, so its gradient is larger


class SequenceModel(nn.Module):
    """A recurrent layer and a head that reads its states: linear, or with one hidden ReLU layer.

    Shape:
        Input ``(L, N, features)``; output ``(N, outputs)``, or ``(L, N, outputs)`` with
        ``every_step``.

    Args:
        rnn: Anything with ``nn.RNN``'s call signature. Complex states are read as real and
            imaginary parts.
        width: Number of (real) state features.
        task: Gives the answer's size, the width of the head, and whether every state is read.
        device: Where to create the head.
    """

    def __init__(
        self, rnn: nn.Module, width: int, task: Task, *, device: str | None = None
    ) -> None:
        super().__init__()
        self.rnn = rnn
        self.every_step = task.every_step
        inner = task.head_width
        self.head: nn.Module = nn.Linear(inner or width, task.outputs, device=device)
        if inner:
            self.head = nn.Sequential(nn.Linear(width, inner, device=device), nn.ReLU(), self.head)

    def forward(self, inputs: Tensor) -> Tensor:
        """Answer.

        Args:
            inputs: The sequences.
        """
        states: Tensor = self.rnn(inputs)[0]
        if not self.every_step:
            states = states[-1]
        if states.is_complex():
            states = torch.view_as_real(states).flatten(-2)
        answers: Tensor = self.head(states)
        return answers


@dataclass
class History:
    """The measurements during training, in plain lists for checkpoints.

    Attributes:
        train_loss: Loss of every training batch.
        orthogonality: Largest orthogonality error after every step; empty without tagged
            parameters.
        test_loss: Held-out loss after every epoch.
        test_accuracy: Held-out accuracy after every epoch.
        seconds: Training time of every epoch.
        watched: What the learner's monitor recorded in every epoch; empty without one.
    """

    train_loss: list[float] = field(default_factory=list)
    orthogonality: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    watched: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Learner:
    """A model, its optimizer and its history.

    Attributes:
        name: Name in the table and the figure.
        model: The model.
        optimizer: Its optimizer.
        scheduler: Its learning rate schedule, stepped once an epoch.
        history: The measurements so far.
        monitor: Watches one parameter once an epoch, if there is one.
    """

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    history: History = field(default_factory=History)
    monitor: ru.Monitor | None = None

    @property
    def parameters(self) -> int:
        """Number of real parameters; a complex number counts as two."""
        return count_parameters(self.model)

    def orthogonality_error(self) -> float | None:
        """Largest error of the tagged parameters, or ``None`` if there are none."""
        if not ru.tagged_parameters(self.model):
            return None
        return max(error.item() for error in ru.orthogonality_error(self.model).values())

    def step(self, task: Task, inputs: Tensor, targets: Tensor) -> float:
        """Take one training step and return the loss before it.

        Args:
            task: Gives the loss.
            inputs: Training sequences.
            targets: Their answers.
        """
        self.model.train()
        self.optimizer.zero_grad()
        loss = task.loss(self.model(inputs), targets)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def evaluate(self, task: Task, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
        """Loss and accuracy on held-out data.

        Args:
            task: Gives the loss and the accuracy.
            inputs: Held-out sequences.
            targets: Their answers.
        """
        self.model.eval()
        answers = self.model(inputs)
        return task.loss(answers, targets).item(), task.accuracy(answers, targets)


def orthogonal_learner(
    task: Task, *, hidden: int, rank: int, lr: float, complex: bool = False, seed: int = 0
) -> Learner:
    """An ``OrthogonalRNN``, trained by ProjUNN-T on the task's base optimizer.

    Args:
        task: Gives the sizes, the nonlinearity and the base optimizer.
        hidden: Size of the state.
        rank: Rank of each update of the recurrent matrix.
        lr: Learning rate; the recurrent matrix takes 1/32 of it.
        complex: Complex states and a unitary recurrence.
        seed: Seed of the initial weights and of the optimizer's sketches.
    """
    torch.manual_seed(seed)
    rnn = OrthogonalRNN(
        task.features,
        hidden,
        nonlinearity="modrelu" if complex else task.nonlinearity,
        init=task.init,
        dtype=torch.complex64 if complex else torch.float32,
    )
    model = SequenceModel(rnn, 2 * hidden if complex else hidden, task)
    groups = ru.param_groups(
        model,
        lr=lr,
        tagged_lr=lr / _RECURRENT_SLOWDOWN,
        weight_decay=task.weight_decay,
        tagged_weight_decay=0.0,
    )
    optimizer = ru.optim.ProjUNNT(
        groups,
        lr=lr,
        rank=rank,
        base=task.base,
        seed=seed,
    )
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, task.lr_decay)
    return Learner("unitary RNN" if complex else "orthogonal RNN", model, optimizer, scheduler)


def lstm_learner(task: Task, *, parameters: int, lr: float = 3e-3, seed: int = 0) -> Learner:
    """The smallest LSTM with at least so many parameters, trained by Adam.

    Args:
        task: Gives the sizes of input and answer.
        parameters: Number of real parameters to reach.
        lr: Learning rate.
        seed: Seed of the initial weights.
    """
    torch.manual_seed(seed)
    model = smallest(nn.LSTM, task, parameters=parameters)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    return Learner("LSTM", model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 1.0))


def smallest(kind: Callable[..., nn.Module], task: Task, *, parameters: int) -> SequenceModel:
    """The smallest model of a kind of recurrent layer with at least so many parameters.

    Args:
        kind: Such as ``nn.LSTM``.
        task: Gives the sizes of input and answer.
        parameters: Number of real parameters to reach.
    """

    def build(hidden: int, device: str) -> SequenceModel:
        rnn = kind(task.features, hidden, device=device)
        return SequenceModel(rnn, hidden, task, device=device)

    sizes = (size for size in count(1) if count_parameters(build(size, "meta")) >= parameters)
    return build(next(sizes), "cpu")


def count_parameters(model: nn.Module) -> int:
    """Number of real parameters; a complex number counts as two.

    Args:
        model: Any.
    """
    return sum(p.numel() * (2 if p.is_complex() else 1) for p in model.parameters())
