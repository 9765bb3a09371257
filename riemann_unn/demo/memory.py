"""Experiment: an orthogonal RNN beside an LSTM of no fewer parameters, on tests of long memory.

Four tasks: digits read pixel by pixel, copying memory, the adding problem, and the user's sequences
from a CSV file.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from riemann_unn import Monitor

from .checkpoint import Settings
from .cli import Choice, Parser, add_common_options, add_validation, positive, positive_float
from .data import HELP
from .experiment import UsageError, aligned, one_thread
from .models import Learner, lstm_learner, orthogonal_learner
from .sequences import Sequences
from .tasks import ORDERS, Adding, Copy, Digits, Pictures, Task
from .training import train

__all__ = ["Results", "add_arguments", "below_baseline", "run", "table"]


@dataclass(frozen=True)
class Results:
    """The results of a run.

    Attributes:
        task: What was trained on.
        orthogonal: The orthogonal RNN.
        lstm: The LSTM.
    """

    task: Task
    orthogonal: Learner
    lstm: Learner

    @property
    def learners(self) -> tuple[Learner, Learner]:
        """Both."""
        return self.orthogonal, self.lstm

    @property
    def recurrence(self) -> Tensor:
        """The orthogonal recurrent matrix."""
        return self.orthogonal.model.get_parameter("rnn.weight_hh_l0")


def add_arguments(parser: Parser, task: str) -> None:
    """Add the options of a task.

    Args:
        parser: Takes them.
        task: Which.
    """
    add_common_options(parser, epochs=20)
    add = parser.add_argument
    add("--rank", type=positive, default=1, help="rank of the recurrence's updates (default: 1)")
    add("--hidden", type=positive, help="size of the state (default: by task)")
    add("--lr", type=positive_float, help="learning rate of the orthogonal RNN (default: by task)")
    add("--complex", action="store_true", help="complex states and a unitary recurrence")
    if task == Digits.name:
        add("--data", metavar="SOURCE", help=HELP)
        add(
            "--order",
            type=Choice(tuple(ORDERS)),
            default="pixels",
            metavar="|".join(ORDERS),
            help="; ".join(f"{word}: {what}" for word, what in ORDERS.items()),
        )
        permuted = {"action": "store_const", "const": "permuted", "dest": "order"}
        add("--permuted", help="--order permuted", **permuted)
        add_validation(parser)
    elif task == Sequences.name:
        add("--data", metavar="FILE.csv", help="the sequences (needed)")
    else:
        words = "the delay" if task == Copy.name else "the sequence length"
        add("--length", type=positive, help=f"{words} (default: by task)")


def run(options: Namespace) -> Results:
    """Train both on the same batches.

    Args:
        options: As parsed with the options of :func:`add_arguments`.
    """
    task = _task(options)
    hidden = task.hidden if options.hidden is None else options.hidden
    lr = task.lr if options.lr is None else options.lr
    if options.rank > hidden:
        raise UsageError(f"--rank {options.rank} is more than --hidden {hidden}, the full rank")
    print(f"{task.title[0].upper()}{task.title[1:]}")  # reads the data, which may raise a DataError
    orthogonal = orthogonal_learner(
        task, hidden=hidden, rank=options.rank, lr=lr, complex=options.complex, seed=options.seed
    )
    orthogonal.monitor = Monitor(orthogonal.optimizer, every=task.batches_per_epoch)
    lstm = lstm_learner(task, parameters=orthogonal.parameters, seed=options.seed)
    settings: Settings = {
        "task": repr(task),
        "hidden": hidden,
        "rank": options.rank,
        "lr": lr,
        "complex": options.complex,
        "seed": options.seed,
        **task.contents,
    }
    with one_thread():
        train(
            task,
            (orthogonal, lstm),
            epochs=options.epochs,
            seed=options.seed,
            checkpoint=options.checkpoint,
            settings=settings,
            quiet=options.quiet,
        )
    return Results(task, orthogonal, lstm)


def _task(options: Namespace) -> Task:
    if options.task == Sequences.name:
        if options.data is None:
            raise UsageError("sequences needs --data FILE.csv")
        return Sequences(Path(options.data))
    if options.task == Digits.name:
        more = {"order": options.order, "validation": options.validation, "seed": options.seed}
        return Digits(**more) if options.data is None else Pictures(options.data, **more)
    if options.task == Copy.name:
        return Copy() if options.length is None else Copy(delay=options.length)
    if options.length == 1:
        raise UsageError("--length must be at least 2, got 1: a number is marked in either half")
    return Adding() if options.length is None else Adding(length=options.length)


def table(results: Results) -> str:
    """The final numbers, the baseline without memory, and what the monitor recorded.

    Args:
        results: Of the run.
    """
    task = results.task
    epochs = len(results.lstm.history.test_accuracy)
    marks = [10, epochs] if epochs > 10 else [epochs]
    rows = [
        ["", "parameters"]
        + [f"{task.score}, epoch {mark}" for mark in marks]
        + ["loss", "seconds", "orthogonality error"]
    ]
    for learner in results.learners:
        history = learner.history
        error = f"{max(history.orthogonality):.1e}" if history.orthogonality else "-"
        rows.append(
            [learner.name, f"{learner.parameters:,}"]
            + [f"{history.test_accuracy[mark - 1]:.1%}" for mark in marks]
            + [f"{history.test_loss[-1]:.4f}", f"{sum(history.seconds):.1f}", error]
        )
    parts = []
    for learner in results.learners:
        first = below_baseline(task, learner)
        reached = "not yet" if first is None else f"from iteration {first}"
        parts.append(f"{learner.name} {reached}")
    return (
        f"{aligned(rows)}\n\nheld-out loss below {task.baseline:.4f}, the best without memory: "
        f"{', '.join(parts)}\n{_watched(results.orthogonal.history.watched)}"
    )


def below_baseline(task: Task, learner: Learner) -> int | None:
    """The iteration from which the held-out loss stays below that of the best without memory.

    Args:
        task: Gives the loss.
        learner: Trained on it.
    """
    losses = learner.history.test_loss
    above = [epoch for epoch, loss in enumerate(losses, 1) if loss >= task.baseline]
    first = (above[-1] if above else 0) + 1
    return first * task.batches_per_epoch if first <= len(losses) else None


def _watched(entries: Sequence[dict[str, float]]) -> str:
    if not entries:  # a checkpoint of a version without them
        return ""
    shares = [entry["captured"] for entry in entries if "captured" in entry]
    followed = f", of which a step followed {sum(shares) / len(shares):.0%}" if shares else ""
    return (
        f"recurrence: Riemannian gradient {entries[0]['gradient']:.1e} at first, "
        f"{entries[-1]['gradient']:.1e} in the last epoch{followed}; largest angle of a step "
        f"{max(entry['angle'] for entry in entries):.1e}"
    )
