"""Digits with and without path conditioning: MLPs and a CNN, from two initialisations.

The badly scaled networks have the function of PyTorch's default initialisation: every hidden
channel is multiplied by a random number and divided by it again in the next layer. So before
training all four networks of a seed are the same function with different weights.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median

import torch
from torch import Tensor, nn

import riemann_unn as ru

from ..graph import trace
from .checkpoint import Parts, settings_of
from .cli import Number, Parser, add_common_options, positive
from .experiment import aligned, one_thread
from .progress import Progress
from .tasks import Digits

__all__ = ["Case", "Results", "Run", "add_arguments", "badly_scale_", "cnn", "mlp", "run", "table"]

_GOAL = 0.9
_BATCH = 32
_SPREAD = Number("a positive number of at most 10", float, 0, 10, above=True)
_TESTS = 5  # times an epoch
_RATES = {"SGD": 0.1, "Adam": 3e-3}
_INITIALISATIONS = ("default", "badly scaled")


def mlp() -> nn.Module:
    """64-128-128-10 with ReLUs."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def cnn() -> nn.Module:
    """Three 3x3 convolutions, pooling, and a linear layer."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


_MODELS: dict[str, Callable[[], nn.Module]] = {"MLP": mlp, "CNN": cnn}


@dataclass
class Run:
    """One network trained once.

    Attributes:
        model: ``"MLP"`` or ``"CNN"``.
        start: which initialisation.
        optimizer: ``"SGD"`` or ``"Adam"``.
        conditioned: whether it was rescaled before training.
        seed: of the initialisation and of the batches.
        accuracy: on the test images, before training and five times an epoch.
        change: relative change of the function by conditioning.
    """

    model: str
    start: str
    optimizer: str
    conditioned: bool
    seed: int
    accuracy: list[float] = field(default_factory=list)
    change: float = 0.0

    @property
    def epochs(self) -> float:
        """Epochs until 90 % of the test images are read correctly; infinite if never."""
        reached = (i for i, a in enumerate(self.accuracy) if a >= _GOAL)
        return next(reached, math.inf) / _TESTS


Case = tuple[tuple[str, str, str], list[Run], list[Run]]
"""Model, initialisation and optimizer, the runs without conditioning, and those with it."""


@dataclass(frozen=True)
class Results:
    """The results of all runs.

    Attributes:
        runs: All of them.
        per_epoch: How many accuracies a run has for each epoch.
    """

    runs: Sequence[Run]
    per_epoch: int = _TESTS

    @property
    def cases(self) -> list[Case]:
        """The runs by what they have in common."""
        names = dict.fromkeys((r.model, r.start, r.optimizer) for r in self.runs)
        found = []
        for name in names:
            same = [r for r in self.runs if (r.model, r.start, r.optimizer) == name]
            with_ = [r for r in same if r.conditioned]
            found.append((name, [r for r in same if not r.conditioned], with_))
        return found


def badly_scale_(model: nn.Module, *, spread: float, seed: int, example: Tensor) -> None:
    """Multiply every hidden channel by a random number, without changing the function, in place.

    Args:
        model: a ReLU network.
        spread: standard deviation of the numbers' logarithms to base ten, which are normal.
        seed: of the numbers.
        example: an input of the network.
    """
    view = trace(model, example)
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randn(len(view.reasons), dtype=torch.float64, generator=generator)
    scales = (10.0 ** (spread * exponents)).where(view.free, 1.0)
    view.scale_(dict(model.named_parameters()), scales)


def _train(
    run: Run, epochs: int, spread: float, data: tuple[Tensor, ...], tick: Callable[[], object]
) -> None:
    images, classes, test_images, test_classes = data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model = _MODELS[run.model]()
    if run.start == "badly scaled":
        badly_scale_(model, spread=spread, seed=run.seed, example=images[:2])
    if run.conditioned:
        run.change = ru.init.path_condition_(model, inputs=images[:2]).change
    kind = torch.optim.SGD if run.optimizer == "SGD" else torch.optim.Adam
    optimizer = kind(model.parameters(), lr=_RATES[run.optimizer])
    generator = torch.Generator().manual_seed(run.seed)

    def test() -> None:
        with torch.no_grad():
            correct = model(test_images).argmax(1) == test_classes
        run.accuracy.append(float(correct.double().mean()))

    test()
    every = math.ceil(len(images) / _BATCH) // _TESTS
    for _ in range(epochs):
        batches = torch.randperm(len(images), generator=generator).split(_BATCH)
        for i, batch in enumerate(batches, 1):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), classes[batch]).backward()
            optimizer.step()
            if i % every == 0:
                test()
        tick()


def _shown(epochs: float) -> str:
    return f"{epochs:.1f}" if math.isfinite(epochs) else "never"


def table(results: Results) -> str:
    """Epochs to 90 % and final accuracy, medians over the seeds.

    Args:
        results: Of all runs.
    """
    rows = [["", "epochs to 90 %", "conditioned", "final accuracy", "conditioned"]]
    for (model, start, optimizer), without, with_ in results.cases:
        row = [f"{model}, {start}, {optimizer}"]
        row += [_shown(median(r.epochs for r in group)) for group in (without, with_)]
        row += [f"{median(r.accuracy[-1] for r in group):.1%}" for group in (without, with_)]
        rows.append(row)
    change = max(r.change for r in results.runs)
    return (
        f"{aligned(rows)}\n\n"
        f"conditioning changed the networks' outputs by at most {change:.1e}, relatively"
    )


def add_arguments(parser: Parser, task: str) -> None:
    """Add the options of this experiment.

    Args:
        parser: Takes them.
        task: Its name.
    """
    add_common_options(parser, epochs=8)
    add = parser.add_argument
    add("--seeds", type=positive, default=5, help="runs of each case, from --seed on (default: 5)")
    add(
        "--spread",
        type=_SPREAD,
        default=1.5,
        help="of the bad scales, in powers of ten (default: 1.5)",
    )


def run(args: argparse.Namespace) -> Results:
    """Train every combination of model, initialisation, optimizer, conditioning and seed.

    Args:
        args: As parsed with the options of :func:`add_arguments`.
    """
    task = Digits()
    count = len(task.split[3])
    print(
        f"The same functions of digits in weights that train well and badly ({count} test images)"
    )
    runs = [
        Run(model, start, optimizer, conditioned, seed)
        for model in _MODELS
        for start in _INITIALISATIONS
        for optimizer in _RATES
        for conditioned in (False, True)
        for seed in range(args.seed, args.seed + args.seeds)
    ]
    parts = Parts(args.checkpoint, settings_of(args))
    names = [
        f"{one.model}, {one.start}, {one.optimizer}, "
        f"{'' if one.conditioned else 'not '}conditioned, seed {one.seed}"
        for one in runs
    ]
    total, done = len(runs) * args.epochs, args.epochs * sum(name in parts for name in names)
    with (
        one_thread(),
        Progress(total, unit="epoch", done=done, quiet=args.quiet) as progress,
    ):
        for name, one in zip(names, runs, strict=True):
            if name not in parts:
                progress.begin(name)
                _train(one, args.epochs, args.spread, task.split, progress.advance)
                progress.end(f"{one.accuracy[0]:.1%} to {one.accuracy[-1]:.1%}")
                parts.put(name, asdict(one))
    return Results([Run(**parts[name]) for name in names])
