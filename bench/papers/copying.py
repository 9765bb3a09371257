"""Copying memory: ten symbols, a thousand blanks, the ten symbols again."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

from bench.suite.page import figure, short, table

from .curves import Panel, curves
from .experiment import Claim, Experiment, Options, Plan, Report, Result, Run, median
from .histories import ABSTRACT, EVERY, by_name, first_below, iterations, judged, last, middle, off
from .readout import READOUT, readout_runs, readout_table, train_or_read
from .sequences import AUTHORS

__all__ = ["COPY"]

_RECIPES: dict[str, Options] = {
    "orthogonal, modReLU": {
        "lr": 3e-2,
        "slowdown": 4500,
        "input_slowdown": 135,
        "input_gain": 8.0,
        "thresholds": 0.0,
    },
    "orthogonal, modReLU, the authors' rates": {"lr": 7e-4},
    "orthogonal, ReLU, the authors' rates": {"lr": 7e-4, "nonlinearity": "relu"},
    "LSTM": {"model": "LSTM", "base": "Adam", "lr": 1e-2},
    "RNN, unconstrained": {"model": "RNN", "lr": 1e-4},
}
_THEIRS: Options = {"algorithm": AUTHORS, "nonlinearity": "relu", "lr": 7e-4}
_TEXT = """The orthogonal RNNs have Henaff's initial recurrence and ProjUNN-T of rank 1 over
RMSprop. The LSTM and the unconstrained RNN, which had fewer iterations, have as many parameters;
Adam at 1e-2, which was better than 3e-3 over 300 steps, and RMSprop at 1e-4. The authors' script
has ReLU, 7e-4 for all but the recurrence and a 32nd of it for the recurrence, and trains for
20,000 iterations.

What was learned. Copying is a task of the readout: from the states of an untrained recurrence,
Henaff's angles and modReLU with thresholds of 0, a linear readout fitted by least squares recalls
every symbol after 1,000 steps. Training has to find that readout, and must not spoil what is
there. So the readout takes 3e-2, while weights that act at every step move slowly: input weights
and thresholds at 2.2e-4, the recurrence at 6.7e-6. Thresholds start at 0, since over 1,000 steps
even those of 0.01 wear the state down or blow it up, and input weights are 8 times those of
`nn.RNN`, which gives states the size of 1 that the readout's rate is made for. The second row has
none of that."""
_OURS = "orthogonal, modReLU"
_SHORTER = 5  # times fewer iterations for the unconstrained RNN, which does not learn it
_ASKED = (200, 0.95, 1500)  # iterations to the loss without memory, recall, iterations to that


def _sizes(plan: Plan) -> tuple[int, int, int, int]:
    """Delay, hidden states, sequences in a batch, and iterations."""
    found: tuple[int, int, int, int] = plan.pick(
        (60, 32, 32, 50), (1000, 190, 128, 250), (1000, 190, 128, 4000)
    )
    return found


def _runs(plan: Plan) -> list[Run]:
    delay, hidden, size, count = _sizes(plan)
    task = {"name": "copy", "delay": delay, "batch_size": size, "batches": EVERY}
    recipes = dict(_RECIPES)
    if os.environ.get("PROJUNN_REFERENCE"):
        recipes["the authors' ProjUNN-T, ReLU"] = _THEIRS
    runs = []
    for seed in range(plan.seeds):
        for name, recipe in recipes.items():
            epochs = max(1, count // EVERY // (_SHORTER if name.startswith("RNN") else 1))
            options = {"task": task, "hidden": hidden, "epochs": epochs, "seed": seed, **recipe}
            minutes = epochs * plan.pick(0.01, 0.25)
            runs.append(Run(f"{name}, seed {seed}", options, minutes))
    starts = {n: r for n, r in _RECIPES.items() if n.startswith("orthogonal")}
    return runs + readout_runs(plan, task, hidden, starts, count=300)


def _report(plan: Plan, results: Mapping[str, Result], images: Path) -> Report:
    delay, hidden, *_ = _sizes(plan)
    baseline = 10 * math.log(8) / (delay + 20)
    groups = by_name({n: r for n, r in results.items() if not n.startswith(READOUT)})
    rows = []
    for name, runs in groups.items():
        below = [first_below(run["loss"], baseline) for run in runs]
        rows.append(
            [
                name,
                f"{runs[0]['parameters']:,}",
                f"{len(runs)}",
                f"{len(runs[0]['train_loss']):,}",
                iterations(below),
                iterations([_learnt(run) for run in runs]),
                f"{last(runs, 'score'):.1%}",
                short(last(runs, "loss")),
                off(runs),
            ]
        )
    head = [
        "",
        "parameters",
        "seeds",
        "iterations",
        f"below {baseline:.4f} from iteration",
        f"{_ASKED[1]:.0%} recalled from iteration",
        "symbols recalled at the end",
        "loss at the end",
        "orthogonality error",
    ]
    report = Report(
        [
            f"Ten symbols are read, then {delay:,} blanks, then the symbols are due; hidden "
            f"{hidden}. A model without memory has the loss 10 log 8 / {delay + 20:,} = "
            f"{baseline:.4f}. Checked every {EVERY} iterations on 128 sequences that are not "
            "trained on; medians over the seeds.",
            "",
            _TEXT,
            "",
            *table(head, rows),
            *readout_table(results, "symbols recalled", lambda run: f"{run['score']:.1%}"),
        ]
    )
    if not groups:
        return report
    panels = [
        Panel(
            "Loss on held-out sequences",
            "iterations",
            "cross-entropy",
            [middle(name, runs, "loss") for name, runs in groups.items()],
            (baseline, "without memory"),
            log=True,
        ),
        Panel(
            "Symbols recalled",
            "iterations",
            "share of the ten symbols",
            [middle(name, runs, "score") for name, runs in groups.items()],
            (1 / 8, "guessing"),
            percent=True,
            limits=(0, 1.02),
        ),
    ]
    title = f"Copying memory over {delay:,} steps, hidden {hidden}"
    curves(images / "papers_copy.png", title, panels)
    report.lines += figure("papers_copy.png", "Loss and recall of copying against iterations")
    if _OURS in groups:
        report.claims += [judged(plan, claim) for claim in _claims(delay, baseline, groups)]
    return report


def _learnt(run: Result) -> int | None:
    """The iteration from which on enough is recalled."""
    return first_below([-score for score in run["score"]], -_ASKED[1] + 1e-9)


def _claims(delay: int, baseline: float, groups: Mapping[str, list[Result]]) -> list[Claim]:
    ours, (most, least, within) = groups[_OURS], _ASKED
    below = [first_below(run["loss"], baseline) for run in ours]
    lstm = groups.get("LSTM", [])
    first = f"first at iteration: {iterations(below)}"
    if lstm:
        others = [first_below(run["loss"], baseline) for run in lstm]
        first += f"; LSTM of equal size {iterations(others)}"
    count = min(len(ours[0]["train_loss"]), within)
    score = median(run["score"][count // EVERY - 1] for run in ours)
    recalled = f"{score:.1%} after {count:,} iterations"
    if lstm:
        recalled += f"; LSTM of equal size {last(lstm, 'score'):.1%}"
    return [
        Claim(
            f"Copying memory, T = {delay:,}: the loss falls below that without memory",
            f"{ABSTRACT}; hidden 190, batch 128, 20,000 iterations",
            first,
            f"within {most} iterations",
            median(math.inf if n is None else n for n in below) <= most,
        ),
        Claim(
            f"Copying memory, T = {delay:,}: symbols recalled",
            f"{ABSTRACT}; hidden 190",
            recalled,
            f"≥ {least:.0%} within {within:,} iterations",
            score >= least,
        ),
    ]


COPY = Experiment(
    "copy", "projunn", "projUNN: copying memory over 1,000 steps", _runs, train_or_read, _report
)
