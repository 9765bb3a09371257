"""Chang: deep unitary networks from trained weights."""

from __future__ import annotations

from collections.abc import Sequence

from .chang_page import report
from .deep_unitary import STARTS, train
from .experiment import Experiment, Plan, Run

__all__ = ["EXPERIMENTS"]


def _depths(plan: Plan) -> Sequence[int]:
    depths: Sequence[int] = plan.pick((6,), (20, 50))
    return depths


def _runs(plan: Plan) -> Sequence[Run]:
    return [
        Run(
            f"{depth} layers, seed {seed}",
            {
                "side": plan.pick(4, 7, 8),
                "depth": depth,
                "free_epochs": plan.pick(2, 15, 40),
                "free_lr": 1e-3,
                "epochs": plan.pick(1, 6, 20),
                "starts": STARTS,
                "rank": 4,
                "seed": seed,
                "data": plan.data,
                "validation": False,
            },
            plan.pick(0.2, depth / 30, 10),
        )
        for seed in range(plan.pick(1, max(plan.seeds, 3)))
        for depth in _depths(plan)
    ]


EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "deep_unitary", "chang", "Deep unitary networks, warm-started", _runs, train, report
    ),
)
