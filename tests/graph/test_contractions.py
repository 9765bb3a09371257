"""Products in the letters of einsum: how dimensions are arranged, and which channels they map."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from riemann_unn.graph import trace
from riemann_unn.graph.contractions import _arranged
from tests.support import every, gaussian


@every("own", ["ab", "abc", "c", "ba", ""])
@every("wanted", ["ab", "ba", "cab", "b", "xa", ""])
def test_dimensions_are_arranged_by_their_letters(own, wanted):
    sizes = {"a": 2, "b": 3, "c": 4}
    ids = torch.arange(torch.Size([sizes[x] for x in own]).numel()).reshape([sizes[x] for x in own])
    found = _arranged(ids, own, wanted)
    assert found.shape == tuple(sizes[x] if x in own else 1 for x in wanted)
    for place in itertools.product(*map(range, found.shape)):
        at = dict(zip(wanted, place, strict=True))
        # Along a letter that is not wanted the first one stands for all.
        assert found[place] == ids[tuple(at.get(x, 0) for x in own)]


class Product(nn.Module):
    """A first layer, a product with a weight, and a last layer."""

    def __init__(self, product, *shape):
        super().__init__()
        self.first = nn.Linear(3, 4, dtype=torch.float64)
        self.weight = nn.Parameter(gaussian(*shape, seed=1))
        self.last = nn.Linear(5, 2, dtype=torch.float64)
        self.product = product

    def forward(self, x):
        return self.last(torch.relu(self.product(torch.relu(self.first(x)), self.weight)))


PRODUCTS = {
    "matmul": (lambda x, w: x @ w, (4, 5), 0),
    "linear": (nn.functional.linear, (5, 4), 1),
    "einsum": (lambda x, w: torch.einsum("bi,io->bo", x, w), (4, 5), 0),
    "einsum, reversed": (lambda x, w: torch.einsum("oi,bi->bo", w, x), (5, 4), 1),
}


@pytest.mark.parametrize(("product", "shape", "reads"), PRODUCTS.values(), ids=PRODUCTS)
def test_a_product_reads_one_dimension_and_feeds_the_other(product, shape, reads):
    model = Product(product, *shape)
    x = gaussian(2, 3)
    view = trace(model, x)
    scaling = view.scalings["weight"]
    first, last = view.scalings["first.weight"], view.scalings["last.weight"]
    assert scaling.reads.flatten().tolist() == first.feeds.flatten().tolist()
    expected = [1, 1]
    expected[reads] = 4
    assert list(scaling.reads.shape) == expected
    assert scaling.feeds.flatten().tolist() == last.reads.flatten().tolist()
    assert all(view.reasons[i] is None for i in scaling.feeds.unique().tolist())


def test_a_product_that_a_constant_is_added_to_is_not_followed():
    model = Product(lambda x, w: torch.addmm(torch.ones(5).double(), x, w), 4, 5)
    view = trace(model, gaussian(2, 3))
    assert "weight" not in view.scalings
    reasons = {view.reasons[i] for i in view.scalings["first.weight"].feeds.unique().tolist()}
    assert len(reasons) == 1 and None not in reasons
