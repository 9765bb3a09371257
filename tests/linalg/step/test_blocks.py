"""Kernels on blocks: processes played by turns in one, against the kernels on whole matrices."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import riemann_unn.linalg as la
from riemann_unn.linalg.step import blocks as bl
from riemann_unn.linalg.step.blocks import Block
from riemann_unn.linalg.step.tangent import gaussian_draws
from tests.support import every

CUTS = {"rows": (3, 1), "columns": (1, 3), "both": (2, 3), "uneven": (4, 1), "copies": (1, 1)}
SHAPES = [(9, 9), (6, 13), (13, 13), (3, 8, 8), (2, 5, 11)]
DTYPES = [torch.float64, torch.complex128]


def blocks(shape: tuple[int, ...], cut: str, copies: int) -> list[Block]:
    """The blocks of all processes: rows and columns in chunks, as torch shards them."""
    parts = []
    for size, count in zip(shape[-2:], CUTS[cut], strict=True):
        step = -(-size // count)
        edges = [min(i * step, size) for i in range(count + 1)]
        parts.append([slice(a, b) for a, b in pairwise(edges)])
    batch = [slice(0, size) for size in shape[:-2]]
    flags = (*[False] * len(batch), CUTS[cut][0] > 1, CUTS[cut][1] > 1)
    return [
        Block(shape, (*batch, rows, columns), flags, copies)
        for _ in range(copies)
        for rows in parts[0]
        for columns in parts[1]
    ]


def run(computations: list) -> list:
    """Run the same computation of all processes: each yield is answered by the sums over them."""
    answers: list = [None] * len(computations)
    sums = 0
    while True:
        asked, ends = [], []
        for computation, answer in zip(computations, answers, strict=True):
            try:
                asked.append(computation.send(answer))
            except StopIteration as end:
                ends.append(end.value)
        if ends:
            assert not asked, "the processes do not ask alike"
            return ends
        sums += 1
        answers = [[sum(parts) for parts in zip(*asked, strict=True)]] * len(computations)


def points(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    g = torch.randn(*shape, dtype=dtype, generator=generator)
    x = la.polar(torch.randn(*shape, dtype=dtype, generator=generator).mH).mH
    return x.contiguous(), g


def close(some: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(some, other, rtol=0, atol=1e-12)


@every("copies", [1, 2])
@every("cut", CUTS)
@every("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@every("rank", [1, 2])
def test_a_step_of_blocks_is_the_step_of_the_whole(shape, dtype, cut, copies, rank):
    x, g = points(shape, dtype)
    parts = blocks(shape, cut, copies)
    xs, gs = [x[b.index].clone() for b in parts], [g[b.index] for b in parts]

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(5)

    # Below 64 the whole Ω is formed, which changes no more than rounding.
    v, z, xv = la.tangent_directions(x, g, rank=rank, generator=seeded())
    found = run(
        [
            bl.block_directions(b, p, q, rank=rank, start=None, draws=gaussian_draws(p, seeded()))
            for b, p, q in zip(parts, xs, gs, strict=True)
        ]
    )
    for one in found:
        assert torch.equal(one[0], found[0][0]) and torch.equal(one[1], found[0][1])
        close(one[0], v)
        close(one[1], z)
    shown = la.tangent_gradient(x, v, z, xv)
    seen = run([bl.block_gradient(b, p, *one) for b, p, one in zip(parts, xs, found, strict=True)])
    for b, one in zip(parts, seen, strict=True):
        close(one, shown[b.index])
    delta = torch.sin(3 * shown) + 0.1  # what an elementwise base could make of it
    d = la.tangent_coordinates(x, delta, v, xv)
    read = run(
        [
            bl.block_coordinates(b, p, delta[b.index], one[0], one[2])
            for b, p, one in zip(parts, xs, found, strict=True)
        ]
    )
    for one in read:
        close(one, d)
    angle, added = la.rotate_low_rank_(x, v, d.clone(), xv, phi="cayley")
    turned = run(
        [
            bl.block_rotate_(b, p, one[0], e, one[2], phi="cayley")
            for b, p, one, e in zip(parts, xs, found, read, strict=True)
        ]
    )
    for b, p, (a, start) in zip(parts, xs, turned, strict=True):
        close(p, x[b.index])
        close(a, angle)
        close(start, added)


@every("cut", CUTS)
@every("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (70, 70), (66, 90)])
def test_corrections_of_blocks_sweep_the_error_away(shape, dtype, cut):
    x, g = points(shape, dtype)
    x = x + 1e-6 * g
    parts = blocks(shape, cut, 1)
    whole = Block(shape, tuple(slice(0, s) for s in shape), (False,) * len(shape))
    (before,) = run([bl.block_error(whole, x)])
    for step in range(2 * shape[-2]):
        xs = [x[b.index].clone() for b in parts]
        found = run([bl.block_correction(b, p, step=step) for b, p in zip(parts, xs, strict=True)])
        for b, p, (due, update) in zip(parts, xs, found, strict=True):
            p[due].sub_(update)
            x[b.index] = p
    errors = run([bl.block_error(b, x[b.index]) for b in parts])
    assert float(before.max()) > 1e-7
    for error in errors:
        assert torch.equal(error, errors[0])
        assert float(error.max()) < 1e-10


def test_errors_of_blocks_estimate_the_true_one():
    x, g = points((40, 60), torch.float64)
    x = x + 1e-3 * g
    parts = blocks((40, 60), "both", 1)
    found = run([bl.block_error(b, x[b.index]) for b in parts])
    true = torch.linalg.matrix_norm(x @ x.mH - torch.eye(40, dtype=x.dtype)) / 40**0.5
    assert 0.7 < float(found[0] / true) < 1.4


def test_the_whole_is_put_together():
    x, _ = points((9, 9), torch.float64)
    for copies in (1, 2):
        for one in run([bl.block_whole(b, x[b.index]) for b in blocks((9, 9), "both", copies)]):
            assert torch.equal(one, x)
