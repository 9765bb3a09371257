"""Every optimizer reaches the optimum, from a random start, and stays there.

The problems are those of `bench.problems`, whose optimum is known. A gap is (f − f*) / (f₀ − f*).
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import riemann_unn as ru
from bench.problems import MAKERS, Problem, mini_batch_pca
from tests.support import assert_on_manifold, every_second

T = torch.optim
LONG = pytest.mark.long
BASES: dict[str, dict[str, Any]] = {
    "SGD": {"base": T.SGD},
    "momentum": {"base": T.SGD, "momentum": 0.9},
    "Adam": {"base": T.Adam},
    "RMSprop": {"base": T.RMSprop},
}
METHODS: dict[str, tuple[str, int | None]] = {
    "T rank 1": ("ProjUNNT", 1),
    "T rank 4": ("ProjUNNT", 4),
    "D rank 1": ("ProjUNND", 1),
    "D rank 4": ("ProjUNND", 4),
    "Cayley": ("Cayley", None),
    "Expm": ("Expm", None),
}
# One learning rate for each base, but where a problem is named.
RATES = {"SGD": 1.8, "momentum": 1.0, "Adam": 0.1}
OWN_RATES = {
    ("brockett", "Adam"): 0.07,
    ("joint", "SGD"): 0.6,
    ("joint", "momentum"): 0.5,
    ("gate", "SGD"): 1.2,
}
# Out of reach of 350 plain steps, whole or not: its condition number is 121.
PROBLEMS = [key for key in MAKERS if key != "brockett11"]


@functools.cache
def problem(key: str) -> Problem:
    return MAKERS[key]()


def rate(key: str, base: str) -> float:
    return OWN_RATES.get((key, base), RATES[base])


def tagged(x: Tensor, manifold: Any) -> nn.Parameter:
    return ru.tag_(nn.Parameter(x.clone()), manifold)


def optimizer_of(p: nn.Parameter, name: str, lr: float, **options: Any) -> T.Optimizer:
    return getattr(ru.optim, name)([p], lr=lr, **options)


def descend(
    task: Problem, name: str, lr: float, limit: int, tolerance: float = 1e-6, **options: Any
) -> tuple[int, float]:
    """Return the steps to the tolerance, or the limit, and the gap there."""
    x = task.start()
    first = float(task.value(x))
    p = tagged(x, task.manifold)
    optimizer = optimizer_of(p, name, lr, **options)
    for step in range(limit + 1):
        optimizer.zero_grad()
        loss = task.value(p)
        gap = (float(loss.detach()) - task.best) / (first - task.best)
        if gap <= tolerance or step == limit:
            break
        loss.backward()
        optimizer.step()
    assert_on_manifold(p)
    return step, gap


# The problems --------------------------------------------------------------------------


@pytest.mark.parametrize("key", MAKERS)
def test_the_optimum_is_one(key):
    task = problem(key)
    best = task.optimum
    assert_on_manifold(best)
    assert float(task.value(best)) == pytest.approx(task.best, abs=1e-12)
    g = task.gradient(best)
    assert float(torch.linalg.matrix_norm(g - best @ g.mH @ best)) <= 1e-12
    for seed in range(20):
        x = task.start(seed)
        assert_on_manifold(x)
        assert float(task.value(x)) > task.best
        turned = torch.linalg.qr(best + 0.01 * (x - best))[0]
        signs = (turned.mH @ best).diagonal()  # of columns, which the QR factor leaves open
        assert float(task.value(turned * (signs / signs.abs()))) >= task.best - 1e-12


# Reaching it ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "method", "base"), every_second(PROBLEMS, METHODS, ["SGD", "momentum", "Adam"])
)
def test_reaches_the_optimum(key, method, base):
    name, rank = METHODS[method]
    limit = 250 if (rank, base) == (1, "SGD") else 350
    steps, gap = descend(problem(key), name, rate(key, base), limit, rank=rank, **BASES[base])
    assert gap <= 1e-6, f"{gap:.1e} after {steps} steps"


@pytest.mark.parametrize("base", ["SGD", pytest.param("momentum", marks=LONG), "Adam"])
@pytest.mark.parametrize(
    ("key", "sketch"),
    [
        ("procrustes12", "lsi"),
        ("procrustes20", "lsi"),
        ("procrustes12", "column"),
        ("pca", "column"),
    ],
)
def test_a_sketch_of_the_euclidean_gradient_stalls(key, sketch, base):
    # The negative control: sketches as published follow the normal part and miss the rest.
    for factor in (0.3, 1.0):
        options = {"rank": 1, "sketch": sketch, **BASES[base]}
        gap = descend(problem(key), "ProjUNNT", factor * rate(key, base), 500, **options)[1]
        assert gap > 1e-3


OTHERS: dict[str, tuple[Any, float, dict[str, Any]]] = {
    "Rprop": (T.Rprop, 0.1, {}),
    "NAdam": (T.NAdam, 0.01, {}),
    "Adagrad": (T.Adagrad, 0.3, {}),
    "ASGD": (T.ASGD, 1.0, {}),
    "Adafactor": (T.Adafactor, 0.01, {"eps": (None, 1.0)}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_bases_reach_at_rank_one_what_whole_steps_reach(other):
    base, lr, options = OTHERS[other]
    whole = descend(problem("procrustes12"), "Expm", lr, 1000, base=base, **options)[1]
    assert whole <= 1e-6
    assert descend(problem("procrustes12"), "ProjUNNT", lr, 1000, base=base, **options)[1] <= 1e-6


# Staying there -------------------------------------------------------------------------


def stay(key: str, method: str, base: str) -> list[float]:
    """Return the gaps of 500 steps that begin at the optimum."""
    task, (name, rank) = problem(key), METHODS[method]
    p = tagged(task.optimum, task.manifold)
    first, gaps = float(task.value(task.start())), []
    optimizer = optimizer_of(p, name, 1e-3, rank=rank, **BASES[base])
    for _ in range(500):
        optimizer.zero_grad()
        loss = task.value(p)
        gaps.append((float(loss.detach()) - task.best) / (first - task.best))
        loss.backward()
        optimizer.step()
    assert_on_manifold(p)
    return gaps


@pytest.mark.parametrize(
    ("key", "method", "base"),
    every_second(["pca", "procrustes12"], METHODS, ["Adam", "momentum"]),
)
def test_stays_at_the_optimum(key, method, base):
    assert max(stay(key, method, base)) <= 2e-5


@pytest.mark.parametrize(("key", "method"), every_second(["pca", "procrustes12"], METHODS))
def test_rmsprop_returns_to_the_optimum(key, method):
    # Its first steps move entries by up to 10 learning rates however small the gradient is, whole
    # or sketched, and cost a gap of 1e-3; then it hovers below the limit.
    gaps = stay(key, method, "RMSprop")
    assert sorted(gaps[-100:])[50] <= 2e-5


# Noise ---------------------------------------------------------------------------------

# Learning rates at rank 1, at rank 4, and whole.
MINI_BATCH: dict[str, tuple[float, float, float]] = {
    "SGD": (1.0, 0.3, 0.3),
    "momentum": (0.4, 0.1, 0.03),
    "Adam": (0.14, 0.03, 0.01),
}


def mini_batch_gap(method: str, base: str, seed: int) -> float:
    """Return the gap after a decaying schedule, with sketches of a seed."""
    name, rank = METHODS[method]
    task, lr = mini_batch_pca(), MINI_BATCH[base][(1, 4, None).index(rank)]
    x = task.whole.start()
    p = tagged(x, task.whole.manifold)
    optimizer = optimizer_of(p, name, lr, rank=rank, seed=seed, **BASES[base])
    for step in range(task.steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * task.decay(step)
        optimizer.zero_grad()
        task.sample(p, step).backward()
        optimizer.step()
    return float(task.whole.gap(p.detach(), float(task.whole.value(x))))


@pytest.mark.parametrize("base", MINI_BATCH)
@pytest.mark.parametrize(
    "method",
    [
        "T rank 1",
        pytest.param("D rank 1", marks=LONG),
        pytest.param("T rank 4", marks=LONG),
        "Cayley",
    ],
)
def test_mini_batches(method, base):
    # One run in eight of rank 1 ends some times higher, so the median of three has to hold. Whole
    # steps draw nothing: one run is all.
    rank = METHODS[method][1]
    seeds = range(1 if rank is None else 3)
    gap = sorted(mini_batch_gap(method, base, seed) for seed in seeds)[len(seeds) // 2]
    assert gap <= (2e-3 if rank == 1 else 4e-4), f"{gap:.1e}"
