"""Training learners side by side on the same batches, with checkpoints that resume bit-equal."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from .checkpoint import CheckpointError, Settings, load, save, settings_of
from .models import History, Learner
from .progress import Progress
from .tasks import Task

__all__ = ["CheckpointError", "Settings", "train", "train_by_options"]


def train_by_options(task: Task, learners: Sequence[Learner], options: Namespace) -> None:
    """Call :func:`train` with the options that all experiments have.

    Args:
        task: Gives batches, loss and accuracy.
        learners: Freshly built learners.
        options: As parsed; all but where files go and what is shown count as settings.
    """
    train(
        task,
        learners,
        epochs=options.epochs,
        seed=options.seed,
        checkpoint=options.checkpoint,
        settings=settings_of(options),
        quiet=options.quiet,
    )


def train(
    task: Task,
    learners: Sequence[Learner],
    *,
    epochs: int,
    seed: int = 0,
    checkpoint: Path | None = None,
    settings: Settings | None = None,
    quiet: bool = False,
) -> None:
    """Train every learner for ``epochs`` epochs, filling its history.

    Each epoch draws its batches once and every learner steps on each of them. If ``checkpoint``
    exists the run continues from there, and ends with exactly the numbers of an uninterrupted run.

    Args:
        task: Gives batches, loss and accuracy.
        learners: Freshly built learners.
        epochs: Total number of epochs, those in the checkpoint included.
        seed: Seed of the batches.
        checkpoint: File to resume from and to save each epoch to.
        settings: The options that the run depends on; a checkpoint with others is refused.
        quiet: Do not show progress.

    Raises:
        CheckpointError: If the file is no checkpoint of a run with these settings.
    """
    generator = torch.Generator().manual_seed(seed)
    settings = {} if settings is None else settings
    done = 0
    if checkpoint is not None and checkpoint.exists():
        done = _load(checkpoint, learners, generator, settings)

    inputs, targets = task.test_batch()
    total = task.batches_per_epoch
    with Progress(epochs * total, unit="batch", done=done * total, quiet=quiet) as progress:
        for epoch in range(done, epochs):
            progress.begin(f"epoch {epoch + 1}/{epochs}")
            seconds = dict.fromkeys((learner.name for learner in learners), 0.0)
            for batch in task.train_batches(generator):
                for learner in learners:
                    start = time.perf_counter()
                    loss = learner.step(task, *batch)
                    seconds[learner.name] += time.perf_counter() - start
                    learner.history.train_loss.append(loss)
                    error = learner.orthogonality_error()
                    if error is not None:
                        learner.history.orthogonality.append(error)
                progress.advance(_progress(learners))
            for learner in learners:
                learner.scheduler.step()
                loss, accuracy = learner.evaluate(task, inputs, targets)
                learner.history.test_loss.append(loss)
                learner.history.test_accuracy.append(accuracy)
                learner.history.seconds.append(seconds[learner.name])
                if learner.monitor is not None:
                    (entries,) = learner.monitor.history.values()
                    learner.history.watched.append(entries[-1])
            progress.end(_progress(learners))
            if checkpoint is not None:
                _save(checkpoint, learners, generator, settings, epoch + 1)


def _progress(learners: Sequence[Learner]) -> str:
    parts = []
    for learner in learners:
        history = learner.history
        part = f"{learner.name}: loss {history.train_loss[-1]:.3f}"
        if history.test_accuracy:
            part += f", {history.test_accuracy[-1]:.1%}"
        if history.orthogonality:
            part += f", off by {history.orthogonality[-1]:.0e}"
        parts.append(part)
    return " | ".join(parts)


def _save(
    path: Path,
    learners: Sequence[Learner],
    generator: torch.Generator,
    settings: Settings,
    epoch: int,
) -> None:
    state = {
        "epoch": epoch,
        "batches": generator.get_state(),
        "rng": torch.get_rng_state(),
        "learners": {
            learner.name: {
                "model": learner.model.state_dict(),
                "optimizer": learner.optimizer.state_dict(),
                "scheduler": learner.scheduler.state_dict(),
                "history": asdict(learner.history),
            }
            for learner in learners
        },
    }
    save(path, settings, state)


def _load(
    path: Path, learners: Sequence[Learner], generator: torch.Generator, settings: Settings
) -> int:
    """Restore everything and return the number of epochs done."""
    state = load(path, settings, "learners")
    for learner in learners:
        part = state["learners"][learner.name]
        learner.model.load_state_dict(part["model"])
        learner.optimizer.load_state_dict(part["optimizer"])
        learner.scheduler.load_state_dict(part["scheduler"])
        learner.history = History(**part["history"])
    generator.set_state(state["batches"])
    torch.set_rng_state(state["rng"])
    return int(state["epoch"])
