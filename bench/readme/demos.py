"""What README says of the demos: each cell from the results of a run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import cache
from statistics import median
from typing import Any

from riemann_unn.demo import conv, convrnn, lipschitz, lowrank, memory, warmstart
from riemann_unn.demo.__main__ import experiment_of, parse

__all__ = ["CELLS", "percent", "result"]

_SEEDS = (0, 1, 2)


@cache
def result(*arguments: str) -> Any:
    """What a demo returns; each is run once.

    Args:
        arguments: Of its command line.
    """
    options = parse([*arguments, "--quiet"])
    with redirect_stdout(sys.stderr):  # it says what it runs on
        return experiment_of(options.task).run(options)


def digits() -> str:
    run: memory.Results = result("digits")
    parts = [
        f"{name} {percent(learner.history.test_accuracy[9])}, "
        f"{percent(learner.history.test_accuracy[-1])}"
        for name, learner in (
            ("orthogonal RNN", run.orthogonal),
            ("LSTM of more parameters", run.lstm),
        )
    ]
    return "; ".join(parts)


def digits_seeds() -> str:
    runs: list[memory.Results] = [
        result("digits"),
        *(result("digits", "--seed", str(seed), "--epochs", "10") for seed in range(1, 8)),
    ]
    parts = []
    for i, name in enumerate(("orthogonal RNN", "LSTM")):
        found = [run.learners[i].history.test_accuracy[9] for run in runs]
        parts.append(f"{name} {100 * min(found):.1f} to {percent(max(found))}")
    return ", ".join(parts)


def copy() -> str:
    run: memory.Results = result("copy")
    ours, theirs = (memory.below_baseline(run.task, learner) for learner in run.learners)
    last = len(run.orthogonal.history.train_loss)
    return (
        f"below {run.task.baseline:.4f}, the best without memory, {_from(ours)}; "
        f"{run.orthogonal.history.test_loss[-1]:.4f} at iteration {last}; LSTM {_from(theirs)}"
    )


def error() -> str:
    runs: tuple[memory.Results, ...] = (result("digits"), result("copy"))
    return f"{_short(max(max(run.orthogonal.history.orthogonality) for run in runs))} (float32)"


def resnet() -> str:
    runs: list[conv.Results] = [result("conv", "--seed", str(seed)) for seed in _SEEDS]
    ours, theirs = (_percents([_last(run.learners[i]) for run in runs]) for i in (0, 1))
    off = max(
        (state.values - 1).abs().max().item()
        for run in runs
        for state in [*run.before[0], *run.after[0]]
    )
    return (
        f"orthogonal convolutions {ours}, singular values within {off:.0e} of 1; "
        f"ordinary ones {theirs}"
    ).replace("e-0", "e-")


def lattice() -> str:
    runs: list[convrnn.Results] = [result("convrnn", "--seed", str(seed)) for seed in _SEEDS]
    told = [[trace.accuracy[max(trace.accuracy)] for trace in run.traces] for run in runs]
    ours, same, default = zip(*told, strict=True)
    return (
        f"orthogonal kernel {_percents(ours)}; without its constraint {_percents(same)}; "
        f"default kernel {', '.join(f'{100 * value:.0f}' for value in default)} %"
    )


def certified() -> str:
    runs: list[lipschitz.Results] = [result("lipschitz", "--seed", str(seed)) for seed in _SEEDS]
    ours, theirs = ([run.held[i].certified(0.25) for run in runs] for i in (0, 1))
    return (
        f"{_percents(ours)} of test images at accuracy "
        f"{_percents([_last(run.learners[0]) for run in runs])}; "
        f"{_percents(theirs) if any(theirs) else 'none'} of an ordinary net"
    )


def starts() -> str:
    run: warmstart.Results = result("warmstart", "--seeds", "5")
    deep = [trial for trial in run.trials if trial.net.title == warmstart.NETS[0].title]
    found = {name: [trial.starts[i] for trial in deep] for i, name in enumerate(warmstart.STARTS)}
    epochs = {name: f"{median(x.epochs_to_target for x in own):g}" for name, own in found.items()}
    before = median(start.accuracy[0] for start in found["procrustes"])
    return (
        f"from random weights {epochs['random']}, from the nearest to trained ones "
        f"{epochs['polar']}, matched on data {epochs['procrustes']} ({percent(before)} before "
        "any training)"
    )


def conditioned() -> str:
    epochs = {
        (*name, i): f"{median(run.epochs for run in group):.1f}"
        for name, *groups in result("rescale").cases
        for i, group in enumerate(groups)
    }

    def both(start: str, i: int) -> str:
        return " and ".join(epochs[model, start, "Adam", i] for model in ("MLP", "CNN"))

    return (
        f"{both('badly scaled', 0)}; path-conditioned {both('badly scaled', 1)} (from PyTorch's "
        f"own initialisation {both('default', 0)}; conditioned {both('default', 1)})"
    )


def compressed() -> str:
    run: lowrank.Results = result("lowrank", "--seeds", "5")
    ours, theirs = (median(run.accuracy[name, 4]) for name in ("function, calibrated", "spectral"))
    return f"{percent(ours)} calibrated; truncated SVD {percent(theirs)}"


CELLS: Mapping[str, Callable[[], str]] = {
    "digits": digits,
    "digits-seeds": digits_seeds,
    "copy": copy,
    "error": error,
    "conv": resnet,
    "convrnn": lattice,
    "lipschitz": certified,
    "warmstart": starts,
    "rescale": conditioned,
    "lowrank": compressed,
}
"""What stands between the marks of each name."""


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _percents(shares: Sequence[float]) -> str:
    return f"{', '.join(f'{100 * share:.1f}' for share in shares)} %"


def _last(learner: Any) -> float:
    accuracy: float = learner.history.test_accuracy[-1]
    return accuracy


def _from(iteration: int | None) -> str:
    return "never below" if iteration is None else f"from iteration {iteration}"


def _short(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-")
