"""Curves for line searches against slow oracles."""

from __future__ import annotations

import pytest
import torch

from riemann_unn.linalg.curves import Curve, closest_to_descent, projected, riemannian_gradient
from tests.support import DTYPES, assert_on_manifold, every, gaussian, point, rounding

SHAPES = {"square": (7, 7), "tall": (9, 4), "batched": (3, 6, 6), "batched tall": (2, 8, 3)}
COMPLEX = [torch.float64, torch.complex128]


def inner(a, b):
    return float((a.conj() * b).sum().real)


def direction(x, seed):
    return riemannian_gradient(x, gaussian(*x.shape, dtype=x.dtype, seed=seed))


@every("phi", ["cayley", "exp", "polar"])
@every("dtype", DTYPES)
@every("shape", SHAPES.values())
def test_a_curve_stays_on_the_manifold(shape, dtype, phi):
    x = point(*shape, dtype=dtype)
    curve = Curve(x, direction(x, 1), phi=phi)
    for t in (0.0, 1e-3, 0.7, 30.0):
        assert_on_manifold(curve.point(t))
    assert float((curve.point(0.0) - x).abs().max()) <= rounding(dtype, 10)


@every("phi", ["cayley", "exp", "polar"])
@every("dtype", COMPLEX)
@every("shape", SHAPES.values())
def test_the_velocity_gives_the_derivative_of_any_loss(shape, dtype, phi):
    x, m = point(*shape, dtype=dtype), gaussian(*shape, dtype=dtype, seed=2)
    curve = Curve(x, direction(x, 3), phi=phi)

    def loss(y):
        return (y - m).abs().pow(4).sum() + (m.conj() * y).sum().real

    for t in (0.0, 0.4, 2.0):
        y = curve.point(t).requires_grad_()
        (g,) = torch.autograd.grad(loss(y), y)
        slope = inner(riemannian_gradient(y.detach(), g), curve.velocity(t))
        h = 1e-5
        expected = float(loss(curve.point(t + h)) - loss(curve.point(t - h))) / (2 * h)
        assert slope == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_the_start_is_no_velocity_elsewhere():
    """The control: away from the start the direction itself gives another derivative."""
    x, m = point(7, 7), gaussian(7, 7, seed=2)
    curve = Curve(x, direction(x, 3))
    y = curve.point(2.0)
    g = riemannian_gradient(y, m)
    h = 1e-5
    expected = inner(m, curve.point(2 + h) - curve.point(2 - h)) / (2 * h)
    assert inner(g, curve.velocity(2.0)) == pytest.approx(expected, rel=1e-6)
    assert inner(g, curve._d) != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("dtype", COMPLEX)
def test_projections_are_the_nearest_tangents(dtype):
    x = point(9, 4, dtype=dtype)
    d = gaussian(3, 9, 4, dtype=dtype, seed=1)
    found = projected(x, d)
    inside = x.mH @ found
    assert float((inside + inside.mH).abs().max()) <= 1e-14
    assert float((projected(x, found) - found).abs().max()) <= 1e-14
    for one, kept in zip(d, found, strict=True):
        assert abs(inner(one - kept, kept)) <= 1e-13


@every("dtype", COMPLEX)
@every("shape", SHAPES.values())
def test_the_linear_part_is_least_where_it_is_said(shape, dtype):
    x, g = point(*shape, dtype=dtype), gaussian(*shape, dtype=dtype, seed=5)
    y = closest_to_descent(x, g)
    assert_on_manifold(y)
    if shape[-1] == shape[-2] and not dtype.is_complex:
        assert bool((torch.linalg.det(y) * torch.linalg.det(x) > 0).all())
    free = closest_to_descent(x, g, keep_det=False)
    assert inner(g, free) <= inner(g, y) + 1e-12
    norms = torch.linalg.matrix_norm(g, ord="nuc").sum()
    assert inner(g, free) == pytest.approx(-float(norms))
    for seed in range(5):
        other = Curve(y, direction(y, seed)).point(0.1)
        assert inner(g, y) <= inner(g, other) + 1e-12
