"""Sketch quality: captured tangent energy over the best of rank 2k, on gradients of RNNs."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from riemann_unn.demo.models import orthogonal_learner
from riemann_unn.demo.tasks import Copy, Digits, Task
from riemann_unn.linalg import TangentMethod, skew, tangent_energies
from riemann_unn.optim import seeds as draws
from riemann_unn.retractions import Directions, Retraction

from .page import Section, short, table
from .plan import Clock, Plan
from .plots import SKETCHES

__all__ = ["run"]

_WARM_UP = 10


@dataclass(frozen=True)
class Source:
    """A task and what its gradients are called."""

    name: str
    task: Task


def gradients(task: Task, count: int, *, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return the recurrence and its gradient at consecutive steps of training."""
    learner = orthogonal_learner(task, hidden=task.hidden, rank=1, lr=task.lr, seed=seed)
    rnn: Any = learner.model.rnn
    source = torch.Generator().manual_seed(seed)
    found: list[tuple[Tensor, Tensor]] = []
    while True:
        for batch in task.train_batches(source):
            point = rnn.weight_hh_l0.detach().clone()
            learner.step(task, *batch)
            found.append((point, rnn.weight_hh_l0.grad.detach().clone()))
            if len(found) == count + _WARM_UP:
                return found[_WARM_UP:]


def run(plan: Plan, clock: Clock) -> Section:
    sources = [Source("digits", Digits()), Source("copying memory", Copy(delay=80, batch_size=32))]
    if not plan.full:
        sources = sources[:1]
    methods: tuple[TangentMethod, ...] = get_args(TangentMethod)
    lines: list[str] = []
    values: dict[str, float] = {}
    shuffle, seeds = random.Random(plan.seed), draws.Seeds(plan.seed)
    for source in sources:
        found = gradients(source.task, plan.gradients, seed=plan.seed)
        n = found[0][0].shape[-1]
        ranks = [k for k in plan.ranks if 2 * k < n]
        jobs = [(method, k) for method in methods for k in ranks]
        shares: dict[tuple[str, int], list[float]] = {job: [] for job in jobs}
        seconds: dict[tuple[str, int], list[float]] = {job: [] for job in jobs}
        starts: dict[tuple[str, int], Tensor | None] = dict.fromkeys(jobs)
        for index, (x, g) in enumerate(tqdm(found, desc=f"sketches, {source.name}", leave=False)):
            energies = torch.linalg.svdvals(skew(x.mT.double() @ g.double())).square()
            for method, k in shuffle.sample(jobs, len(jobs)):
                retraction = Retraction("exp", k, method)
                drawn = draws.Source(seeds, x.device, tuple(x.shape), index)
                begin = time.perf_counter()
                tangent = retraction.tangent(x, g, start=starts[method, k], source=drawn)
                start = tangent.next_start()
                starts[method, k] = None if start is None else start.mH
                seconds[method, k].append(time.perf_counter() - begin)
                assert isinstance(tangent, Directions)
                total, missed = tangent_energies(x, g, tangent.v, tangent.coordinates)
                captured = (total - missed) / energies[: 2 * k].sum()
                shares[method, k].append(float(captured))
        lines += _table(source, found, n, ranks, methods, shares, seconds)
        for (name, k), share in shares.items():
            values[f"sketch/{source.name}/{name}/{k}"] = statistics.fmean(share)
    lines += SKETCHES.markdown()
    return Section("What sketches capture", lines, values)


def _table(
    source: Source,
    found: list[tuple[Tensor, Tensor]],
    n: int,
    ranks: list[int],
    methods: tuple[TangentMethod, ...],
    shares: dict[tuple[str, int], list[float]],
    seconds: dict[tuple[str, int], list[float]],
) -> list[str]:
    rows = []
    for method in methods:
        cells = []
        for k in ranks:
            share, spent = shares[method, k], statistics.median(seconds[method, k])
            cells.append(f"{statistics.fmean(share):.4f} ({min(share):.3f}; {short(1e3 * spent)})")
        rows.append([f'`"{method}"`', *cells])
    words = (
        f"{len(found)} consecutive gradients of the {n} × {n} recurrent matrix of an RNN that "
        f'learns {source.name}. `"tangent"`, the default, starts each sketch from the one before, '
        "as it does in the optimizer; lsi and column sketch the Euclidean gradient. Each cell: the "
        "energy of the tangent gradient that the step follows over that of the best skew part of "
        "rank 2k, mean (worst; median milliseconds)."
    )
    return [words, "", *table(["sketch", *(f"rank {k}" for k in ranks)], rows), ""]
