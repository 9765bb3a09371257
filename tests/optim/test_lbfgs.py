"""L-BFGS: it reaches the minimum, never rises, and stays on the manifold."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import riemann_unn as ru
from tests.optim.lbfgs_problems import C128, F64, MADE, closure_of, fit, near, rotation, tagged
from tests.support import assert_on_manifold, gaussian, point


@pytest.mark.parametrize("name", MADE)
def test_targets_are_reached(name):
    params, targets = near(name)
    start = [p.detach().clone() for p in params]
    optimizer, values = ru.optim.LBFGS(params), []
    loss = fit(params, targets)
    first = optimizer.step(closure_of(optimizer, loss, values))
    assert float(first.detach()) == values[0]
    for _ in range(2):
        optimizer.step(closure_of(optimizer, loss, values))
    assert values[0] > 1e-2
    assert float(loss().detach()) <= 1e-16 * values[0]
    for p, t, s in zip(params, targets, start, strict=True):
        assert float((p - t).detach().abs().max()) <= 1e-7
        assert not torch.equal(p, s)
        manifold = ru.manifold_of(p)
        if manifold is not None:
            assert_on_manifold(p, manifold)
            assert manifold.has_det(p)


@pytest.mark.parametrize("name", MADE)
def test_the_loss_never_rises(name):
    params, targets = near(name, seed=3)
    optimizer = ru.optim.LBFGS(params, max_iter=1)
    loss, last = fit(params, targets), math.inf
    for _ in range(30):
        optimizer.step(closure_of(optimizer, loss))
        value = float(loss().detach())
        assert value <= last
        last = value
    assert last <= 1e-8


@pytest.mark.parametrize("n", [64, 128])
@pytest.mark.parametrize("kind", ["fidelity", "distance", "linear"])
def test_complex_targets_are_reached(n, kind):
    target = point(n, n, dtype=C128, seed=7)
    p = tagged(n, n, dtype=C128, seed=8, manifold=ru.Unitary())
    m = target @ torch.diag(torch.linspace(1, 3, n, dtype=F64)).to(C128)  # with the same polar part
    m = m if kind == "linear" else target
    losses = {
        "fidelity": lambda: n - (target.conj() * p).sum().abs(),
        "distance": lambda: (p - target).abs().square().sum(),
        "linear": lambda: -(m.conj() * p).sum().real,
    }
    best = -float(torch.linalg.svdvals(m).sum()) if kind == "linear" else 0.0
    optimizer, values = ru.optim.LBFGS([p]), []
    for _ in range(2):
        optimizer.step(closure_of(optimizer, losses[kind], values))
    assert (float(losses[kind]().detach()) - best) / (values[0] - best) <= 1e-10
    assert float(ru.orthogonality_error(p)) <= 1e-14


@pytest.mark.parametrize("name", ["square", "tall", "wide", "batch", "kernel", "flatten"])
def test_points_that_are_rough_are_mended(name):
    params, targets = near(name)
    with torch.no_grad():
        for p in params:
            p.mul_(1 + 1e-8)
    optimizer = ru.optim.LBFGS(params, max_iter=2)
    optimizer.step(closure_of(optimizer, fit(params, targets)))
    for p in params:
        assert_on_manifold(p, p.manifold)


def test_concave_losses_are_solved_on_the_whole_manifold():
    """Procrustes by few evaluations, in the component of the start; a convex one has no jump."""
    m = gaussian(20, 20, seed=1)
    p = rotation(20, 1, seed=2)
    q = ru.tag_(nn.Parameter(p.detach().clone()), ru.Orthogonal())
    values = []
    optimizer = ru.optim.LBFGS([q])
    optimizer.step(closure_of(optimizer, lambda: -(q * m).sum(), values))
    u, s, vh = torch.linalg.svd(m)
    s[-1] *= (torch.linalg.det(u) * torch.linalg.det(vh)).sign()
    assert values[2] == pytest.approx(-float(s.sum()), rel=1e-12)
    assert torch.linalg.det(q) > 0


# Smooth problems ---------------------------------------------------------------------


@settings(max_examples=settings().max_examples // 2, deadline=None)
@given(
    name=st.sampled_from(list(MADE)),
    seed=st.integers(0, 10**6),
    size=st.floats(-6, 6),
    kind=st.sampled_from(["quartic", "waves", "quotient", "linear"]),
)
def test_smooth_losses_never_rise_and_are_never_nan(name, seed, size, kind):
    params = MADE[name](seed % 1000)
    c = [gaussian(*p.shape, dtype=p.dtype, seed=seed + i) for i, p in enumerate(params)]

    def loss():
        x = torch.cat([torch.view_as_real(p).flatten() if p.is_complex() else p.flatten()
                       for p in params])  # fmt: skip
        y = torch.cat([torch.view_as_real(t).flatten() if t.is_complex() else t.flatten()
                       for t in c])  # fmt: skip
        inner, square = (x * y).sum(), (x * x * y).sum()
        value = {
            "quartic": (x - y).pow(4).sum() + square,
            "waves": torch.sin(3 * x + y).sum() + (x - y).square().sum() / 10,
            "quotient": square / (1 + inner.square()) + x.square().sum() / 10,
            "linear": inner + x.pow(4).sum() / 100,
        }[kind]
        return value * 10**size

    optimizer = ru.optim.LBFGS(params, max_iter=4)
    last = float(loss().detach())
    for _ in range(5):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step(closure_of(optimizer, loss))
        value = float(loss().detach())
        assert value <= last
        last = value
    for p in params:
        assert bool(torch.isfinite(p).all())
        if ru.manifold_of(p) is not None:
            assert_on_manifold(p, p.manifold)
