"""Polishing: a sweep mends an error to its square, at the cost of a block at a time."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from riemann_unn.linalg import newton_schulz_, polish_
from riemann_unn.linalg.step.polish import polish_block_
from tests.support import DTYPES, assert_on_manifold, error, gaussian, point, rounding

SHAPES = [(70, 70), (130, 130), (90, 65), (3, 20, 20)]


def rough(shape, dtype, size):
    x = point(*shape, dtype=dtype)
    return x + size * gaussian(*shape, dtype=dtype, seed=9) / shape[-1] ** 0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_squares_the_error(shape, dtype):
    x = rough(shape, dtype, 1e-3)
    before = error(x)
    newton_schulz_(x)
    assert error(x) <= max(3 * before**2 * shape[-1] ** 0.5, 5e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(70, 70), (90, 65), (7, 3), (3, 20, 20), (5, 0)])
def test_half_of_the_inner_products_and_their_adjoints(shape, dtype, monkeypatch):
    monkeypatch.setattr("riemann_unn.linalg.step.polish._WIDE", 0)
    x = rough(shape, dtype, 1e-3)
    expected = x @ (1.5 * torch.eye(shape[-1], dtype=dtype) - 0.5 * x.mH @ x)
    assert x.numel() == 0 or (newton_schulz_(x) - expected).abs().max() <= rounding(dtype, 90)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sweep_of_blocks_mends_everything(shape, dtype):
    x = rough(shape, dtype, 1e-5)
    assert error(x) > 5e-6
    for _ in range(2):
        for start in range(0, shape[-1], 16):
            polish_block_(x, start, min(start + 16, shape[-1]))
    assert_on_manifold(x)


def test_every_column_gets_its_turn():
    x = rough((700, 600), torch.float64, 1e-6)
    touched = torch.zeros(600, dtype=torch.bool)
    turns = 0
    for step in range(32 * 10):
        before = x.clone()
        polish_(x, step=step)
        changed = (x != before).any(0)
        turns += int(changed.any())
        assert int(changed.sum()) <= 64
        touched |= changed
    assert touched.all() and turns == 10


def test_cost_per_step_grows_as_the_square_of_n():
    def flops(n: int) -> float:
        x = torch.eye(n)
        with FlopCounterMode(display=False) as counter:
            for step in range(64):
                polish_(x, step=step)
        return counter.get_total_flops() / 64

    # n² per step, where a Newton-Schulz sweep would grow eightfold.
    assert flops(2048) / flops(1024) == pytest.approx(4.0, rel=0.05)
    assert flops(1024) < 20 * 1024**2


def test_polished_points_do_not_wander():
    x = point(50, 50, dtype=torch.float32)
    y = x.clone()
    for step in range(500):
        polish_(x, step=step)
    assert (x - y).abs().max() < 1e-6
