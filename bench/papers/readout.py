"""Linear readouts of the states of untrained recurrences, to compare their initial values."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from bench.suite.page import table
from riemann_unn.demo.tasks import Copy

from .experiment import Options, Place, Plan, Result, Run
from .sequences import DEFAULTS, build, task_of, train

__all__ = ["READOUT", "readout", "readout_runs", "readout_table", "train_or_read"]

READOUT = "readout"
_SYMBOLS = 10
_RIDGE = 1.0  # beside as many squares as there are states to fit


def readout_runs(
    plan: Plan, task: Options, hidden: int, recipes: Mapping[str, Options], *, count: int
) -> list[Run]:
    """A run for each start.

    Args:
        plan: Says how large it is.
        task: As in the options of a run.
        hidden: Number of states.
        recipes: By name; only what concerns the start matters.
        count: Sequences to fit the readout, and as many to test it.
    """
    task = {**task, "batch_size": plan.pick(200, count), "batches": 2}
    return [
        Run(
            f"{READOUT}, {name}",
            {
                "measure": READOUT,
                "ridge": _RIDGE,
                "task": task,
                "hidden": hidden,
                "seed": 0,
                **recipe,
            },
            minutes=plan.pick(0.01, 0.2),
        )
        for name, recipe in recipes.items()
    ]


def train_or_read(options: Options, place: Place) -> Result:
    """``train``, or what a readout finds in the untrained states, as the options say."""
    return readout(options) if options.get("measure") == READOUT else train(options, place)


@torch.no_grad()
def readout(options: Options) -> Result:
    """Fit a linear readout by least squares, with a small ridge, to one batch, and test it.

    Args:
        options: Of a run that would train.

    Returns:
        ``loss`` and ``score`` of the task; of copying, the score alone says something.
    """
    options = DEFAULTS | {"ridge": _RIDGE} | options
    task = task_of(options)
    model, _ = build(options)
    fitted, tested = task.train_batches(torch.Generator().manual_seed(options["seed"]))

    def read(inputs: Tensor) -> Tensor:
        states: Tensor = model.get_submodule("rnn")(inputs)[0]
        return (states[-_SYMBOLS:].flatten(0, 1) if task.every_step else states[-1]).double()

    copying = isinstance(task, Copy)
    wanted = fitted[1][-_SYMBOLS:].flatten() if copying else fitted[1].unsqueeze(-1)
    if copying:
        wanted = functional.one_hot(wanted, task.outputs)
    wanted = wanted.double()
    states = read(fitted[0])
    mean, deviation = states.mean(0), states.std(0)
    scale = deviation + 1e-3 * deviation.max()  # states that hardly move stay small
    scaled, centre = (states - mean) / scale, wanted.mean(0)
    normal = scaled.T @ scaled + options["ridge"] * torch.eye(scaled.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(normal, scaled.T @ (wanted - centre))
    answers, targets = (read(tested[0]) - mean) / scale @ weight + centre, tested[1]
    if copying:
        answers, targets = answers.unflatten(0, (_SYMBOLS, -1)), targets[-_SYMBOLS:]
    return {"loss": task.loss(answers, targets).item(), "score": task.accuracy(answers, targets)}


def readout_table(
    results: Mapping[str, Result], what: str, words: Callable[[Result], str]
) -> list[str]:
    """A table of what the readouts found, or nothing if there are none.

    Args:
        results: Of the experiment.
        what: Heading of what is shown.
        words: What is shown of a result.
    """
    start = f"{READOUT}, "
    rows = [[n.removeprefix(start), words(r)] for n, r in results.items() if n.startswith(start)]
    if not rows:
        return []
    head = ["untrained recurrence, linear readout by least squares (a small ridge)", what]
    return ["", *table(head, rows)]
