"""A point that the optimizer knew and that has lost its tag raises, and nothing is changed."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import riemann_unn as ru
from tests.support import assert_on_manifold, gaussian

BASES = [(torch.optim.SGD, {}), (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adam, {})]


def net() -> nn.Sequential:
    """Three linear layers, the first two orthogonal."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    ru.tag_(model, {"[01].weight": ru.Orthogonal()})
    ru.init.warm_start_(model)
    return model


def give_gradients(model: nn.Module, step: int = 0) -> None:
    for i, p in enumerate(model.parameters()):
        p.grad = gaussian(*p.shape, dtype=p.dtype, seed=10 * step + i)


def ready(base=torch.optim.SGD, options=None):
    model = net()
    optimizer = ru.optim.ProjUNNT(model.parameters(), lr=0.1, base=base, **(options or {}))
    for step in range(2):
        give_gradients(model, step)
        optimizer.step()
    return model, optimizer


@contextmanager
def unchanged(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Weights, gradients and state are bit for bit the same afterwards, in the same objects."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    params += list(model.parameters())
    values = [(p.detach().clone(), None if p.grad is None else p.grad.clone()) for p in params]
    grads = [p.grad for p in params]
    state = {p: copy.deepcopy(entries) for p, entries in optimizer.state.items()}
    yield
    for p, grad, (value, grad_value) in zip(params, grads, values, strict=True):
        assert p.grad is grad and torch.equal(p, value)
        assert grad is None or torch.equal(grad, grad_value)
    assert optimizer.state.keys() == state.keys()
    for p, entries in optimizer.state.items():
        assert entries.keys() == state[p].keys()
        for key, value in entries.items():
            kept = state[p][key]
            assert torch.equal(value, kept) if torch.is_tensor(value) else value == kept


@contextmanager
def swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def swap_tensors(model, optimizer):
    for layer in model[:2]:
        layer.weight.grad = None
        torch.utils.swap_tensors(layer.weight, nn.Parameter(layer.weight.detach().clone()))
    give_gradients(model)


def swap_one(model, optimizer):
    model[0].weight.grad = None
    torch.utils.swap_tensors(model[0].weight, nn.Parameter(model[0].weight.detach().clone()))
    give_gradients(model)


def swap_by_double(model, optimizer):
    with swapping():
        model.double()
    give_gradients(model)


def swap_by_load(model, optimizer):
    optimizer.zero_grad()
    with swapping():
        model.load_state_dict(copy.deepcopy(model.state_dict()))
    give_gradients(model)


def delete_the_attribute(model, optimizer):
    del model[0].weight.manifold


def replace_in_group(model, optimizer):
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    optimizer.param_groups[0]["params"] = list(model.parameters())
    give_gradients(model)


def replace_group(model, optimizer):
    replace_in_group(model, optimizer)
    optimizer.param_groups[0] = dict(optimizer.param_groups[0])


def replace_groups(model, optimizer):
    replace_in_group(model, optimizer)
    optimizer.param_groups = [dict(optimizer.param_groups[0])]


def replace_outside_of_modules(model, optimizer):
    p = nn.Parameter(model[0].weight.detach().clone())
    p.grad = torch.ones_like(p)
    optimizer.param_groups[0]["params"][0] = p


def untag_the_last(model, optimizer):
    ru.untag_(model)


def leave_none(model, optimizer):
    params = optimizer.param_groups[0]["params"]
    params[:] = [p for p in params if ru.manifold_of(p) is None]


AGAIN = r"call riemann_unn\.tag_"
LOSSES = {
    swap_tensors: rf"'0.weight' has lost its tag.*{AGAIN} again after torch.utils.swap_tensors",
    swap_one: rf"'0.weight' has lost its tag.*{AGAIN} again after torch.utils.swap_tensors",
    swap_by_double: r"'0.weight' has lost its tag.*conversion\(True\), and create the optimizer",
    swap_by_load: r"'0.weight' has lost its tag.*conversion\(True\), and create the optimizer",
    delete_the_attribute: rf"'0.weight' has lost its tag.*{AGAIN}",
    replace_in_group: rf"'0.weight' is no longer in param_groups.*{AGAIN} on the new parameter",
    replace_group: r"'0.weight' is no longer in param_groups",
    replace_groups: r"'0.weight' is no longer in param_groups",
    replace_outside_of_modules: r"'0.weight' is no longer in param_groups",
    untag_the_last: r"no parameter of the optimizer is tagged any more.*riemann_unn\.tag_",
    leave_none: r"no parameter of the optimizer is tagged any more",
}


@pytest.mark.parametrize(("base", "options"), BASES)
@pytest.mark.parametrize("lose", LOSSES, ids=lambda f: f.__name__)
def test_a_lost_tag_raises_at_the_next_step(lose, base, options):
    model, optimizer = ready(base, options)
    lose(model, optimizer)
    with unchanged(model, optimizer):
        for _ in range(2):  # and at each step after
            with pytest.raises(ru.LostTagError, match=LOSSES[lose]) as caught:
                optimizer.step()
    assert isinstance(caught.value, ValueError)
    params = {p for group in optimizer.param_groups for p in group["params"]}
    if optimizer.state.keys() <= params:  # or else torch itself fails; nor is the loss loaded away
        with unchanged(model, optimizer), pytest.raises(ru.LostTagError):
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.step()


def test_the_remedy_of_a_swap():
    model, optimizer = ready()
    swap_by_double(model, optimizer)
    ru.tag_(model, {"[01].weight": ru.Orthogonal()})
    ru.init.warm_start_(model)
    optimizer = ru.optim.ProjUNNT(model.parameters(), lr=0.1)
    optimizer.step()
    assert_on_manifold(model[0].weight)


def test_a_new_parameter_that_is_tagged_may_take_the_place():
    model, optimizer = ready()
    replace_in_group(model, optimizer)
    ru.tag_(model[0].weight, ru.Orthogonal())
    ru.init.warm_start_(model)
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert_on_manifold(model[0].weight)
    assert not torch.equal(model[0].weight, before)


def test_one_of_several_may_be_untagged():
    for how in ("before", "untag", "and tag again"):
        model, optimizer = ready()
        free = model[0].weight
        if how == "before":  # the old one is released, then replaced
            ru.untag_(free)
            free = model[0].weight = nn.Parameter(free.detach().clone())
            optimizer.param_groups[0]["params"] = list(model.parameters())
        else:
            ru.untag_(free)
        if how == "and tag again":
            ru.tag_(free, ru.Orthogonal())
        give_gradients(model)
        plain = free.detach() - 0.1 * free.grad
        optimizer.step()
        if how == "and tag again":
            assert_on_manifold(free)
            del free.manifold  # and it is known anew
            with pytest.raises(ru.LostTagError, match="has lost its tag"):
                optimizer.step()
        else:
            assert torch.allclose(free, plain, atol=1e-6)
        assert_on_manifold(model[1].weight)


def test_parameters_and_groups_may_be_removed_and_added():
    model = net()
    groups = [{"params": [model[0].weight]}, {"params": [model[1].weight, model[2].weight]}]
    optimizer = ru.optim.ProjUNNT(groups, lr=0.1)
    give_gradients(model)
    optimizer.step()
    kept = model[0].weight.detach().clone()
    del optimizer.param_groups[0]
    optimizer.step()
    assert torch.equal(model[0].weight, kept)
    optimizer.add_param_group({"params": [model[0].bias]})
    optimizer.add_param_group({"params": [model[0].weight]})
    optimizer.step()
    assert not torch.equal(model[0].weight, kept)
    optimizer.param_groups[0]["params"].pop(0)
    kept = model[1].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model[1].weight, kept)
    assert_on_manifold(model[0].weight)


def test_groups_and_state_that_are_assigned_are_those_that_step():
    model, optimizer = ready(torch.optim.Adam)
    group = dict(optimizer.param_groups[0])
    optimizer.param_groups = [{**group, "lr": 0.0}]
    kept = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(map(torch.equal, model.parameters(), kept))
    optimizer.state = type(optimizer.state)(dict)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert optimizer.state[model[0].weight]["step"] == 1
    assert_on_manifold(model[0].weight)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_optimizers_are_as_watchful(copier):
    model, optimizer = copier(ready())
    give_gradients(model)
    optimizer.step()
    swap_one(model, optimizer)
    with pytest.raises(ru.LostTagError, match="has lost its tag"):
        optimizer.step()
    # Lost before the copy has taken a step: the model remembers.
    model, optimizer = ready()
    swap_one(model, optimizer)
    model, optimizer = copier((model, optimizer))
    give_gradients(model)
    with pytest.raises(ru.LostTagError, match=r"'0.weight' of Linear was tagged"):
        optimizer.step()


def test_optimizers_are_not_kept_alive_by_what_they_listen_to():
    model, optimizer = ready()
    optimizer.step()
    from riemann_unn.tagging import memory

    del optimizer
    gc.collect()
    count = len(memory._listeners)
    _, optimizer = model, ru.optim.ProjUNNT(model.parameters(), lr=0.1)
    assert len(memory._listeners) == count + 1
    del optimizer
    gc.collect()
    assert len(memory._listeners) == count


@pytest.mark.parametrize("ours", [True, False])
def test_monitors_notice_too(ours):
    model = net()
    kind = ru.optim.ProjUNNT if ours else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=0.1)
    ru.Monitor(optimizer)
    give_gradients(model)
    optimizer.step()
    swap_one(model, optimizer)
    with unchanged(model, optimizer), pytest.raises(ru.LostTagError, match=r"'0.weight' has lost"):
        optimizer.step()
    with pytest.raises(ru.LostTagError, match=r"'0.weight' of Linear was tagged"):
        ru.Monitor(optimizer)
