"""Train learners side by side on the same batches, with checkpoints that resume bit-equal."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import torch

from .models import History, Learner
from .tasks import Task

__all__ = ["CheckpointError", "Settings", "train"]

Settings = Mapping[str, "int | float | str | bool"]


class CheckpointError(RuntimeError):
    """A checkpoint file cannot continue this run."""


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
    exists the run goes on from there, and ends with exactly the numbers of a run that was never
    interrupted.

    Args:
        task: Gives batches, loss and accuracy.
        learners: Freshly built learners.
        epochs: Total number of epochs, those in the checkpoint included.
        seed: Seed of the batches.
        checkpoint: File to resume from and to save each epoch to.
        settings: What the run depends on; a checkpoint with other settings is refused.
        quiet: Show no progress bar.

    Raises:
        CheckpointError: If the file is no checkpoint of a run with these settings.
    """
    generator = torch.Generator().manual_seed(seed)
    settings = {} if settings is None else settings
    done = 0
    if checkpoint is not None and checkpoint.exists():
        done = _load(checkpoint, learners, generator, settings)

    inputs, targets = task.test_batch()
    tqdm = import_module("tqdm").tqdm
    total = task.batches_per_epoch
    with tqdm(total=epochs * total, initial=done * total, disable=quiet, unit="batch") as bar:
        for epoch in range(done, epochs):
            bar.set_description(f"epoch {epoch + 1}/{epochs}")
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
                bar.set_postfix_str(_progress(learners), refresh=False)
                bar.update()
            for learner in learners:
                learner.scheduler.step()
                loss, accuracy = learner.evaluate(task, inputs, targets)
                learner.history.test_loss.append(loss)
                learner.history.test_accuracy.append(accuracy)
                learner.history.seconds.append(seconds[learner.name])
            bar.set_postfix_str(_progress(learners))
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
        "settings": dict(settings),
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
    # Written aside and moved into place, so that an interruption leaves the last whole checkpoint.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _load(
    path: Path, learners: Sequence[Learner], generator: torch.Generator, settings: Settings
) -> int:
    """Put everything back and return the number of epochs done."""
    try:
        state = torch.load(path, weights_only=True)
        saved, parts = state["settings"], state["learners"]
    except Exception as error:  # torch.load raises many types, depending on what the file is
        raise CheckpointError(
            f"{path} is not a checkpoint of this demo ({error}): name another file, or remove it"
        ) from error
    if saved != dict(settings):
        keys = sorted(saved.keys() | settings.keys())
        changed = [k for k in keys if saved.get(k) != settings.get(k)]
        shown = ", ".join(f"{k}: {saved.get(k)} there, {settings.get(k)} now" for k in changed)
        raise CheckpointError(
            f"{path} was made with other settings ({shown}): "
            "give the same ones, name another file, or remove it"
        )
    for learner in learners:
        part = parts[learner.name]
        learner.model.load_state_dict(part["model"])
        learner.optimizer.load_state_dict(part["optimizer"])
        learner.scheduler.load_state_dict(part["scheduler"])
        learner.history = History(**part["history"])
    generator.set_state(state["batches"])
    torch.set_rng_state(state["rng"])
    return int(state["epoch"])
