"""Pictures read pixel by pixel in a random order: accuracy, ranks, sketches, and time."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from bench.suite.page import figure, table
from riemann_unn.demo import data

from .curves import Panel, curves
from .experiment import Claim, Experiment, Options, Place, Plan, Report, Result, Run, median
from .histories import by_name, judged, last, middle, off
from .sequences import AUTHORS, DEFAULTS, build, task_of, train

__all__ = ["FASHION", "PIXELS", "RANKS"]

RECIPE: Options = {"lr": 2e-3, "decay": 0.9, "weight_decay": 1e-3, "head": 64}
"""Of the orthogonal RNN, as in the demo of digits."""

LSTM: Options = {"model": "LSTM", "base": "Adam", "lr": 1e-2, "decay": 0.9, "head": 64}
RNN: Options = {"model": "RNN", "base": "RMSprop", "lr": 1e-4, "decay": 0.9, "head": 64}

_SIZE = 64  # pictures in a batch
_ASKED = (0.88, 0.05, 0.70)  # accuracy, lead over the LSTM, accuracy on Fashion-MNIST


def _task(plan: Plan, *, source: str | None = None, batch_size: int = _SIZE) -> Options:
    return {
        "name": "pixels",
        "source": source or plan.pick("digits", plan.data),
        "order": "permuted",
        "batch_size": batch_size,
    }


def _minutes(plan: Plan, epochs: int) -> float:
    return epochs * float(plan.pick(0.02, 0.25))


# --- accuracy ----------------------------------------------------------------------------------

_LEARNERS: dict[str, Options] = {
    "orthogonal": RECIPE,
    "LSTM": LSTM,
    "RNN, unconstrained": RNN,
}


_TEXT = """The authors'
script has MNIST's 60,000 pictures, hidden 170, batches of 128, RMSprop at 1e-3 with a step after
60 of 100 epochs. Here, in every epoch four in ten
training pictures are moved by a pixel, for every learner, and all have a head with a hidden layer
of 64. The orthogonal RNN has modReLU, Henaff's initial recurrence and ProjUNN-T of rank 1 over
RMSprop, with the rates of the demo of 64 pixels: 2e-3, a 32nd of it for the recurrence, times 0.9
after every epoch, and weight decay 1e-3 of the rest. The LSTM has as many parameters and Adam at
1e-2, the best of 1e-3, 3e-3 and 1e-2 on validation pictures after one to three epochs; it is
still getting better at the end.

What was learned. The recipe of 64 pixels holds for 784: on validation pictures half the rate and
clipped gradients were no better after two and three epochs."""


def _sizes(plan: Plan) -> tuple[int, int]:
    """Hidden states, and epochs."""
    found: tuple[int, int] = plan.pick((64, 2), (170, 12), (170, 60))
    return found


def _pixel_runs(plan: Plan) -> list[Run]:
    hidden, epochs = _sizes(plan)
    return [
        Run(
            f"{name}, seed {seed}",
            {"task": _task(plan), "hidden": hidden, "epochs": epochs, "seed": seed, **recipe},
            minutes=_minutes(plan, epochs),
        )
        for seed in range(plan.seeds)
        for name, recipe in _LEARNERS.items()
    ]


def _pixel_report(plan: Plan, results: Mapping[str, Result], images: Path) -> Report:
    report = Report()
    groups = by_name(results)
    if not groups:
        return report
    source = data.images(_task(plan)["source"])
    height, width = source.size
    steps, epochs = height * width, max(len(r["score"]) for r in results.values())
    rows = [
        [
            name,
            f"{runs[0]['parameters']:,}",
            f"{last(runs, 'score'):.1%}",
            ", ".join(f"{100 * run['score'][-1]:.1f}" for run in runs),
            f"{median(sum(run['seconds_train']) / len(run['score']) for run in runs):.0f}",
            off(runs),
        ]
        for name, runs in groups.items()
    ]
    head = ["", "parameters", "test accuracy", "by seed", "seconds per epoch", "off by"]
    report.lines += [
        f"{source.name}: {len(source.train):,} pictures to train on, {len(source.test):,} to test, "
        f"{steps} pixels one after the other in one fixed random order; {epochs} epochs in batches "
        f"of {_SIZE}. The accuracy is that of the last epoch, the median over seeds. " + _TEXT,
        "",
        *table(head, rows),
    ]
    curves(
        images / "papers_pixels.png",
        f"{source.name}, {steps} permuted pixels one by one, hidden {_sizes(plan)[0]}",
        [
            Panel(
                "Test accuracy",
                "epochs",
                "accuracy",
                [middle(n, runs, "score", every=1) for n, runs in groups.items()],
                limits=(0, 1),
                percent=True,
            )
        ],
    )
    report.lines += figure("papers_pixels.png", "Test accuracy on permuted pixels by epoch")
    if "orthogonal" in groups:
        ours = last(groups["orthogonal"], "score")
        least, lead, _ = _ASKED
        words, ahead = f"{ours:.1%}, {source.name}, {epochs} epochs", math.nan
        if "LSTM" in groups:
            ahead = ours - last(groups["LSTM"], "score")
            words += f"; LSTM of equal size {last(groups['LSTM'], 'score'):.1%}"
        claim = Claim(
            f"Permuted pixels, {steps} steps: above an LSTM of equal size",
            "closely matches or exceeds earlier unitary networks (abstract); hidden 170",
            words,
            f"≥ {least:.0%}, and {100 * lead:.0f} points above the LSTM",
            ours >= least and ahead >= lead,
        )
        report.claims.append(judged(plan, claim))
    return report


PIXELS = Experiment(
    "pixels",
    "projunn",
    "projUNN: pictures pixel by pixel, in a random order",
    _pixel_runs,
    train,
    _pixel_report,
)

# --- Fashion-MNIST -----------------------------------------------------------------------------

DEBIAN = "/usr/share/datasets/fashion-mnist"
_NAME = "Fashion-MNIST"
_RATES = {"orthogonal": 1e-3, "LSTM": 5e-3}


def _folder(plan: Plan) -> str | None:
    """Of Fashion-MNIST: where FASHION_MNIST points, or where Debian's package puts it."""
    for place in (os.environ.get("FASHION_MNIST"), DEBIAN):
        if place and Path(place).is_dir():
            return place
    return None


def _fashion_runs(plan: Plan) -> list[Run]:
    if plan.scale == "quick" or _folder(plan) is None:
        return []
    epochs = plan.pick(1, 2, 60)
    task = _task(plan, source=_NAME, batch_size=128)
    runs = []
    for name, lr in _RATES.items():
        options = {**_LEARNERS[name], "lr": lr, "decay": 0.5}
        options |= {"task": task, "hidden": 170, "epochs": epochs, "seed": 0}
        runs.append(Run(name, options, minutes=5 * epochs))
    return runs


def _train_fashion(options: Options, place: Place) -> Result:
    """As ``train``, with the folder found only now, since where it is changes nothing."""
    folder = _folder(Plan())
    if folder is None:
        raise data.DataError("set FASHION_MNIST to the folder of Fashion-MNIST's IDX files")
    return train({**options, "task": {**options["task"], "source": folder}}, place)


def _fashion_report(plan: Plan, results: Mapping[str, Result], images: Path) -> Report:
    report = Report()
    rows = [
        [
            name,
            f"{result['parameters']:,}",
            *(f"{score:.1%}" for score in result["score"][-2:]),
            off([result]),
        ]
        for name, result in results.items()
    ]
    epochs = max(len(result["score"]) for result in results.values())
    marks = [f"test accuracy, epoch {e}" for e in range(max(1, epochs - 1), epochs + 1)]
    report.lines += [
        "Fashion-MNIST's 60,000 pictures, 784 permuted pixels one by one, hidden 170, batches of "
        "128, and 10,000 test pictures. The recipe is that of MNIST-5000 with half the rate, "
        "halved again after the first epoch; one seed.",
        "",
        *table(["", "parameters", *marks, "orthogonality error"], rows),
    ]
    if "orthogonal" in results:
        score, least = results["orthogonal"]["score"][-1], _ASKED[2]
        words = f"{score:.1%} after {epochs} epochs"
        if "LSTM" in results:
            words += f"; LSTM of equal size {results['LSTM']['score'][-1]:.1%}"
        report.claims.append(
            Claim(
                f"Permuted pixels of {_NAME}, 784 steps",
                "not in the paper",
                words,
                f"≥ {least:.0%} after two epochs",
                score >= least,
            )
        )
    return report


FASHION = Experiment(
    "fashion",
    "projunn",
    "projUNN: Fashion-MNIST pixel by pixel, two epochs",
    _fashion_runs,
    _train_fashion,
    _fashion_report,
    "the folder of Fashion-MNIST's IDX files as FASHION_MNIST, or Debian's dataset-fashion-mnist",
)

# --- ranks and sketches ------------------------------------------------------------------------

_RANKS = (1, 2, 4, 16, None)
_TIMES = "time"


def _variants() -> dict[str, Options]:
    """What is compared, by name."""
    found: dict[str, Options] = {}
    for letter in "TD":
        for rank in _RANKS:
            words = "whole" if rank is None else f"rank {rank}"
            found[f"ProjUNN-{letter}, {words}"] = {"algorithm": letter, "rank": rank}
    for sketch in ("lsi", "column"):
        found[f"ProjUNN-T, rank 1, {sketch}"] = {"algorithm": "T", "rank": 1, "sketch": sketch}
    if os.environ.get("PROJUNN_REFERENCE"):
        found["the authors' ProjUNN-T, rank 1, lsi"] = {"algorithm": AUTHORS, "rank": 1}
    return found


def _rank_runs(plan: Plan) -> list[Run]:
    hidden, epochs = plan.pick((32, 1), (170, 3), (170, 20))
    common = {"task": _task(plan), "hidden": hidden, **RECIPE, "decay": 0.7}
    runs = [
        Run(
            f"{name}, seed {seed}",
            {**common, "epochs": epochs, "seed": seed, **variant},
            minutes=_minutes(plan, epochs),
        )
        for seed in range(plan.seeds)
        for name, variant in _variants().items()
    ]
    steps = plan.pick(5, 40)
    variants = {name: {**common, **variant} for name, variant in _variants().items()}
    options = {"measure": _TIMES, "steps": steps, "variants": variants}
    runs.append(Run(_TIMES, options, minutes=plan.pick(0.05, 2)))
    return runs


def _train_rank(options: Options, place: Place) -> Result:
    return _times(options, place) if options.get("measure") == _TIMES else train(options, place)


def _times(options: Options, place: Place) -> Result:
    """Seconds of an optimizer's step by variant, one after the other so that noise hits all alike.

    One gradient of the loss is given to every variant again and again; how long the network takes
    to give it is measured too.
    """
    variants: dict[str, Options] = {n: DEFAULTS | v for n, v in options["variants"].items()}
    first = next(iter(variants.values()))
    task = task_of(first)
    inputs, targets = next(task.train_batches(torch.Generator().manual_seed(0)))
    made = {name: build(variant) for name, variant in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in made}
    passes = []
    for index in range(options["steps"]):
        for number, (name, (model, optimizer)) in enumerate(made.items()):
            if index == 0 or (index % 10 == 0 and number == 0):  # seldom: it takes far longer
                begin = time.perf_counter()
                model.zero_grad()
                task.loss(model(inputs), targets).backward()
                passes.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            optimizer.step()
            seconds[name].append(time.perf_counter() - begin)
        place.tell((index + 1) / options["steps"], "")
    return {
        "step": {name: statistics.median(values) for name, values in seconds.items()},
        "passes": statistics.median(passes),
        "batches": task.batches_per_epoch,
    }


def _rank_report(plan: Plan, results: Mapping[str, Result], images: Path) -> Report:
    report = Report()
    times = results.get(_TIMES)
    groups = by_name({name: r for name, r in results.items() if name != _TIMES})
    if not groups:
        return report
    epochs = max(len(r["score"]) for runs in groups.values() for r in runs)
    rows = []
    for name, runs in groups.items():
        row = [
            name,
            f"{last(runs, 'score'):.1%}",
            ", ".join(f"{100 * run['score'][-1]:.1f}" for run in runs),
            off(runs),
        ]
        if times and name in times["step"]:
            step, passes, batches = times["step"][name], times["passes"], times["batches"]
            row += [f"{1e3 * step:.1f}", f"{batches * (step + passes):.0f}"]
            row += [f"{step / (step + passes):.1%}"]
        rows.append(row + [""] * (7 - len(row)))
    head = [
        "",
        f"accuracy after {epochs} epochs",
        "by seed",
        "orthogonality error",
        "optimizer's step, ms",
        "seconds per epoch",
        "of which optimizer",
    ]
    report.lines += [
        "The recurrence of the pixel task above, with updates of several ranks, ProjUNN-T and -D, "
        "by the tangent sketch, the default, and by those that the paper has, LSI and column "
        f"sampling; {epochs} epochs, the rates times 0.7 after each. Times were measured in one "
        "run, the variants in turn: forward and backward pass of a batch of "
        f"{_SIZE}, then the step of all parameters, on one thread.",
        "",
        *table(head, rows),
    ]
    ranks = {n: runs for n, runs in groups.items() if n.startswith("ProjUNN-T") and "i," not in n}
    one, whole = groups.get("ProjUNN-T, rank 1"), groups.get("ProjUNN-T, whole")
    if one and whole and ranks:
        words = f"rank 1 {last(one, 'score'):.1%}, whole {last(whole, 'score'):.1%}"
        words += f" after {epochs} epochs"
        if times:
            faster = times["step"]["ProjUNN-T, whole"] / times["step"]["ProjUNN-T, rank 1"]
            words += f"; a step of rank 1 takes {1 / faster:.2f} of the whole one's time"
        report.claims.append(
            Claim(
                "Updates of rank 1 learn what whole ones learn",
                "comparable performance even at rank 1, O(k n²) a step (abstract)",
                words,
            )
        )
    return report


RANKS = Experiment(
    "ranks",
    "projunn",
    "projUNN: ranks, sketches and time",
    _rank_runs,
    _train_rank,
    _rank_report,
)
