"""Lebeurrier, Vayer, Gribonval: path-conditioned training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from . import authors_pathcond
from .conditioning import NETS, train
from .experiment import Experiment, Plan, Run
from .lebeurrier_page import report_conditioning, report_moons
from .two_moons import runs as moons_runs
from .two_moons import train as moons_train

__all__ = ["EXPERIMENTS"]

_RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
_FEWER = (3e-2, 1e-1, 3e-1)  # of nets that need over a hundred epochs at smaller ones
_WITH_AUTHORS = ("mlp3", "mlp8", "mlp3-norm", "mlp8-norm")  # their code is for these and larger


def _rates(net: str, plan: Plan) -> Sequence[float]:
    few = net == "conv" or net.endswith("torch")
    rates: Sequence[float] = plan.pick(
        (1e-2, 1e-1), _FEWER if few else _RATES, (1e-3, *(_FEWER if few else _RATES))
    )
    return rates


def _nets(plan: Plan) -> Sequence[str]:
    some = ("mlp3", "mlp5", "mlp8", "mlp3-norm", "mlp8-norm", "mlp3-torch", "conv")
    found: Sequence[str] = plan.pick(("mlp3", "mlp3-norm"), some, tuple(NETS))
    return found


def _seeds(plan: Plan) -> range:
    """Noise is the spread over seeds, so that there are three of them always."""
    return range(plan.pick(1, max(plan.seeds, 3)))


def _run(plan: Plan, net: str, method: str, seed: int, **other: Any) -> Run:
    options = {
        "net": asdict(NETS[net]),
        "method": method,
        "rates": _rates(net, plan),
        "width": plan.pick(64, 500),
        "epochs": plan.pick(10, 150, 1000),
        "goal": plan.pick(0.9, 0.99),
        "optimizer": "SGD",
        "seed": seed,
        "data": plan.data,
        **other,
    }
    optimizer = options["optimizer"]
    name = f"{net}, {optimizer}, {method}, seed {seed}"
    # Those that the picture shows come first.
    long = net in _WITH_AUTHORS and optimizer == "SGD" and method in ("plain", "conditioned")
    return Run(name, options, plan.pick(0.05, 0.6 if long else 0.4, 10))


def _runs(plan: Plan) -> Sequence[Run]:
    found = []
    for seed in _seeds(plan):
        for net in _nets(plan):
            found += [_run(plan, net, method, seed) for method in ("plain", "conditioned")]
            if authors_pathcond.is_there() and net in _WITH_AUTHORS:
                found.append(_run(plan, net, "authors", seed, rates=_rates(net, plan)[::2]))
        found.append(_run(plan, "mlp3", "again", seed, rates=(3e-3,)))
        for optimizer, lr in (("momentum", 3e-4), ("Adam", 1e-4)):
            for method in ("plain", "conditioned", "again"):
                found.append(_run(plan, "mlp3", method, seed, optimizer=optimizer, rates=(lr,)))
    return found


EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "conditioning",
        "lebeurrier",
        "Path conditioning of MLPs and a conv net",
        _runs,
        train,
        report_conditioning,
    ),
    Experiment(
        "two_moons",
        "lebeurrier",
        "Two moons by width",
        moons_runs,
        moons_train,
        report_moons,
    ),
)
