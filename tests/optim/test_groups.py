"""Groups by kind: which parameter is where, and with which options."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import riemann_unn as ru


def net() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    ru.tag_(model, {"0.weight": ru.Orthogonal()})
    ru.init.warm_start_(model)
    return model


def test_tagged_parameters_come_first_and_shared_ones_once():
    model = net()
    tagged, others = ru.param_groups(model, lr=1e-2, tagged_lr=1e-3)
    assert [id(p) for p in tagged["params"]] == [id(model[0].weight)]
    assert len(others["params"]) == len(list(model.parameters())) - 1
    assert (tagged["lr"], others["lr"]) == (1e-3, 1e-2)


def test_options_go_to_both_and_those_of_tagged_ones_win_there():
    tagged, others = ru.param_groups(
        net(), lr=1e-2, weight_decay=0.1, momentum=0.9, tagged_momentum=0.0
    )
    assert (tagged["lr"], tagged["weight_decay"], tagged["momentum"]) == (1e-2, 0.1, 0.0)
    assert (others["lr"], others["weight_decay"], others["momentum"]) == (1e-2, 0.1, 0.9)


def test_the_groups_train():
    model = net()
    groups = ru.param_groups(model, lr=0.1, tagged_lr=0.01, weight_decay=0.0)
    optimizer = ru.optim.ProjUNNT(groups, lr=1.0, base=torch.optim.AdamW)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.1]
    before = model[0].weight.detach().clone()
    model[2](model[0](torch.randn(8, 4))).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, model[0].weight)
    assert ru.orthogonality_error(model)["0.weight"] < 1e-6


def test_a_group_without_parameters_is_left_out():
    assert len(ru.param_groups(nn.Linear(3, 3), lr=0.1)) == 1
    model = nn.Linear(3, 3, bias=False)
    ru.tag_(model, {"weight": ru.Orthogonal()})
    (group,) = ru.param_groups(model, lr=0.1)
    assert group["params"][0] is model.weight


@pytest.mark.parametrize("name", ["params", "tagged_params"])
def test_parameters_come_from_the_model(name):
    with pytest.raises(TypeError, match="from the model"):
        ru.param_groups(net(), lr=0.1, **{name: []})


def test_a_lost_tag_raises():
    model = net()
    model[0].weight = nn.Parameter(torch.eye(4))
    with pytest.raises(ru.LostTagError):
        ru.param_groups(model, lr=0.1)
