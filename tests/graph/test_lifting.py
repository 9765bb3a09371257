"""Path energies of nets so small that every path can be written down."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from riemann_unn.graph import trace
from riemann_unn.graph.lifting import path_energies
from tests.support import gaussian


class Two(nn.Module):
    """Two linear maps, and what is made of their results."""

    def __init__(self, combine):
        super().__init__()
        self.a, self.b = (nn.Linear(2, 2, bias=False, dtype=torch.float64) for _ in range(2))
        with torch.no_grad():
            self.a.weight.copy_(gaussian(2, 2, seed=1))
            self.b.weight.copy_(gaussian(2, 2, seed=2))
        self.combine = combine

    def forward(self, x):
        return self.combine(self.a, self.b, x)


def energies(combine):
    model = Two(combine)
    found = path_energies(trace(model, torch.zeros(1, 2, dtype=torch.float64)))
    a, b = model.a.weight.detach(), model.b.weight.detach()
    return found["a.weight"], found["b.weight"], a.square(), b.square()


COMBINED = {
    "sum": (lambda a, b, x: torch.add(a(x), b(x), alpha=3), 1, 9),
    "difference": (lambda a, b, x: torch.sub(a(x), b(x), alpha=3), 1, 9),
    "reversed": (lambda a, b, x: torch.rsub(a(x), b(x), alpha=3), 9, 1),
    "scaled": (lambda a, b, x: 0.5 * a(x) + b(x) / 4, 0.25, 1 / 16),
    "negative": (lambda a, b, x: a(x) - b(x), 1, 1),
}


@pytest.mark.parametrize(("combine", "of_a", "of_b"), COMBINED.values(), ids=COMBINED)
def test_sums_and_products_are_those_of_squares(combine, of_a, of_b):
    a, b, *_ = energies(combine)
    assert a.flatten().tolist() == pytest.approx([of_a] * 4)
    assert b.flatten().tolist() == pytest.approx([of_b] * 4)


def test_a_path_goes_through_one_weight_of_each_layer():
    a, b, first, second = energies(lambda a, b, x: b(torch.relu(a(x))))
    assert torch.allclose(a, second.sum(0)[:, None].expand(2, 2))  # on from each row of the first
    assert torch.allclose(b, first.sum(1)[None].expand(2, 2))  # and up to each column of the next


def test_the_larger_of_two_is_that_of_their_squares():
    a, b, first, second = energies(lambda a, b, x: torch.maximum(a(x), b(x)))
    larger = first.sum(1) > second.sum(1)
    assert torch.equal(a, larger[:, None].double().expand(2, 2))
    assert torch.equal(b, (~larger)[:, None].double().expand(2, 2))


def test_inputs_that_are_given_take_the_place_of_ones():
    model = Two(lambda a, b, x: a(x) + b(x))
    x = torch.tensor([[2.0, 3.0]], dtype=torch.float64)
    view = trace(model, x)
    assert torch.allclose(path_energies(view, [x])["a.weight"], x.square().expand(2, 2))
    other = {"a.weight": 5 * model.a.weight.detach()}
    assert torch.equal(path_energies(view, tensors=other)["a.weight"], torch.ones(2, 2).double())
