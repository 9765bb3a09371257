"""Ablations of the fast step: the time of a step without one of its parts over that with all.

Run from the repository: ``python bench/ablations.py``; four minutes. With all parts and without one
are timed alternately, in shuffled rounds of whole polish periods; the table holds ratios of means.
"""

from __future__ import annotations

import argparse
import importlib
import math
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

import riemann_unn as ru
from riemann_unn.linalg import maps
from riemann_unn.linalg.step import core, polish, products, tangent, update
from riemann_unn.optim import batch, batches, local_step, tagged

_PERIOD = 32  # steps, a multiple of every polish period
module = importlib.import_module("riemann_unn.optim.optimizer")


def _new_batch(_: batches.Batches, members: list[Any], kept: list[Any]) -> batch.Batch:
    new = batch.Batch(members)
    new._kept = kept
    return new


PARTS: dict[str, list[tuple[Any, str, Any]]] = {
    "thin products as batches of row blocks": [(products, "_FEW", 0)],
    "thin products added in strips of eight rows": [(products, "_THIN", 0)],
    "the closed form of a real plane": [(update, "_rotate_plane_", update._rotate_planes_)],
    "real cores by their squares": [(core, "_SMOOTH", -1.0)],
    "Ω formed for the smallest": [(tangent, "_FORMED", 0)],
    "the gradient's check by its sketch": [
        (local_step.LocalStep, "_shows_nonfinite", lambda *_: False)
    ],
    "batches kept between steps": [
        (tagged.TaggedParams, "_is_current", lambda _: False),
        (batches.Batches, "_batch", _new_batch),
    ],
    "one comparison of all parameters' storages": [(tagged, "_same_storage", lambda *_: False)],
    "three applications of Ω in cache, which cost": [(tangent, "_APPLIES", (1, 1))],
}
DENSE_PARTS: dict[str, list[tuple[Any, str, Any]]] = {
    "elimination by blocks in the place of a solve": [(maps, "_NEAR", -1.0)],
    "half of the Gram matrix": [(polish, "_WIDE", math.inf)],
}


@contextmanager
def without(part: str | None) -> Iterator[None]:
    """Run with a part disabled."""
    changes = (PARTS | DENSE_PARTS)[part] if part else []
    kept = [(owner, name, vars(owner)[name]) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)


def make(n: int, count: int, rank: int | None) -> torch.optim.Optimizer:
    """Return ProjUNN-T, or dense Cayley without a rank, over matrices that have a gradient."""
    source = torch.Generator().manual_seed(n)
    params = []
    for _ in range(count):
        drawn = torch.randn(n, n, generator=source)
        # A permutation is orthogonal too, and fast to make.
        x = (
            torch.linalg.qr(drawn)[0]
            if n <= 1024
            else torch.eye(n)[torch.randperm(n, generator=source)]
        )
        p = ru.tag_(torch.nn.Parameter(x.contiguous()), ru.Orthogonal())
        p.grad = torch.randn(n, n, generator=source) / n
        params.append(p)
    if rank is None:
        return ru.optim.Cayley(params, lr=1e-2)
    return ru.optim.ProjUNNT(params, lr=1e-2, rank=rank)


def ratios(n: int, count: int, rank: int | None, rounds: int) -> tuple[float, dict[str, float]]:
    """Return the mean step with all levers, in ms, and the ratio for each part left out."""
    levers = DENSE_PARTS if rank is None else PARTS
    optimizer, names = make(n, count, rank), [None, *levers]
    # Dense steps polish every time, small ones every fourth.
    steps = 2 if rank is None else _PERIOD if count == 1 else 4
    times: dict[str | None, list[float]] = {name: [] for name in names}
    for repeat in tqdm(range(rounds + 1), desc=f"{count} of n = {n}, rank {rank}", leave=False):
        for name in random.Random(repeat).sample(names, len(names)):
            with without(name):
                optimizer.step()
                begin = time.perf_counter()
                for _ in range(steps):
                    optimizer.step()
                if repeat > 0:  # the first is for warming up
                    times[name].append((time.perf_counter() - begin) / steps)
    mean = {name: statistics.fmean(values) for name, values in times.items()}
    return 1e3 * mean[None], {name: mean[name] / mean[None] for name in levers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    cases: list[tuple[int, int, int | None]] = [
        *[(n, 1, 1) for n in (64, 512, 2048, 4096)],
        *[(64, 1, 8), (4096, 1, 8), (16, 1024, 1), (1024, 1, None)],
    ]
    columns = [ratios(*case, args.rounds) for case in cases]
    heads = [
        f"{c} of n={n}" if c > 1 else f"n={n}, {f'rank {k}' if k else 'Cayley'}"
        for n, c, k in cases
    ]
    print("| without | " + " | ".join(heads) + " |")
    print("|---" * (len(cases) + 1) + "|")
    for part in PARTS | DENSE_PARTS:
        found = [f"{column[1][part]:.2f}" if part in column[1] else "" for column in columns]
        print(f"| {part} | " + " | ".join(found) + " |")
    print("| mean ms with all | " + " | ".join(f"{column[0]:.3g}" for column in columns) + " |")


if __name__ == "__main__":
    main()
