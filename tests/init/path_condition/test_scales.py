"""Path conditioning of networks whose layers or channels are scaled by many orders of magnitude."""

import copy
import warnings

import pytest
import torch
from torch import nn

from riemann_unn.init import path_condition_
from riemann_unn.linalg.rescaling import solver
from tests.support import generator

methods = pytest.mark.parametrize("method", ["logdet", "enorm"])


def mlp(*, dtype=torch.float32):
    g = generator(2)
    model = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    ).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / 4)
    return model


def scaled(model, factors):
    """The same function: a layer and its bias multiplied, the weight of the next one divided."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for first, second, factor in zip((0, 2), (2, 4), factors, strict=True):
            model[first].weight.mul_(factor if isinstance(factor, float) else factor[:, None])
            model[first].bias.mul_(factor)
            model[second].weight.div_(factor)
    return model


@methods
@pytest.mark.parametrize("factor", [1e8, 1e-8, 1e15])
def test_a_layer_scaled_up_and_the_next_one_down_comes_back(method, factor):
    """In float32 at 1e8 the objective once rose from 18793 to 30431."""
    plain, other = mlp(), scaled(mlp(), (factor, 1.0))
    one, two = (path_condition_(m, method=method) for m in (plain, other))
    assert two.converged and two.objective_after <= two.objective_before
    if method == "enorm":  # the other objective is relative to where it starts
        assert two.objective_after == pytest.approx(one.objective_after, rel=1e-5)
    for p, q in zip(plain.parameters(), other.parameters(), strict=True):
        assert float((p - q).detach().norm() / p.detach().norm()) <= 1e-5


@methods
def test_channels_scaled_by_twenty_orders_come_back(method):
    plain = mlp(dtype=torch.float64)
    g = generator(3)
    factors = [10 ** (40 * torch.rand(16, generator=g, dtype=torch.float64) - 20) for _ in range(2)]
    other = scaled(plain, factors)
    x = torch.randn(5, 8, generator=g, dtype=torch.float64)
    before = other(x).detach()
    one, two = (path_condition_(m, method=method) for m in (plain, other))
    assert two.converged and two.objective_after <= two.objective_before
    if method == "enorm":
        assert two.objective_after == pytest.approx(one.objective_after, rel=1e-9)
    assert float((other(x).detach() - before).norm() / before.norm()) <= 1e-12
    for p, q in zip(plain.parameters(), other.parameters(), strict=True):
        assert float((p - q).detach().norm() / p.detach().norm()) <= 1e-5


@methods
def test_a_solver_that_stops_early_says_so_and_leaves_nothing_worse(method, monkeypatch):
    monkeypatch.setattr(solver, "_iterate", lambda problem, state, *rest: (state, 0))
    model = scaled(mlp(), (1e4, 1.0))
    with pytest.warns(UserWarning, match=r"relative gradient of .*raise tolerance, or call undo"):
        report = path_condition_(model, method=method)
    assert not report.converged and report.objective_after <= report.objective_before


def test_a_warning_that_is_an_error_changes_nothing(monkeypatch):
    monkeypatch.setattr(solver, "_iterate", lambda problem, state, *rest: (state, 0))
    model = scaled(mlp(), (1e4, 1.0))
    before = [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="not optimal"):
        warnings.simplefilter("error")
        path_condition_(model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
