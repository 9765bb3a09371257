"""The accuracy of function-aware low rank relative to the truncated SVD, and its cost.

Run from the repository: ``python bench/bench_low_rank.py``. On real activations the demo measures
it: ``python -m riemann_unn.demo lowrank``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn
from tqdm import tqdm

import riemann_unn as ru
from riemann_unn.init.low_rank.problem import Method
from riemann_unn.linalg import function_error, function_factors, spectral_factors

GAUSSIAN = [(512, 512, 1), (512, 512, 16), (512, 128, 8), (128, 512, 4), (512, 512, 128)]


def converged(w: Tensor, rank: int) -> float:
    """L-BFGS over both factors in double precision until it stops."""
    w = w.double()
    start = spectral_factors(w, rank=rank)
    x = [t.contiguous().clone().requires_grad_() for t in (start.A, start.B)]
    optimizer = torch.optim.LBFGS(
        x, max_iter=300, tolerance_grad=1e-10, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )
    kernel = ru.linalg.activation_kernel
    own = kernel(w, w).sum()

    def closure() -> Tensor:
        optimizer.zero_grad()
        v = x[0] @ x[1]
        value = (own - 2 * kernel(w, v).sum() + kernel(v, v).sum()) / own
        value.backward()
        return value

    optimizer.step(closure)
    return function_error(w, (x[0] @ x[1]).detach())


def gaussian() -> Iterator[tuple[tuple[int, int, int], list[float], list[float]]]:
    """Shape and rank, errors of all ways, and shares of the gain of L-BFGS."""
    for m, n, r in tqdm(GAUSSIAN, leave=False):
        w = torch.randn(m, n, generator=torch.Generator().manual_seed(0)) * (2 / n) ** 0.5
        factors = [spectral_factors(w, rank=r)]
        factors += [function_factors(w, rank=r, iterations=i) for i in (0, None)]
        errors = [function_error(w, f.A @ f.B) for f in factors] + [converged(w, r)]
        yield (m, n, r), errors, [(errors[0] - e) / (errors[0] - errors[3]) for e in errors[1:3]]


def show_gaussian() -> None:
    print("relative function error, ReLU, Gaussian inputs, He-initialised weights, float32")
    columns = ("spectral", "lengths", "default", "L-BFGS")
    print(f"{'shape, rank':16}{''.join(f'{c:>10}' for c in columns)}{'share of gain':>15}")
    for (m, n, r), errors, gains in gaussian():
        row = "".join(f"{e:10.4f}" for e in errors) + "".join(f"{g:7.1%}" for g in gains)
        tqdm.write(f"{f'{m}x{n}, {r}':16}{row}")


def timed(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def cost(n: int, repeats: int) -> None:
    print(f"\ntime over that of torch.linalg.svd, {n}x{n}, float32, median of {repeats}")
    w = torch.randn(n, n, generator=torch.Generator().manual_seed(0)) * (2 / n) ** 0.5
    columns = ("svd (s)", "spectral", "lengths", "default", "low_rank_")
    print(f"{'rank':>6}{''.join(f'{c:>10}' for c in columns)}")
    for rank in tqdm((1, 16, 128, 900), leave=False):
        model = nn.Sequential(nn.Linear(n, n, bias=False), nn.ReLU())
        with torch.no_grad():
            model[0].weight.copy_(w)
        dense = model[0]
        contenders: list[Callable[[], object]] = [
            partial(torch.linalg.svd, w, full_matrices=False),
            partial(spectral_factors, w, rank=rank),
            partial(function_factors, w, rank=rank, iterations=0),
            partial(function_factors, w, rank=rank),
            partial(ru.init.low_rank_, model, rank=rank, progress=False),
        ]
        runs = []
        for _ in range(repeats):
            runs.append([timed(contender) for contender in contenders])
            model[0] = dense
        times = [statistics.median(column) for column in zip(*runs, strict=True)]
        ratios = "".join(
            f"{t / times[0]:{w}.2f}" for t, w in zip(times[1:], (10, 10, 10, 11), strict=True)
        )
        tqdm.write(f"{rank:6}{times[0]:10.2f}{ratios}")


def refinement() -> None:
    """The effect of refining for each activation: errors and seconds of whole calls."""
    print("\nerror and seconds of low_rank_ of one layer with a bias")
    print(f"{'layer':30}{'spectral':>15}{'refine=0':>15}{'default':>15}{'refined':>15}")
    shapes, activations = ((512, 512), (768, 3072)), (nn.ReLU, nn.GELU, nn.SiLU)
    for (m, n), activation, share, calibrated in product(shapes, activations, (0, 4), (0, 1)):
        rank = min(m, n) // share if share else 1
        kind = "calibrated" if calibrated else "Gaussian"
        row = f"{f'{m}x{n} {activation.__name__} {rank} {kind}':30}"
        ways: list[tuple[Method, int | None]] = [("spectral", 0), ("function", 0)]
        ways += [("function", None), ("function", 100 if calibrated else 12)]
        for method, refine in ways:
            error, seconds = _refined(m, n, activation, rank, bool(calibrated), method, refine)
            row += f"{f'{error:.4f} {seconds:.2f}':>15}"
        print(row, flush=True)


def _refined(
    m: int,
    n: int,
    activation: type[nn.Module],
    rank: int,
    calibrated: bool,
    method: Method,
    refine: int | None,
) -> tuple[float, float]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(n, m), activation())
    nn.init.normal_(net[0].weight, std=n**-0.5)
    inputs = None
    if calibrated:
        mix = torch.randn(n, n) * torch.arange(1, n + 1).float() ** -0.5
        inputs = torch.randn(5120, n) @ (mix * (n**0.5 / mix.norm()))
    start = time.process_time()
    report = ru.init.low_rank_(
        net, rank=rank, calibration=inputs, method=method, refine=refine, progress=False
    )
    seconds = time.process_time() - start
    layer = report["0"]
    return (layer.held_out or layer.gaussian)[1], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=2048, help="side of the matrix that is timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--refine", action="store_true", help="only what refining is worth")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.refine:
        refinement()
        return
    show_gaussian()
    cost(args.n, args.repeats)


if __name__ == "__main__":
    main()
