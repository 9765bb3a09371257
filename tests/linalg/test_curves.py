"""Curves for line searches, the direction of L-BFGS, against slow oracles; and the line search."""

from __future__ import annotations

import math

import pytest
import torch

from riemann_unn.linalg.curves import Curve, closest_to_descent, projected, riemannian_gradient
from riemann_unn.linalg.quasi_newton import is_curved, quasi_newton_direction
from riemann_unn.optim.line_search import Trial, strong_wolfe
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


# The direction -------------------------------------------------------------------------


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


# The line search -------------------------------------------------------------------------


def searched(function, slope, step, **options):
    asked = []

    def evaluate(t):
        asked.append(t)
        return Trial(t, function(t), slope(t))

    found = strong_wolfe(
        evaluate, value=function(0.0), slope=slope(0.0), step=step, noise=1e-14, **options
    )
    return found, asked


LOSSES = {
    "parabola": (lambda t: (t - 3) ** 2, lambda t: 2 * (t - 3)),
    "period": (lambda t: -math.sin(t), lambda t: -math.cos(t)),
    "quartic": (lambda t: (t - 2) ** 4 - t, lambda t: 4 * (t - 2) ** 3 - 1),
    "steep": (lambda t: -t / (t * t + 2), lambda t: (t * t - 2) / (t * t + 2) ** 2),
}


@pytest.mark.parametrize("step", [1e-6, 1e-2, 1.0, 20.0, 1e6])
@pytest.mark.parametrize("name", LOSSES)
def test_steps_meet_the_strong_wolfe_conditions(name, step):
    f, slope = LOSSES[name]
    found, asked = searched(f, slope, step)
    t = found.trial.step
    assert t in asked and len(asked) <= 25
    assert f(t) <= f(0) + 1e-4 * t * slope(0)
    assert abs(slope(t)) <= 0.9 * abs(slope(0))


def test_what_is_not_finite_is_too_long():
    found, _ = searched(
        lambda t: math.nan if t > 0.1 else (t - 3) ** 2, lambda t: 2 * (t - 3), step=50.0
    )
    assert 0 < found.trial.step <= 0.1
    found, asked = searched(lambda t: math.inf if t else 0.0, lambda t: -1.0, step=1.0)
    assert found.trial is None and len(asked) <= 25
    assert found.nearest.step == min(asked)


def test_a_rising_loss_is_refused():
    """The control: a slope that is not the loss's own."""
    found, _ = searched(lambda t: t, lambda t: -1.0, step=1.0)
    assert found.trial is None
