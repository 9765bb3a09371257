"""The direction of L-BFGS against the matrix itself."""

from __future__ import annotations

import math

import pytest
import torch

from riemann_unn.linalg.quasi_newton import is_curved, quasi_newton_direction
from tests.support import gaussian


def dense_direction(g, steps, changes):
    """The BFGS matrix itself, update by update."""
    scales = [s @ y / (y @ y) for s, y in zip(steps, changes, strict=True)]
    eye = torch.eye(len(g), dtype=g.dtype)
    h = torch.stack(scales).median() * eye
    for s, y in zip(steps, changes, strict=True):
        rho = 1 / (s @ y)
        left = eye - rho * torch.outer(s, y)
        h = left @ h @ left.T + rho * torch.outer(s, s)
    return -h @ g


@pytest.mark.parametrize("k", [0, 1, 4, 5])
def test_two_loops_multiply_by_the_matrix(k):
    n = 12
    root = gaussian(n, n, seed=1)
    steps = list(gaussian(k, n, seed=2))
    changes = [(root @ root.T) @ s for s in steps]
    g = gaussian(n, seed=3)
    found = quasi_newton_direction(g, steps, changes)
    expected = dense_direction(g, steps, changes) if k else -g
    assert float((found - expected).abs().max()) <= 1e-9 * float(expected.abs().max())
    assert float(found @ g) < 0


def test_pairs_without_curvature_are_no_pairs():
    s = gaussian(5, seed=1)
    assert is_curved(s, 2 * s)
    assert not is_curved(s, -s)
    assert not is_curved(s, 0 * s)
    assert not is_curved(s, torch.full_like(s, math.nan))
