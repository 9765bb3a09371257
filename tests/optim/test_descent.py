"""The iterations of L-BFGS on a quadratic whose minimum is known, and when they end."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import riemann_unn as ru
from riemann_unn.errors import ManifoldTypeError, NonFiniteError
from riemann_unn.optim.coordinates import Coordinates
from riemann_unn.optim.descent import Descent, Memory, loss_value
from tests.support import gaussian, parameter

OPTIONS = {
    "lr": 1.0,
    "max_iter": 30,
    "max_eval": 60,
    "history_size": 10,
    "tolerance_grad": 1e-10,
    "tolerance_change": 0.0,
    "line_search_fn": "strong_wolfe",
}


def quadratic(n=6):
    root = gaussian(n, n, seed=1)
    a, b = root @ root.T + torch.eye(n, dtype=torch.float64), gaussian(n, seed=2)
    p = nn.Parameter(torch.zeros(n, dtype=torch.float64))
    asked = []

    def closure():
        asked.append(p.detach().clone())
        p.grad = None
        loss = 0.5 * p @ a @ p - b @ p
        loss.backward()
        return loss

    return p, closure, torch.linalg.solve(a, b), asked


def descended(p, closure, memory=None, **options):
    memory, kept = memory or Memory(), []
    still = parameter(2, 2, dtype=torch.float64)  # which has no gradient
    members = ru.optim.ProjUNNT([still], lr=0.1)._tagged.members()
    descent = Descent(closure, Coordinates(members, [p]), memory, OPTIONS | options)
    loss = descent.run_(lambda m: kept.append((m.n_iter, m.func_evals)))
    return float(loss.detach()), descent, kept


def test_the_minimum_is_found_and_evaluations_are_counted():
    p, closure, best, asked = quadratic()
    first, descent, kept = descended(p, closure)
    assert first == 0 and (p - best).abs().max() <= 1e-9
    assert descent.evals == len(asked) == descent.memory.func_evals == kept[-1][1]
    assert [n for n, _ in kept[:-1]] == list(range(1, len(kept)))
    assert not torch.allclose(asked[1], best, atol=1e-3)  # not at once


def test_pairs_are_kept_up_to_the_size_of_the_history():
    p, closure, _, _ = quadratic()
    _, descent, _ = descended(p, closure, history_size=3, max_iter=6)
    m = descent.memory
    assert len(m.steps) == len(m.changes) == 3 and m.n_iter == 6
    for s, y in zip(m.steps, m.changes, strict=True):
        assert float(s @ y) > 0
    p, closure, _, _ = quadratic()
    assert descended(p, closure, history_size=0, max_iter=3)[1].memory.steps == []


@pytest.mark.parametrize(
    ("options", "iterations"), [({"max_iter": 2}, 2), ({"max_iter": 0}, 0), ({"max_eval": 2}, 1)]
)
def test_iterations_end_where_they_are_told_to(options, iterations):
    p, closure, _, _ = quadratic()
    _, descent, _ = descended(p, closure, **options)
    assert descent.memory.n_iter == iterations


def test_large_tolerances_end_it_early():
    p, closure, _, _ = quadratic()
    assert descended(p, closure, tolerance_grad=1e9)[1].evals == 1
    p, closure, _, _ = quadratic()
    assert descended(p, closure, tolerance_change=1e9)[1].memory.n_iter == 1


def test_a_memory_is_gone_on_with():
    p, closure, best, _ = quadratic()
    _, first, _ = descended(p, closure, max_iter=5)
    count = first.memory.func_evals
    _, second, _ = descended(p, closure, memory=first.memory, max_iter=20)
    assert second.memory.func_evals == count + second.evals
    assert (p - best).abs().max() <= 1e-9


def test_a_loss_that_is_not_finite_where_it_begins_changes_nothing():
    p = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def closure():
        p.grad = torch.full_like(p, torch.nan)
        return torch.tensor(1.0)

    with pytest.raises(NonFiniteError, match="Nothing was changed"):
        descended(p, closure)
    assert torch.equal(p, torch.ones(2))


def test_a_loss_is_one_real_number():
    assert loss_value(torch.tensor([2.0], requires_grad=True)) == loss_value(2) == 2.0
    assert math.isnan(loss_value(torch.nan))
    for value in (None, torch.zeros(2), torch.tensor(1j), "one"):
        with pytest.raises(ManifoldTypeError, match="end it with `return loss`"):
            loss_value(value)
