"""Any torch.optim class as the base: tagged parameters stay exact, others get it as it is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import riemann_unn as ru
from tests.support import assert_on_manifold, error, gaussian, parameter

BASES = {
    "sgd": (torch.optim.SGD, {}),
    "sgd-momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "sgd-nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}),
    "sgd-maximize": (torch.optim.SGD, {"maximize": True}),
    "sgd-foreach": (torch.optim.SGD, {"momentum": 0.9, "foreach": True}),
    "sgd-fused": (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    "adam": (torch.optim.Adam, {}),
    "adam-foreach": (torch.optim.Adam, {"foreach": True}),
    "adam-fused": (torch.optim.Adam, {"fused": True}),
    "adam-amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "adamw-fused": (torch.optim.AdamW, {"fused": True}),
    "rmsprop": (torch.optim.RMSprop, {"alpha": 0.99}),
    "rmsprop-centered": (torch.optim.RMSprop, {"centered": True, "momentum": 0.5}),
    "adagrad": (torch.optim.Adagrad, {}),
    "adagrad-fused": (torch.optim.Adagrad, {"fused": True}),
    "adadelta": (torch.optim.Adadelta, {}),
    "adamax": (torch.optim.Adamax, {}),
    "nadam": (torch.optim.NAdam, {}),
    "radam": (torch.optim.RAdam, {}),
    "rprop": (torch.optim.Rprop, {}),
    "asgd": (torch.optim.ASGD, {}),
}
if hasattr(torch.optim, "Adafactor"):
    BASES["adafactor"] = (torch.optim.Adafactor, {})
if hasattr(torch.optim, "Muon"):
    BASES["muon"] = (torch.optim.Muon, {})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.constrained = nn.Linear(12, 12, bias=False)
        self.head = nn.Linear(12, 5, bias=False)  # Muon takes matrices only

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.constrained(x)))


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    nn.init.orthogonal_(model.constrained.weight)
    ru.tag_(model, {"constrained.weight": ru.Orthogonal()})
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, head_only: bool) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        if head_only:  # gradients that do not depend on what the constrained part does
            for p in model.parameters():
                p.grad = gaussian(*p.shape, dtype=p.dtype, seed=step)
        else:
            model(gaussian(32, 12, dtype=torch.float32, seed=step)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("cls", [ru.optim.ProjUNNT, ru.optim.ProjUNND])
def test_every_base(name, cls):
    base, options = BASES[name]
    model = net()
    before = model.constrained.weight.detach().clone()
    optimizer = cls(model.parameters(), lr=1e-2, base=base, **options)
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.state is optimizer.base.state
    train(model, optimizer, 50, head_only=False)
    assert_on_manifold(model.constrained.weight)
    assert not torch.equal(model.constrained.weight, before)


@pytest.mark.parametrize("name", BASES)
def test_untagged_parameters_get_the_base_bit_for_bit(name):
    base, options = BASES[name]
    model, plain = net(), net()
    ru.untag_(plain)
    ours = ru.optim.ProjUNNT(model.parameters(), lr=1e-2, base=base, **options)
    alone = base([plain.head.weight], lr=1e-2, **options)
    train(model, ours, 50, head_only=True)
    for step in range(50):
        plain.head.weight.grad = gaussian(5, 12, dtype=torch.float32, seed=step)
        alone.step()
    assert torch.equal(model.head.weight, plain.head.weight)
    assert not torch.equal(model.constrained.weight, plain.constrained.weight)


@pytest.mark.parametrize("name", ["sgd-momentum", "adam", "adam-foreach", "rmsprop", "adagrad"])
def test_complex_bases(name):
    base, options = BASES[name]
    p = parameter(8, 8, dtype=torch.complex64, manifold=ru.Unitary())
    optimizer = ru.optim.ProjUNNT([p], lr=1e-2, base=base, **options)
    for step in range(50):
        p.grad = gaussian(8, 8, dtype=torch.complex64, seed=step)
        optimizer.step()
    assert_on_manifold(p)


def test_plain_sgd_takes_the_same_step_with_and_without_the_shortcut():
    class Subclass(torch.optim.SGD):
        """Not exactly SGD, so the displacement is written out."""

    ends = []
    for base in (torch.optim.SGD, Subclass):
        p = parameter(20, 20, dtype=torch.float64)
        optimizer = ru.optim.ProjUNNT([p], lr=0.1, base=base, rank=2)
        for step in range(30):
            p.grad = gaussian(20, 20, seed=step)
            optimizer.step()
        ends.append(p.detach().clone())
    assert (ends[0] - ends[1]).abs().max() < 1e-12


@pytest.mark.parametrize("cls", [ru.optim.ProjUNNT, ru.optim.ProjUNND])
def test_the_first_momentum_step_is_the_plain_step(cls):
    moved = []
    for momentum in (0.0, 0.9):
        p = parameter(10, 10, dtype=torch.float64)
        start = p.detach().clone()
        p.grad = 0.01 * gaussian(10, 10)
        cls([p], lr=0.1, rank=10, momentum=momentum).step()
        moved.append(float((p.detach() - start).norm()))
    assert moved[1] / moved[0] == pytest.approx(1.0, abs=1e-9)


def test_weight_decay_neither_shrinks_nor_edits_gradients():
    for base in (torch.optim.SGD, torch.optim.AdamW):
        p = parameter(8, 8)
        before = p.detach().clone()
        optimizer = ru.optim.ProjUNNT([p], lr=0.1, base=base, weight_decay=0.5)
        for _ in range(20):
            p.grad = torch.zeros_like(p)
            optimizer.step()
        assert torch.equal(p, before)
        p.grad = gaussian(8, 8, dtype=torch.float32)
        grad = p.grad.clone()
        optimizer.step()
        assert torch.equal(p.grad, grad)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_grouped_parameters_move_as_they_would_alone(base):
    together = [parameter(6, 6, dtype=torch.float64, seed=i) for i in range(5)]
    together += [parameter(9, 4, dtype=torch.float64, seed=9), parameter(4, 9, dtype=torch.float64)]
    together += [parameter(3, 6, 6, dtype=torch.float64, seed=4)]
    alone = copy.deepcopy(together)
    # Of one seed in ten, near planes of equal angles, rounding grows to 1e-11 in these steps.
    options = {"lr": 0.05, "rank": 2, "base": base, "seed": 1}
    ours = ru.optim.ProjUNND(together, **options)
    theirs = [ru.optim.ProjUNND([p], **options) for p in alone]
    for step in range(20):
        for p, q in zip(together, alone, strict=True):
            p.grad = gaussian(*p.shape, seed=step)
            q.grad = p.grad.clone()
        ours.step()
        for optimizer in theirs:
            optimizer.step()
    for p, q in zip(together, alone, strict=True):
        assert (p - q).abs().max() < 1e-12
        assert error(p) < 2e-15


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("cls", [ru.optim.ProjUNNT, ru.optim.ProjUNND, ru.optim.Cayley])
def test_maximize_climbs_where_the_default_descends(cls, base):
    target = parameter(8, 8, dtype=torch.float64, seed=5).detach()
    for maximize in (False, True):
        p = parameter(8, 8, dtype=torch.float64)
        optimizer = cls([p], lr=0.01, base=base, maximize=maximize)
        values = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = (p - target).square().sum()
            loss.backward()
            values.append(loss.item())
            optimizer.step()
        assert (values[-1] > values[0]) == maximize


def test_bases_that_cannot_work_are_refused():
    with pytest.raises(ru.ManifoldTypeError, match="base=SparseAdam cannot be used"):
        ru.optim.ProjUNNT([parameter(3, 3)], lr=0.1, base=torch.optim.SparseAdam)


def test_bases_that_are_none_are_refused():
    p = parameter(3, 3)
    for base in (torch.optim.Adam([p]), "adam", nn.Module, None):
        with pytest.raises(ru.ManifoldTypeError, match=r"must be a class of torch\.optim"):
            ru.optim.ProjUNNT([p], lr=0.1, base=base)
    with pytest.raises(ru.ManifoldTypeError, match="manifold optimizer already"):
        ru.optim.ProjUNNT([p], lr=0.1, base=ru.optim.ProjUNND)
