"""Bases that have a state before the first step: theirs is completed, and nothing else happens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import riemann_unn as ru
from riemann_unn.optim.initial_state import begin_states_
from tests.support import gaussian, parameter


def begin(optimizer):
    members = optimizer._tagged.members()
    begin_states_(members, [], optimizer.state, optimizer._seeds, optimizer._retraction)


ENTRIES = {"retraction_step", "coordinates"}


@pytest.mark.parametrize("rank", [1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_first_step_would_note_is_noted(rank, dtype):
    p = ru.tag_(nn.Parameter(parameter(6, 6).detach().to(dtype)), ru.Stiefel())
    free = nn.Parameter(torch.ones(2))
    optimizer = ru.optim.ProjUNNT([p, free], lr=0.1, rank=rank, base=torch.optim.Adagrad)
    own = set(optimizer.state[p])
    before = p.detach().clone()
    p.grad = kept = gaussian(6, 6, dtype=torch.float32).to(dtype)
    for name in own - {"sum", "step"}:  # as if the base alone had noted something
        del optimizer.state[p][name]
    begin(optimizer)
    noted = optimizer.state[p]
    assert set(noted) == own >= ENTRIES and noted["retraction_step"] == 0
    assert ("sketch_directions" in noted) == (rank == 1)
    assert ("master" in noted) == (dtype is torch.bfloat16)
    assert torch.equal(p, before) and p.grad is kept and noted["sum"].dtype is torch.float32
    optimizer.step()
    assert set(noted) == own and noted["retraction_step"] == 1 and not torch.equal(p, before)


def test_those_that_a_base_has_not_begun_or_that_have_stepped_are_left_alone():
    p, q = parameter(4, 4), parameter(4, 4, seed=1)
    optimizer = ru.optim.ProjUNNT([p, q], lr=0.1, base=torch.optim.Adam)
    p.grad = gaussian(4, 4, dtype=torch.float32)
    optimizer.step()
    noted = dict(optimizer.state[p])
    begin(optimizer)
    assert optimizer.state[p] == noted and noted["retraction_step"] == 1
    assert not optimizer.state.get(q)
