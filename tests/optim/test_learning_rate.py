"""A learning rate of NaN or infinity is refused before anything moves, wherever it comes from."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import riemann_unn as ru
from tests.support import gaussian, parameter

BAD = [math.nan, math.inf, -math.inf]
BASES = [(torch.optim.SGD, {}), (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adam, {})]


def ready(base=torch.optim.SGD, **options):
    params = [parameter(6, 6), nn.Parameter(torch.ones(3))]
    optimizer = ru.optim.ProjUNNT(params, lr=0.1, base=base, **options)
    for i, p in enumerate(params):
        p.grad = gaussian(*p.shape, dtype=torch.float32, seed=i)
    return params, optimizer


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("make", [float, torch.tensor])
def test_the_constructor_refuses_it(bad, make):
    p = parameter(6, 6)
    if not (bad < 0):
        with pytest.raises(ru.NonFiniteError, match=r"param_groups\[0\] has lr=(nan|inf)"):
            ru.optim.ProjUNNT([p], lr=make(bad))
    with pytest.raises(ru.NonFiniteError, match=r"param_groups\[1\] has lr="):
        ru.optim.ProjUNNT([{"params": [p]}, {"params": [parameter(5, 5)], "lr": make(bad)}], lr=0.1)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("make", [float, torch.tensor])
@pytest.mark.parametrize(("base", "options"), BASES)
def test_a_step_refuses_it_before_the_base_moves(bad, make, base, options):
    params, optimizer = ready(base, **options)
    values = [p.detach().clone() for p in params]
    optimizer.param_groups[0]["lr"] = make(bad)
    with pytest.raises(ru.NonFiniteError, match=r"param_groups\[0\] has lr=.*finite"):
        optimizer.step()
    assert all(torch.equal(p, v) for p, v in zip(params, values, strict=True))
    assert not optimizer.state
    optimizer.param_groups[0]["lr"] = make(0.1)
    optimizer.step()
    assert not any(torch.equal(p, v) for p, v in zip(params, values, strict=True))


def test_a_tensor_that_becomes_nan_is_seen():
    params, optimizer = ready()
    optimizer.param_groups[0]["lr"] = rate = torch.tensor(0.1)
    optimizer.step()
    values = [p.detach().clone() for p in params]
    rate.fill_(math.nan)
    with pytest.raises(ru.NonFiniteError):
        optimizer.step()
    assert all(torch.equal(p, v) for p, v in zip(params, values, strict=True))


def test_a_group_that_is_added():
    _, optimizer = ready()
    with pytest.raises(ru.NonFiniteError, match=r"param_groups\[1\]"):
        optimizer.add_param_group({"params": [parameter(5, 5)], "lr": math.nan})
    assert len(optimizer.param_groups) == 1
    optimizer.step()
