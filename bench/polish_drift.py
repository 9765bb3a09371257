"""Rounding drift over many rank-1 steps, and the share of the step that the polish takes.

Run from the repository: ``python bench/polish_drift.py --n 2048 --steps 10000``.
"""

from __future__ import annotations

import argparse
import time

import torch
from tqdm import trange

import riemann_unn as ru
from riemann_unn import retractions


def measure(n: int, steps: int, size: float, polish: bool, rank: int) -> tuple[float, float, float]:
    """Return the final error, the mean step in ms, and the polish's share of it."""
    spent = 0.0
    polish_ = retractions.polish_

    def timed(x: torch.Tensor, *, step: int) -> torch.Tensor:
        nonlocal spent
        begin = time.perf_counter()
        polish_(x, step=step)
        spent += time.perf_counter() - begin
        return x

    retractions.polish_ = timed
    try:
        source = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.linalg.qr(torch.randn(n, n, generator=source))[0].contiguous())
        ru.tag_(p, ru.Orthogonal())
        optimizer = ru.optim.ProjUNNT([p], lr=size, rank=rank, polish=polish)
        p.grad = torch.empty_like(p)
        total = 0.0
        for _ in trange(steps, desc=f"n={n}, polish={polish}", leave=False):
            u, v = torch.randn(2, n, generator=source)
            torch.outer(u / u.norm(), v / v.norm(), out=p.grad)
            begin = time.perf_counter()
            optimizer.step()
            total += time.perf_counter() - begin
    finally:
        retractions.polish_ = polish_
    return float(ru.orthogonality_error(p)), 1e3 * total / steps, spent / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--size", type=float, default=1e-2, help="length of a step")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--without", action="store_true", help="also run with the polish off")
    args = parser.parse_args()
    print(f"float32, rank {args.rank}, {args.steps} steps of {args.size:g}")
    for polish in (True, False) if args.without else (True,):
        error, step, share = measure(args.n, args.steps, args.size, polish, args.rank)
        print(
            f"n={args.n} polish={polish!s:5}  error {error:.1e}  mean step {step:.2f} ms"
            f"  polish {share:.1%} of it"
        )


if __name__ == "__main__":
    main()
