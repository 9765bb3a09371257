"""Experiment: low rank that preserves a layer's function, without training and as a start of it."""

from __future__ import annotations

import argparse
import copy
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from statistics import median

import torch
from torch import nn

import riemann_unn as ru

from ..init.low_rank.problem import Method
from ..nn import LowRankLinear
from .checkpoint import Parts, settings_of
from .cli import Number, Parser, add_common_options, add_validation, positive
from .conv_models import adam, projunn
from .experiment import aligned, one_thread
from .images import DigitImages
from .models import Learner
from .progress import Progress
from .training import train

__all__ = ["METHODS", "RANKS", "STARTS", "Results", "add_arguments", "run", "table"]

RANKS = (32, 8, 4, 2)
METHODS: dict[str, tuple[Method, bool]] = {  # method, and whether it is calibrated on images
    "spectral": ("spectral", False),
    "function, Gaussian": ("function", False),
    "linear, calibrated": ("linear", True),
    "function, calibrated": ("function", True),
}
STARTS = ("random", "spectral", "function")
_WIDTH = 256
_HIDDEN = ("first", "middle")  # the layers that are of low rank in training from scratch
_LONGER = 3  # times as many epochs for the net that is compressed
_MOST = 64 * _WIDTH // (64 + _WIDTH + 1)  # more would save no parameter
_RANK = Number(f"a whole number from 1 to {_MOST}, for more would save nothing", int, 1, _MOST)
_LR = 1e-2  # from scratch; the best of 2e-3, 5e-3 and 1e-2 for every start, with --validation


@dataclass
class Results:
    """The results of a run; every list is over seeds.

    Attributes:
        title: Of the task.
        rank: Of training from scratch.
        dense: Accuracy of the net that is compressed.
        accuracy: By method and rank, its accuracy with one layer replaced, without training.
        error: Relative error of that layer's function on held-out images.
        trained: By factors ("plain" or "orthonormal") and start, accuracy after every epoch.
        off: Orthogonality error after every step, orthonormal factors only.
    """

    title: str
    rank: int
    dense: list[float] = field(default_factory=list)
    accuracy: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    error: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    trained: dict[tuple[str, str], list[list[float]]] = field(default_factory=dict)
    off: list[float] = field(default_factory=list)

    def add(self, other: Results) -> None:
        """Append the seeds of other results.

        Args:
            other: Of the same task.
        """
        self.dense += other.dense
        self.off += other.off
        for key, values in other.accuracy.items():
            self.accuracy.setdefault(key, []).extend(values)
        for key, values in other.error.items():
            self.error.setdefault(key, []).extend(values)
        for start, curves in other.trained.items():
            self.trained.setdefault(start, []).extend(curves)


def add_arguments(parser: Parser, task: str) -> None:
    """Add the options of this experiment.

    Args:
        parser: Takes them.
        task: Its name.
    """
    add_common_options(parser, epochs=10)
    add_validation(parser)
    add = parser.add_argument
    add("--seeds", type=positive, default=3, help="number of seeds, from --seed on (default: 3)")
    add("--rank", type=_RANK, default=8, help="rank in training from scratch (default: 8)")


def run(args: argparse.Namespace) -> Results:
    """Compress a trained net, and train low-rank nets from scratch.

    Args:
        args: As parsed with the options of :func:`add_arguments`.
    """
    task = DigitImages(validation=args.validation, standardized=True, batch_size=64)
    print(f"Low rank that keeps the function of a layer: {task.title}")
    parts = Parts(args.checkpoint, settings_of(args))
    seeds = {f"seed {seed}": seed for seed in range(args.seed, args.seed + args.seeds)}
    runs = 1 + len(RANKS) * len(METHODS) + 2 * len(STARTS)
    done = runs * sum(name in parts for name in seeds)
    with (
        one_thread(),
        Progress(runs * len(seeds), unit="run", done=done, quiet=args.quiet) as progress,
    ):
        for name, seed in seeds.items():
            if name not in parts:
                one = Results(task.title, args.rank)
                for what in _one_seed(one, task, seed, args.rank, args.epochs):
                    progress.begin(f"{name}, {what}")
                    progress.advance()
                    progress.end("done")
                parts.put(name, asdict(one))
    results = Results(task.title, args.rank)
    for name in seeds:
        results.add(Results(**parts[name]))
    return results


def _one_seed(
    results: Results, task: DigitImages, seed: int, rank: int, epochs: int
) -> Iterator[str]:
    """Measure everything for one seed, and report the name of each run."""
    long = _LONGER * epochs
    dense = adam("dense", _dense_net(seed), lr=1e-3, epochs=long)
    train(task, [dense], epochs=long, seed=seed, quiet=True)
    results.dense.append(dense.history.test_accuracy[-1])
    yield "dense"
    yield from _compress(results, task, dense.model)
    for start in STARTS:
        for factors in ("plain", "orthonormal"):
            learner = _learner(seed, rank, start, factors, epochs)
            train(task, [learner], epochs=epochs, seed=seed, quiet=True)
            curves = results.trained.setdefault((factors, start), [])
            curves.append(learner.history.test_accuracy)
            results.off += learner.history.orthogonality
            yield f"{start} start, {factors}"


def _dense_net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["flatten"] = nn.Flatten()
    layers["first"], layers["relu1"] = nn.Linear(64, _WIDTH), nn.ReLU()
    layers["middle"], layers["relu2"] = nn.Linear(_WIDTH, _WIDTH), nn.ReLU()
    layers["last"] = nn.Linear(_WIDTH, 10)
    return nn.Sequential(layers)


def _learner(seed: int, rank: int, start: str, factors: str, epochs: int) -> Learner:
    net, orthonormal = _dense_net(seed), factors == "orthonormal"
    if start == "random":
        for name in _HIDDEN:
            n = net.get_parameter(f"{name}.weight").shape[1]
            net.set_submodule(name, LowRankLinear(n, _WIDTH, rank, orthonormal=orthonormal))
    else:
        ru.init.low_rank_(
            net,
            rank=rank,
            layers=_HIDDEN,
            method="function" if start == "function" else "spectral",
            draw="kaiming_normal",
            orthonormal=orthonormal,
            seed=seed,
            progress=False,
        )
    if orthonormal:
        return projunn(start, net, lr=_LR, rank=rank, epochs=epochs)
    return adam(start, net, lr=_LR, epochs=epochs)


@torch.no_grad()
def _compress(results: Results, task: DigitImages, net: nn.Module) -> Iterator[str]:
    """Replace the middle layer by every method at every rank, and measure on held-out images."""
    assert isinstance(net, nn.Sequential)
    generator = torch.Generator().manual_seed(0)
    calibration = torch.cat([images for images, _ in task.train_batches(generator)])
    images, classes = task.test_batch()
    inputs = net[:3](images)
    target = net[3:5](inputs)
    for rank in RANKS:
        for name, (method, calibrated) in METHODS.items():
            low = copy.deepcopy(net)
            ru.init.low_rank_(
                low,
                rank=rank,
                layers="middle",
                method=method,
                calibration=calibration if calibrated else None,
                progress=False,
            )
            off = (low[3:5](inputs) - target).square().sum() / target.square().sum()
            results.error.setdefault((name, rank), []).append(off.item())
            right = task.accuracy(low(images), classes)
            results.accuracy.setdefault((name, rank), []).append(right)
            yield f"{name}, rank {rank}"


def table(results: Results) -> str:
    """The final numbers.

    Args:
        results: Of the run.
    """
    seeds, (first, *_, last) = len(results.dense), METHODS
    over = f"median of {seeds} seeds" if seeds > 1 else "one seed"
    rows = [["", *(f"rank {r}" for r in RANKS)]]
    for name in METHODS:
        each = [(results.accuracy[name, r], results.error[name, r]) for r in RANKS]
        rows.append([name, *(f"{median(a):.1%} ({median(e):.4f})" for a, e in each)])
    worst = ["error, last row over first, worst seed"]
    for r in RANKS:
        pairs = zip(results.error[last, r], results.error[first, r], strict=True)
        worst.append(f"{max(one / other for one, other in pairs):.2f}")
    compressed = (
        f"One {_WIDTH}x{_WIDTH} layer of a trained net made low-rank, without training: accuracy "
        f"(relative error\nof the layer's function), {over}; full rank {median(results.dense):.1%}"
    )
    epochs = len(next(iter(results.trained.values()))[0])
    marks = sorted({1, min(3, epochs), epochs})
    head = ["start, factors", *(f"epoch {mark}" for mark in marks), "range over seeds"]
    rows_of_starts = [head]
    for factors, start in product(("plain", "orthonormal"), STARTS):
        curves = results.trained[factors, start]
        ends = [curve[-1] for curve in curves]
        row = [f"{start}, {factors}", *(f"{median(c[m - 1] for c in curves):.1%}" for m in marks)]
        rows_of_starts.append([*row, f"{min(ends):.1%} to {max(ends):.1%}"])
    trained = (
        f"Both hidden layers trained from scratch at rank {results.rank}: accuracy, {over}; plain "
        f"factors by Adam,\northonormal ones by ProjUNN-T on Adam (orthogonality error at most "
        f"{max(results.off):.1e})"
    )
    return f"{compressed}\n\n{aligned([*rows, worst])}\n\n{trained}\n\n{aligned(rows_of_starts)}"
