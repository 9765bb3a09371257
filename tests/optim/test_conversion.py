"""A parameter's dtype may not change under the state that was made for another."""

from __future__ import annotations

import pytest
import torch

from riemann_unn.errors import ManifoldError
from riemann_unn.optim.conversion import refuse_conversions

OWN = {"retraction_step": 3, "sketch_directions": torch.ones(1)}
BASE = {**OWN, "exp_avg": torch.ones(2)}
HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
CASES = [
    (SINGLE, SINGLE, BASE, False),
    (SINGLE, DOUBLE, {}, False),
    (SINGLE, DOUBLE, OWN, False),  # which have no precision to lose
    (SINGLE, DOUBLE, BASE, True),
    (SINGLE, HALF, OWN, True),  # whether there is a master has to stay as it was
    (HALF, SINGLE, OWN, True),
    (HALF, torch.float16, OWN, False),
    (HALF, torch.float16, BASE, True),
]


@pytest.mark.parametrize(("was", "now", "kept", "is_refused"), CASES)
def test_conversions_are_refused_where_a_state_would_not_fit(was, now, kept, is_refused):
    p, other = torch.zeros(2, dtype=now), torch.zeros(2)
    state = {p: dict(kept), other: dict(BASE)}
    params = [("other", other, SINGLE), ("weight", p, was)]
    if not is_refused:
        refuse_conversions(params, state)
        return
    with pytest.raises(ManifoldError, match=f"weight was {was} .* and is {now} now; create"):
        refuse_conversions(params, state)
    assert state[p].keys() == kept.keys()
