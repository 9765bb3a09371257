"""The cost of convolution kernels: a step and its layer, conv_exp and a pair of transforms.

Each row times two functions alternately in one process: an optimizer step and a forward and
backward pass over whole polish periods, by the ratio of their means, and ``conv_exp``, by that of
medians. ``python bench/bench_conv.py [--rounds 40] [--threads 2]``
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import riemann_unn as ru
from riemann_unn.linalg import conv_exp, conv_skew

# Steps after which every column of kernels of up to 128 channels has been polished.
_PERIODS = 32


def milliseconds(
    first: Callable[[], object], second: Callable[[], object], *, rounds: int
) -> tuple[list[float], list[float]]:
    """Return the times of two functions that are called alternately."""
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(rounds + 3):
        for call, found in zip((first, second), times, strict=True):
            start = time.perf_counter()
            call()
            if index >= 3:
                found.append(1e3 * (time.perf_counter() - start))
    return times


def step_beside_layer(channels: int, size: int, *, batch: int = 32) -> tuple[float, float, float]:
    """Return the mean times of a step and of a forward and backward pass, and that of building."""
    start = time.perf_counter()
    layer = ru.nn.CircularConv2d(channels, channels, size)
    building = 1e3 * (time.perf_counter() - start)
    # With this many channels it is an inner layer, whose backward pass goes on to its input.
    images = torch.randn(batch, channels, size, size, requires_grad=True)
    optimizer = ru.optim.ProjUNNT(layer.parameters(), lr=1e-4)

    def pass_() -> None:
        optimizer.zero_grad()
        images.grad = None
        layer(images).square().mean().backward()

    pass_()
    steps, passes = milliseconds(optimizer.step, pass_, rounds=_PERIODS)
    return statistics.mean(steps), statistics.mean(passes), building


def exp_beside_transforms(size: int, *, rounds: int) -> tuple[float, float]:
    """Time conv_exp of one channel and a transform with its inverse."""
    generator = conv_skew(torch.randn(1, 1, size, size))

    def transforms() -> None:
        torch.fft.irfft2(torch.fft.rfft2(generator), s=(size, size))

    ours, theirs = milliseconds(lambda: conv_exp(generator), transforms, rounds=rounds)
    return statistics.median(ours), statistics.median(theirs)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, help="timed calls of each (default: 40)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{options.threads} threads, float32; means of {_PERIODS} steps at batch 32, medians of ")
    print(f"{options.rounds} calls of conv_exp\n")
    print(f"{'what':45} {'ms':>8} {'beside':>8} {'ratio':>6}")
    for channels, size in ((16, 16), (64, 16), (64, 28), (128, 28)):
        ours, other, building = step_beside_layer(channels, size)
        name = f"ProjUNN-T step / layer, {channels} ch, {size}x{size}"
        print(
            f"{name:45} {ours:8.2f} {other:8.2f} {ours / other:6.2f}   built in {building:.0f} ms"
        )
    for size in (128, 512, 1024):
        ours, other = exp_beside_transforms(size, rounds=options.rounds)
        name = f"conv_exp / FFT and inverse, {size}x{size}"
        print(f"{name:45} {ours:8.2f} {other:8.2f} {ours / other:6.2f}")


if __name__ == "__main__":
    main()
