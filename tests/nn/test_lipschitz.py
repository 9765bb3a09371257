"""GroupSort and certificates."""

import pytest
import torch

from riemann_unn.nn import (
    GroupSort,
    certified_radius,
)
from tests.support import gaussian


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("size", "dim"), [(2, 1), (3, 1), (6, -1), (1, 0)])
def test_group_sort_sorts_groups_and_keeps_norms(size, dim):
    x = gaussian(4, 6, 6).requires_grad_()
    y = GroupSort(size, dim)(x)
    torch.testing.assert_close(y.norm(), x.norm())
    groups = y.movedim(dim, -1).unflatten(-1, (-1, size))
    assert torch.equal(groups.sort(-1).values, groups)
    assert torch.equal(groups.flatten(-2).sort(-1).values, x.movedim(dim, -1).sort(-1).values)
    assert torch.autograd.gradcheck(GroupSort(size, dim), (x,))


def test_certified_radius_is_the_distance_to_the_nearest_wrong_answer():
    # A linear isometry with two orthonormal rows: the boundary is a known hyperplane.
    rows = torch.linalg.qr(gaussian(5, 3)).Q.T
    x = gaussian(40, 5, seed=1)
    logits = x @ rows.T
    radius = certified_radius(logits)
    chosen = logits.argmax(-1)
    normals = rows[chosen][:, None] - rows[None]
    distance = (normals * x[:, None]).sum(-1) / normals.norm(dim=-1)
    distance[torch.arange(40), chosen] = torch.inf
    torch.testing.assert_close(radius, distance.amin(-1))
    torch.testing.assert_close(certified_radius(logits, lipschitz=2.0), radius / 2)
    wrong = (chosen + 1) % 3
    assert torch.equal(certified_radius(logits, wrong), torch.zeros(40, dtype=logits.dtype))
    torch.testing.assert_close(certified_radius(logits, chosen), radius)
