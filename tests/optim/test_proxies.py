"""A base sees stand-ins for one step, and no trace of them is left."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from riemann_unn.optim.proxies import Proxy, step_proxies
from tests.support import gaussian


def made():
    params = [nn.Parameter(gaussian(4, seed=i)) for i in range(3)]
    base = torch.optim.Adam([{"params": params[:2]}, {"params": params[2:], "lr": 0.5}])
    for i, p in enumerate(params):
        p.grad = gaussian(4, seed=10 + i)
    return params, base


def test_a_base_moves_the_stand_in_by_its_gradient_and_state():
    params, base = made()
    twins, twin = made()
    first = [p.detach().clone() for p in params]
    states = [{}, {}]
    for _ in range(3):  # the state of the stand-ins is carried from step to step
        zeros = [torch.zeros(4, dtype=torch.float64) for _ in states]
        ones = [
            Proxy(params[i], z, params[i].grad, state)
            for i, z, state in zip((0, 2), zeros, states, strict=True)
        ]
        step_proxies(base, ones, lambda: base.step() and None)
        states = [one.state for one in ones]
        before = [p.detach().clone() for p in twins]
        twin.step()
        for i, z in zip((0, 2), zeros, strict=True):
            assert torch.allclose(z, twins[i] - before[i], atol=1e-14) and z.any()
    assert torch.equal(params[1], twins[1])  # the one that stood for itself
    assert torch.equal(params[0], first[0]) and torch.equal(params[2], first[2])
    assert states[0].keys() == twin.state[twins[0]].keys() and states[0]["step"] == 3
    assert all(torch.equal(states[1][k], v) for k, v in twin.state[twins[2]].items())


def test_groups_and_state_are_as_they_were_after_an_error_too():
    params, base = made()

    def failing():
        base.step()
        raise KeyError

    one = Proxy(params[0], torch.zeros(4, dtype=torch.float64), params[0].grad, {})
    for step in (lambda: base.step() and None, failing):
        with pytest.raises(KeyError) if step is failing else torch.enable_grad():
            step_proxies(base, [one], step)
        assert [id(p) for g in base.param_groups for p in g["params"]] == list(map(id, params))
        assert set(base.state) == set(params[1:])


def test_without_stand_ins_it_is_a_step():
    params, base = made()
    twins, twin = made()
    step_proxies(base, [], lambda: base.step() and None)
    twin.step()
    assert all(map(torch.equal, params, twins))
