"""The polar factor by SVD beside iterations, and the peak memory of warm-starting a thin matrix.

Each row times three ways to the nearest orthogonal matrix of a Gaussian one in one process, and
says how far each is from it: ``excess``, its distance relative to the least there is, less one, and
``error``, its orthogonality error. The iterations are given the smallest singular value.
Before these, the same excess of ``method="lie"`` for n up to 64.
``python bench/bench_polar.py [--sizes 128 256 512 1024] [--rounds 3]``
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import riemann_unn as ru
from riemann_unn.linalg import polar


def quintic(low: float) -> tuple[float, float, float, float]:
    """The odd quintic that is nearest to 1 on [low, 1], by Remez exchange, and its error there."""
    inner = (0.25 * (3 * low + 1), 0.25 * (low + 3))
    a = b = c = e = 0.0
    for _ in range(100):
        x = torch.tensor([low, *inner, 1.0], dtype=torch.float64)
        sign = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        system = torch.stack([x, x**3, x**5, sign], dim=1)
        old = e
        a, b, c, e = torch.linalg.solve(system, torch.ones_like(x)).tolist()
        root = (9 * b * b - 20 * a * c) ** 0.5
        inner = (((-3 * b - root) / (10 * c)) ** 0.5, ((-3 * b + root) / (10 * c)) ** 0.5)
        if abs(e - old) < 1e-14:
            break
    return a, b, c, e


def polar_express(x: Tensor, low: float) -> Tensor:
    """Newton-Schulz with the best quintic in every step (Amsel et al. 2025): products only."""
    high = 2.1 * len(x) ** 0.5  # the norm of a Gaussian matrix, from above
    x, low = x / high, 0.99 * low / high
    while low < 1 - 1e-4:
        a, b, c, e = quintic(low)
        gram = x.mH @ x
        x = (a * x + x @ (b * gram + c * (gram @ gram))) / (1 + e)
        low = (1 - e) / (1 + e)
    for _ in range(2):
        x = 1.5 * x - 0.5 * x @ (x.mH @ x)
    return x


def scaled_newton(x: Tensor, low: float) -> Tensor:
    """Higham's Newton iteration with 1, inf-norm scaling: one inverse in each step."""
    tolerance = 10 * torch.finfo(x.dtype).eps ** 0.5
    for _ in range(30):
        inverse = torch.linalg.inv(x).mH
        a, b = (m.abs().sum(0).max() * m.abs().sum(1).max() for m in (x, inverse))
        mu = (b / a) ** 0.25
        new = 0.5 * (mu * x + inverse / mu)
        moved = torch.linalg.matrix_norm(new - x) / torch.linalg.matrix_norm(new)
        x = new
        if moved < tolerance:
            break
    return 1.5 * x - 0.5 * x @ (x.mH @ x)


METHODS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "SVD": lambda x, _: polar(x),
    "Polar Express": polar_express,
    "scaled Newton": scaled_newton,
}


def measure(n: int, rounds: int) -> None:
    """Print one line for a size."""
    generator = torch.Generator().manual_seed(n)
    w = torch.randn(n, n, generator=generator)
    values = torch.linalg.svdvals(w.double() if n <= 2048 else w).double()
    least = float((values - 1).norm())
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    found = {}
    for _ in range(rounds):
        for name, method in METHODS.items():
            start = time.perf_counter()
            found[name] = method(w, float(values[-1]))
            times[name].append(time.perf_counter() - start)
    base = statistics.median(times["SVD"])
    for name, u in found.items():
        seconds = statistics.median(times[name])
        excess = float((w.double() - u.double()).norm()) / least - 1
        error = float(ru.orthogonality_error(u))
        print(
            f"n {n:5d}  {name:14s} {1e3 * seconds:9.1f} ms  {seconds / base:5.2f} of SVD  "
            f"excess {excess:8.1e}  error {error:.1e}",
            flush=True,
        )


def lie(n: int) -> None:
    """Print how near the descent in the Lie algebra comes, and what it takes."""
    w = torch.randn(n, n, generator=torch.Generator().manual_seed(n))
    report = {}
    for method in ("polar", "lie"):
        p = ru.tag_(torch.nn.Parameter(w.clone()), ru.Orthogonal())
        start = time.perf_counter()
        report[method] = ru.init.warm_start_(p, method=method, progress=False)["parameter"]
        seconds = time.perf_counter() - start
    steps = len(report["lie"].loss)
    excess = report["lie"].distance / report["polar"].distance - 1
    print(f"n {n:5d}  lie {steps:13d} steps {1e3 * seconds:6.0f} ms  {'':12s}excess {excess:8.1e}")


MEMORY = """
import resource, torch, riemann_unn as ru
p = ru.tag_(torch.nn.Parameter(torch.randn(30000, 50)), ru.Stiefel())
ru.init.warm_start_(ru.tag_(torch.nn.Parameter(torch.randn(64, 8)), ru.Stiefel()))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ru.init.warm_start_(p)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    weight = 30000 * 50 * 4 / 2**20
    print(
        f"30000 x 50, a weight of {weight:.1f} MiB: {float(done.stdout):.0f} MiB more at the peak"
    )
    for n in (2, 4, 8, 16, 32, 64):
        lie(n)
    for n in options.sizes:
        measure(n, options.rounds if n <= 1024 else 1)


if __name__ == "__main__":
    main()
