"""Who moves side by side: those of one kind with as many steps, in batches that are kept."""

from __future__ import annotations

import torch
from torch import nn

import riemann_unn as ru
from riemann_unn.optim.batch import Batch
from riemann_unn.optim.batches import Batches
from riemann_unn.optim.masked import MaskedBatch
from riemann_unn.optim.transformed import TransformedBatch
from tests.support import parameter


def kernel():
    x = ru.OrthogonalConv(1).random(3, 3, 4).detach().as_subclass(torch.Tensor)
    return ru.tag_(nn.Parameter(x), ru.OrthogonalConv(1))


def members_of(*params, **options):
    optimizer = ru.optim.ProjUNNT(list(params), lr=0.1, **options)
    return optimizer, optimizer._tagged.members()


def names(batches):
    return [[member.param for member in batch.members] for batch in batches]


def alike(found, expected):
    return [list(map(id, some)) for some in names(found)] == [list(map(id, e)) for e in expected]


def test_one_kind_is_one_batch_and_another_is_another():
    a, b, wide, empty, k = (
        parameter(4, 4), parameter(4, 4, seed=1), parameter(3, 5), parameter(4, 0), kernel()
    )  # fmt: skip
    _, members = members_of(a, wide, b, empty, k)
    batches = Batches(counts_on_device=False)
    found = batches.of(members, {})
    assert alike(found, [[a, b], [wide], [k]])  # what is empty has nowhere to go
    assert [type(batch) for batch in found] == [Batch, Batch, TransformedBatch]
    assert all(x is y for x, y in zip(batches.of(members, {}), found, strict=True))
    assert batches.of(members[:1], {})[0] is not found[0]
    assert batches.of([m for m in members if m.param is empty], {}) == []


def test_those_with_more_steps_or_without_a_start_move_apart():
    a, b, c = (parameter(4, 4, seed=i) for i in range(3))
    _, members = members_of(a, b, c)
    start = torch.ones(1, 4)
    state = {
        a: {"retraction_step": 2, "sketch_directions": start},
        b: {"retraction_step": 3, "sketch_directions": start},
        c: {"retraction_step": 2},
    }
    assert alike(Batches(counts_on_device=False).of(members, state), [[a], [b], [c]])
    for kept in state.values():
        kept["sketch_directions"] = start
    assert alike(Batches(counts_on_device=False).of(members, state), [[a, c], [b]])
    # Counts that are on the device are not looked at.
    found = Batches(counts_on_device=True).of(members, state)
    assert alike(found, [[a, b, c]]) and isinstance(found[0], MaskedBatch)


def test_groups_with_options_of_their_own_move_apart():
    a, b = parameter(4, 4), parameter(4, 4, seed=1)
    optimizer = ru.optim.ProjUNNT([{"params": [a]}, {"params": [b], "lr": 0.2}], lr=0.1)
    found = Batches(counts_on_device=False).of(optimizer._tagged.members(), {})
    assert alike(found, [[a], [b]])


def test_what_is_on_its_way_of_batches_given_up_is_remembered():
    a, b = parameter(4, 4), parameter(4, 4, seed=1)
    _, members = members_of(a, b)
    batches = Batches(counts_on_device=True)
    (both,) = batches.of(members, {})
    (one,) = batches.of(members[:1], {})
    assert both.found in batches.masked and one.found in batches.masked
