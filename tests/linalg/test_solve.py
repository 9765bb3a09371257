"""Elimination by blocks against LAPACK's solve, in double precision."""

from __future__ import annotations

import pytest
import torch

from riemann_unn.linalg import rotate_by, skew
from riemann_unn.linalg.solve import times_inverse
from tests.support import DTYPES, double, every, gaussian, point, rounding


def system(*shape, dtype, size):
    k = skew(gaussian(*shape, dtype=dtype))
    k = k * (size / torch.linalg.matrix_norm(k, ord=2).amax())
    return torch.eye(shape[-1], dtype=dtype) + k


@pytest.fixture(autouse=True)
def blocks_are_small(monkeypatch):
    monkeypatch.setattr("riemann_unn.linalg.solve._BLOCK", 8)


@every("dtype", DTYPES)
@every("shape", [(32, 32), (37, 37), (8, 8), (3, 3), (2, 19, 19), (2, 3, 9, 9)])
@every("size", [1e-4, 0.3, 2.0])
def test_against_the_solve(dtype, shape, size):
    m = system(*shape, dtype=dtype, size=size)
    for rows in (1, 40):
        x = gaussian(*shape[:-2], rows, shape[-1], dtype=dtype, seed=1)
        before = x.clone(), m.clone()
        expected = torch.linalg.solve(double(m), double(x), left=False)
        gap = (times_inverse(x, m) - expected).abs().max()
        assert gap <= rounding(dtype, shape[-1], factor=20)
        assert torch.equal(x, before[0]) and torch.equal(m, before[1])
    wrong = torch.linalg.solve(double(m).mH, double(x), left=False)
    assert size < 1e-3 or (wrong - expected).abs().max() > 1e-2  # the check can fail


def test_digits_are_lost_where_the_skew_part_is_large():
    """Which is why rotate_by asks how large it is."""
    errors = []
    for size in (2.0, 2e3):
        m = system(64, 64, dtype=torch.float64, size=size)
        x = gaussian(64, 64, seed=1)
        expected = torch.linalg.solve(m, x, left=False)
        errors.append(float((times_inverse(x, m) - expected).norm() / expected.norm()))
    assert errors[1] > 100 * errors[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_steps_near_the_identity_use_it(dtype, monkeypatch):
    monkeypatch.setattr("riemann_unn.linalg.maps._WIDE", 80)
    calls = []
    monkeypatch.setattr(
        "riemann_unn.linalg.maps.times_inverse",
        lambda x, m: calls.append(m.shape) or times_inverse(x, m),
    )
    x = point(80, 80, dtype=dtype)
    for size in (1.0, 40.0, 1e4):
        z = gaussian(80, 80, dtype=dtype, seed=2) * (size / 80)
        k = skew(double(z))
        eye = torch.eye(80, dtype=k.dtype)
        expected = double(x) @ torch.linalg.solve(eye - 0.5 * k, eye + 0.5 * k)
        moved = rotate_by(x, skew(z), phi="cayley")
        assert (moved - expected).abs().max() <= rounding(dtype, 80, factor=100) * max(size, 1)
        assert len(calls) == 1  # for the first size alone


def test_not_a_number_goes_through():
    m = system(20, 20, dtype=torch.float64, size=1.0)
    m[3, 4] = torch.nan
    assert times_inverse(gaussian(20, 20), m).isnan().any()
