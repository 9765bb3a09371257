"""Warm start: orthogonal nets from trained weights compared with random initial weights.

An ordinary deep net and a small residual net are trained on handwritten digits, converted by each
method, and trained on with ProjUNN-T.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

import riemann_unn as ru

from ..init.warm_start import Method
from .checkpoint import Parts, settings_of
from .cli import Parser, add_common_options, add_validation, positive, positive_float
from .experiment import aligned, one_thread
from .images import DigitImages
from .progress import Progress

__all__ = ["NETS", "STARTS", "Net", "Results", "Start", "Trial", "add_arguments", "run", "table"]

STARTS = ("random", "polar", "lie", "procrustes")
TARGET = 0.93
_DEPTH = 6
_CALIBRATION = 16  # batches, 512 images


class _Block(nn.Module):
    """Two convolutions beside a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.second(functional.relu(self.first(x))))


def _deep_net() -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(64, 64), nn.ReLU()]
    for _ in range(_DEPTH):
        layers += [nn.Linear(64, 64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def _residual_net(width: int = 12) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        _Block(width),
        nn.MaxPool2d(2),
        _Block(width),
        nn.Flatten(),
        nn.Linear(width * 16, 10),
    )


@dataclass(frozen=True)
class Net:
    """A kind of net.

    Attributes:
        title: for the table and the figure.
        build: makes one from torch's global random state.
        tags: patterns and manifolds of the weights that become orthogonal.
        epochs: of the ordinary training, by Adam.
    """

    title: str
    build: Callable[[], nn.Module]
    tags: dict[str, ru.manifolds.MatrixManifold]
    epochs: int


NETS = (
    Net(
        "deep net, six 64x64 layers",
        _deep_net,
        {f"{2 * i + 1}.weight": ru.Orthogonal() for i in range(1, _DEPTH + 1)},
        20,
    ),
    Net(
        "residual net, flattened kernels",
        _residual_net,
        {"[24].*.weight": ru.Stiefel(flatten=True)},
        6,
    ),
)


@dataclass
class Start:
    """One way to start, and its results.

    Attributes:
        name: ``"random"`` or the method of the warm start.
        accuracy: held-out accuracy before training and after every epoch.
        function_error: relative distance of its held-out logits to those of the trained net.
        seconds: the time of the conversion.
    """

    name: str
    accuracy: list[float] = field(default_factory=list)
    function_error: float = math.nan
    seconds: float = 0.0

    @property
    def epochs_to_target(self) -> float:
        """Epochs until the held-out accuracy first reached the target; infinite if never."""
        reached = (i for i, a in enumerate(self.accuracy) if a >= TARGET)
        return next(reached, math.inf)


@dataclass
class Trial:
    """One net of one seed, trained without constraints and then from every start.

    Attributes:
        net: which.
        free: held-out accuracy of the ordinary trained net.
        starts: the starts, in the order of ``STARTS``.
    """

    net: Net
    free: float
    starts: list[Start]


@dataclass(frozen=True)
class Results:
    """The results of a run.

    Attributes:
        task: What was trained on.
        trials: Of every net and seed.
    """

    task: DigitImages
    trials: Sequence[Trial]


def _trial(
    net: Net, task: DigitImages, args: argparse.Namespace, seed: int, progress: Progress
) -> Trial:
    """Train a net freely, convert it by each method, and train each conversion."""
    epochs, lr, rank = args.epochs, args.lr, args.rank
    images, targets = task.test_batch()
    batches = [x for x, _ in task.train_batches(_generator(seed + 1))][:_CALIBRATION]
    torch.manual_seed(seed)
    model = net.build()
    adam = torch.optim.Adam(model.parameters(), lr=lr)
    progress.begin(f"{net.title}, seed {seed}, free")
    free = _train(model, adam, task, net.epochs, seed, progress)[-1]
    progress.end(f"{free:.1%}")
    wanted = _logits(model, images)
    starts = []
    for name in STARTS:
        progress.begin(f"{net.title}, seed {seed}, {name}")
        start = Start(name)
        tagged, start.seconds = _begin(model, net, name, batches, seed)
        logits = _logits(tagged, images)
        start.function_error = float((logits - wanted).norm() / wanted.norm())
        start.accuracy.append(task.accuracy(logits, targets))
        optimizer = ru.optim.ProjUNNT(
            tagged.parameters(), lr=lr, rank=rank, base=torch.optim.Adam, seed=seed
        )
        start.accuracy += _train(tagged, optimizer, task, epochs, seed + 2, progress)
        starts.append(start)
        progress.end(f"{start.accuracy[0]:.1%} to {start.accuracy[-1]:.1%}")
    return Trial(net, free, starts)


def _begin(
    model: nn.Module, net: Net, name: str, calibration: list[Tensor], seed: int
) -> tuple[nn.Module, float]:
    """Return a tagged model on its manifolds, and the seconds of the conversion."""
    if name == "random":
        torch.manual_seed(seed + 1000)
        fresh = ru.tag_(net.build(), net.tags)
        with torch.no_grad():
            for _, p in ru.tagged_parameters(fresh):
                manifold = ru.manifold_of(p)
                assert manifold is not None
                p.copy_(manifold.random(*p.shape))
        return fresh, 0.0
    tagged = ru.tag_(copy.deepcopy(model), net.tags)
    # Procrustes needs all inputs; the others need one batch for the shapes.
    inputs = calibration if name == "procrustes" else calibration[:1]
    start = time.perf_counter()
    ru.init.warm_start_(tagged, method=cast(Method, name), calibration=inputs, progress=False)
    return tagged, time.perf_counter() - start


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    task: DigitImages,
    epochs: int,
    seed: int,
    progress: Progress,
) -> list[float]:
    """Train, and return the held-out accuracy after every epoch."""
    generator, (images, targets) = _generator(seed), task.test_batch()
    accuracy = []
    for _ in range(epochs):
        model.train()
        for inputs, classes in task.train_batches(generator):
            optimizer.zero_grad()
            task.loss(model(inputs), classes).backward()
            optimizer.step()
            progress.advance()
        accuracy.append(task.accuracy(_logits(model, images), targets))
    return accuracy


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    model.eval()
    logits: Tensor = model(images)
    return logits


def table(results: Results) -> str:
    """The final numbers, medians over the seeds, and both function errors seed by seed.

    Args:
        results: Of the run.
    """
    trials = results.trials
    head = ["", f"epochs to {TARGET:.0%}", "accuracy before training", "after", "function error"]
    rows = [[*head, "seconds to convert"]]
    notes = []
    for net in dict.fromkeys(trial.net.title for trial in trials):
        same = [trial for trial in trials if trial.net.title == net]
        rows.append([net, "", "", f"{median(t.free for t in same):.1%}", "", ""])
        for i, name in enumerate(STARTS):
            starts = [trial.starts[i] for trial in same]
            epochs = median(s.epochs_to_target for s in starts)
            rows.append(
                [
                    f"  {name}",
                    f"{epochs:g}" if math.isfinite(epochs) else "not yet",
                    f"{median(s.accuracy[0] for s in starts):.1%}",
                    f"{median(s.accuracy[-1] for s in starts):.1%}",
                    f"{median(s.function_error for s in starts):.2f}",
                    f"{median(s.seconds for s in starts):.1f}" if name != "random" else "",
                ]
            )
        ratios = [_function_error(t, "procrustes") / _function_error(t, "polar") for t in same]
        notes.append(
            f"{net}: function error of procrustes over that of polar {median(ratios):.2f}, "
            f"at most {max(ratios):.2f}, below 1 for {sum(r < 1 for r in ratios)} of {len(ratios)}"
        )
    return "\n".join([aligned(rows), "", *notes])


def _function_error(trial: Trial, name: str) -> float:
    return trial.starts[STARTS.index(name)].function_error


def add_arguments(parser: Parser, task: str) -> None:
    """Add the options of this experiment.

    Args:
        parser: Takes them.
        task: Its name.
    """
    add_common_options(parser, epochs=12)
    add_validation(parser)
    add = parser.add_argument
    add("--seeds", type=positive, default=1, help="runs of each net, from --seed on (default: 1)")
    add("--lr", type=positive_float, default=1e-3, help="learning rate (default: 1e-3)")
    add("--rank", type=positive, default=4, help="rank of ProjUNN-T (default: 4)")


def run(args: argparse.Namespace) -> Results:
    """Train both nets from every start.

    Args:
        args: As parsed with the options of :func:`add_arguments`.
    """
    task = DigitImages(validation=args.validation, standardized=True)
    print(f"{task.title[0].upper()}{task.title[1:]}")
    parts = Parts(args.checkpoint, settings_of(args))
    cases = [(net, args.seed + i) for net in NETS for i in range(args.seeds)]
    units = {
        f"{net.title}, seed {seed}": (net.epochs + args.epochs * len(STARTS))
        * task.batches_per_epoch
        for net, seed in cases
    }
    done = sum(units[name] for name in units if name in parts)
    with (
        one_thread(),
        Progress(sum(units.values()), unit="batch", done=done, quiet=args.quiet) as progress,
    ):
        for (net, seed), name in zip(cases, units, strict=True):
            if name not in parts:
                trial = _trial(net, task, args, seed, progress)
                starts = [asdict(start) for start in trial.starts]
                parts.put(name, {"free": trial.free, "starts": starts})
    trials = [
        Trial(net, parts[name]["free"], [Start(**start) for start in parts[name]["starts"]])
        for (net, _), name in zip(cases, units, strict=True)
    ]
    return Results(task, trials)
