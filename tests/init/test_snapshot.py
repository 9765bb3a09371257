"""A record puts a model back, bit for bit, as often as it is asked to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from riemann_unn.init.snapshot import ModelSnapshot


def network():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU())
    net[1].eval()
    net[0].bias.requires_grad_(False)
    net[0].extra = "attribute"
    return net


def disturb(net):
    with torch.no_grad():
        net[0].weight.zero_()
        net[1].running_mean.add_(1)
    net[0].bias.requires_grad_(True)
    net[1].train()
    net[0].register_forward_hook(lambda *_: None)
    net[0].extra = "other"
    net[2].new = 1
    net[0].weight = nn.Parameter(torch.ones(3, 3))
    net.append(nn.Identity())
    torch.rand(2)
    torch._C._set_grad_enabled(False)


def test_all_is_put_back_and_may_be_again():
    net = network()
    weight, mean = net[0].weight, net[1].running_mean
    values, random = (weight.detach().clone(), mean.clone()), torch.get_rng_state()
    record = ModelSnapshot(net)
    (copy,) = record.keep([weight])
    assert torch.equal(copy, weight) and copy.data_ptr() != weight.data_ptr()
    try:
        for _ in range(2):
            disturb(net)
            record.restore()
            record.restore()
            assert net[0].weight is weight and torch.equal(weight, values[0])
            assert net[1].running_mean is mean and torch.equal(mean, values[1])
            assert not net[0].bias.requires_grad and net[0].extra == "attribute"
            assert not net[1].training and not net[0]._forward_hooks and len(net) == 3
            assert not hasattr(net[2], "new")
            assert torch.equal(torch.get_rng_state(), random) and torch.is_grad_enabled()
    finally:
        torch._C._set_grad_enabled(True)


def test_values_that_were_not_kept_stay_as_they_are_written():
    """The control: a record costs no copy of all parameters."""
    net = network()
    record = ModelSnapshot(net)
    disturb(net)
    record.restore()
    assert not net[0].weight.any() and torch.is_grad_enabled()


@pytest.mark.parametrize("kind", [nn.LazyLinear, nn.LazyBatchNorm1d])
def test_what_has_no_values_yet_is_left_out(kind):
    net = kind(3) if kind is nn.LazyLinear else kind()
    ModelSnapshot(net).restore()
    assert isinstance(net.weight, nn.parameter.UninitializedParameter)
