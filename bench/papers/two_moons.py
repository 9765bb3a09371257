"""Two moons: steps that MLPs of different widths need, with and without path conditioning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module

import torch
from torch.nn.functional import cross_entropy

from . import authors_pathcond
from .conditioning import Net, build, condition_
from .experiment import Options, Place, Plan, Result, Run

__all__ = ["METHODS", "rates", "runs", "train", "widths"]

METHODS = ("plain", "conditioned", "authors")
_DEPTH = 5


def widths(plan: Plan) -> Sequence[int]:
    """Widths of the five hidden layers; the paper's experiments begin with 2 to 32."""
    found: Sequence[int] = plan.pick(
        (8, 32), (4, 8, 16, 32, 64, 128), (2, 4, 8, 16, 32, 64, 128, 256, 512)
    )
    return found


def rates(plan: Plan) -> Sequence[float]:
    """Learning rates of gradient descent."""
    found: Sequence[float] = plan.pick((0.1,), (1e-2, 1e-1), (1e-4, 1e-3, 1e-2, 1e-1, 1.0))
    return found


def runs(plan: Plan) -> Sequence[Run]:
    """All widths by each method and seed."""
    methods = [m for m in METHODS if m != "authors" or authors_pathcond.is_there()]
    found = []
    for seed in range(plan.pick(1, max(plan.seeds, 3))):
        for method in methods:
            options = {
                "method": method,
                "widths": widths(plan),
                "rates": rates(plan),
                "steps": plan.pick(200, 3000, 10000),
                "goal": 0.99,
                "seed": seed,
            }
            found.append(Run(f"{method}, seed {seed}", options, plan.pick(0.05, 0.5, 20)))
    return found


def train(options: Options, place: Place) -> Result:
    """Descend on all 700 points at once, as the authors do, until 99 % of them are right.

    Returns:
        By learning rate, then width, the steps that took (None if never).
    """
    found: list[list[int | None]] = []
    cells = len(options["rates"]) * len(options["widths"])
    for lr in options["rates"]:
        row: list[int | None] = []
        for width in options["widths"]:
            row.append(_steps(options, width, lr))
            done = len(found) * len(options["widths"]) + len(row)
            place.tell(done / cells, f"lr {lr}, width {width}")
        found.append(row)
    return {"steps": found}


def _steps(options: Options, width: int, lr: float) -> int | None:
    points, classes = import_module("sklearn.datasets").make_moons(
        n_samples=1000, noise=0.1, random_state=options["seed"]
    )
    x = torch.as_tensor(points[:700], dtype=torch.float32)
    y = torch.as_tensor(classes[:700], dtype=torch.long)
    net = Net("mlp", _DEPTH, "kaiming", False)
    model = build(net, width=width, inputs=2, classes=2, seed=options["seed"])
    if options["method"] != "plain":
        condition_(model, options["method"], x)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for step in range(options["steps"] + 1):
        outputs = model(x)
        if float((outputs.detach().argmax(1) == y).double().mean()) >= options["goal"]:
            return step
        optimizer.zero_grad()
        loss = cross_entropy(outputs, y)
        if not math.isfinite(loss.item()):
            return None
        loss.backward()
        optimizer.step()
    return None
