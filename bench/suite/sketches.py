"""Sketch quality: captured energy over that of the best rank-k matrix, on gradients of RNNs."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from riemann_unn.demo.models import orthogonal_learner
from riemann_unn.demo.tasks import Copy, Digits, Task
from riemann_unn.linalg import SketchMethod
from riemann_unn.retractions import Retraction

from .page import Section, figure, short, table
from .plan import Clock, Plan
from .plots import curves

__all__ = ["run"]

_WARM_UP = 10


@dataclass(frozen=True)
class Source:
    """A task and what its gradients are called."""

    name: str
    task: Task


def gradients(task: Task, count: int, *, seed: int) -> list[Tensor]:
    """Return the gradients of the recurrence at consecutive steps of training."""
    learner = orthogonal_learner(task, hidden=task.hidden, rank=1, lr=task.lr, seed=seed)
    rnn: Any = learner.model.rnn
    source = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    while True:
        for batch in task.train_batches(source):
            learner.step(task, *batch)
            found.append(rnn.weight_hh_l0.grad.detach().clone())
            if len(found) == count + _WARM_UP:
                return found[_WARM_UP:]


def run(plan: Plan, clock: Clock, images: Path) -> Section:
    sources = [Source("digits", Digits()), Source("copying memory", Copy(delay=80, batch_size=32))]
    if not plan.full:
        sources = sources[:1]
    methods: tuple[SketchMethod, ...] = get_args(SketchMethod)
    lines: list[str] = []
    values: dict[str, float] = {}
    pictured: dict[str, dict[float, float]] = {}
    shuffle = random.Random(plan.seed)
    for source in sources:
        found = gradients(source.task, plan.gradients, seed=plan.seed)
        n = found[0].shape[-1]
        ranks = [k for k in plan.ranks if k < n]
        jobs = [(method, k) for method in methods for k in ranks]
        shares: dict[tuple[str, int], list[float]] = {job: [] for job in jobs}
        seconds: dict[tuple[str, int], list[float]] = {job: [] for job in jobs}
        starts: dict[tuple[str, int], Tensor | None] = dict.fromkeys(jobs)
        for index, g in enumerate(tqdm(found, desc=f"sketches, {source.name}", leave=False)):
            energies = torch.linalg.svdvals(g.double()).square()
            for method, k in shuffle.sample(jobs, len(jobs)):
                retraction = Retraction("exp", k, method)
                generator = torch.Generator().manual_seed(plan.seed + index)
                begin = time.perf_counter()
                a, b = retraction.factor(g, start=starts[method, k], generator=generator)
                starts[method, k] = retraction.next_start(a)
                seconds[method, k].append(time.perf_counter() - begin)
                rest = (g.double() - a.double() @ b.double().mH).square().sum()
                captured = (energies.sum() - rest) / energies[:k].sum()
                shares[method, k].append(float(captured))
        lines += _table(source, found, n, ranks, methods, shares, seconds)
        for (name, k), share in shares.items():
            mean = statistics.fmean(share)
            values[f"sketch/{source.name}/{name}/{k}"] = mean
            if name != "svd":  # it misses nothing
                missed = pictured.setdefault(f"sketch {name}, {source.name}", {})
                missed[k] = max(1 - mean, 1e-7)
    curves(
        images / "bench_sketches.png",
        pictured,
        title="What sketches miss of the best rank-k energy",
        x="rank k",
        y="1 − captured / best",
        panel="Mean over consecutive gradients of a recurrent matrix",
    )
    lines += figure("bench_sketches.png", "Energy that the sketches miss, against the rank")
    return Section("What sketches capture", lines, values)


def _table(
    source: Source,
    found: list[Tensor],
    n: int,
    ranks: list[int],
    methods: tuple[SketchMethod, ...],
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
        f'learns {source.name}. `"power"`, the default, starts each sketch from the one before, as '
        "it does in the optimizer. Each cell: captured energy over that of the best matrix of that "
        "rank, mean (worst; median milliseconds)."
    )
    return [words, "", *table(["sketch", *(f"rank {k}" for k in ranks)], rows), ""]
