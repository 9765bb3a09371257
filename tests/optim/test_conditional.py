"""What a base has written is kept or undone, as a flag says that nobody reads."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from riemann_unn.optim.conditional import step_where
from tests.support import gaussian
from tests.unread import Unread

BASES = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "adam": (torch.optim.Adam, {"capturable": False, "foreach": False}),
    "fused": (torch.optim.Adam, {"fused": True}),
    "nadam": (torch.optim.NAdam, {}),
    "rprop": (torch.optim.Rprop, {}),
}


def made(name):
    kind, options = BASES[name]
    params = [nn.Parameter(gaussian(3, seed=i, dtype=torch.float32)) for i in range(2)]
    return params, kind(params, lr=0.1, **options)


def give_gradients(params, seed):
    for i, p in enumerate(params):
        p.grad = gaussian(3, seed=seed + i, dtype=torch.float32)


def stepped(params, base, flags):
    pairs = [(p, torch.tensor(flag)) for p, flag in zip(params, flags, strict=True)]
    step_where(base, lambda: base.step() and None, pairs, pairs)


@pytest.mark.parametrize("name", BASES)
def test_a_step_that_is_not_taken_leaves_values_and_state(name):
    params, base = made(name)
    for seed in (1, 2):
        give_gradients(params, seed)
        base.step()
    values = [p.detach().clone() for p in params]
    state = copy.deepcopy(base.state_dict()["state"])
    twins, twin = made(name)
    for seed in (1, 2, 3):
        give_gradients(twins, seed)
        twin.step()
    give_gradients(params, 3)
    stepped(params, base, (False, False))
    assert all(torch.equal(p, v) for p, v in zip(params, values, strict=True))
    for i, kept in base.state_dict()["state"].items():
        for key, value in kept.items():
            if key not in ("eta", "mu", "step"):  # a count on the host is not looked at
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(state[i][key])), key
    params, base = made(name)
    for seed in (1, 2):
        give_gradients(params, seed)
        base.step()
    give_gradients(params, 3)
    stepped(params, base, (True, True))
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


@pytest.mark.parametrize("name", ["sgd", "rprop"])
def test_each_parameter_has_its_flag_and_nothing_is_read(name):
    params, base = made(name)
    give_gradients(params, 1)
    before = [p.detach().clone() for p in params]
    pairs = [(params[0], torch.tensor(False)), (params[1], torch.tensor(True))]
    with Unread() if name == "sgd" else nullcontext():  # Rprop's own step reads
        step_where(base, lambda: base.step() and None, pairs, pairs)
    assert torch.equal(params[0], before[0]) and not torch.equal(params[1], before[1])
    for key, value in base.state[params[0]].items():
        if isinstance(value, torch.Tensor) and key != "step_size":
            assert not value.any(), key  # as if it had not begun
