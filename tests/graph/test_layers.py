"""Which space each entry of an operand meets when it is broadcast, against a loop over all."""

from __future__ import annotations

import itertools

import pytest
import torch

from riemann_unn.graph import trace
from riemann_unn.graph.layers import at_entries, is_constant_where_broadcast
from tests.support import every

FIRST = torch.arange(2 * 3 * 4).reshape(2, 3, 4)
IDS = {
    "all differ": FIRST,
    "by channel": torch.arange(3)[None, :, None].expand(2, 3, 4),
    "by place": torch.arange(4).expand(2, 3, 4),
    "copied": torch.arange(3)[None, :, None].expand(2, 3, 4).clone(),
}
SHAPES = [(4,), (3, 4), (1, 4), (3, 1), (2, 3, 4), (2, 1, 4), (1, 1, 1), ()]


def met(ids, shape):
    """For each entry of an operand of a shape, the spaces that it meets."""
    found = {}
    for place in itertools.product(*map(range, ids.shape)):
        own = place[len(place) - len(shape) :]
        entry = tuple(0 if size == 1 else at for size, at in zip(shape, own, strict=True))
        found.setdefault(entry, set()).add(int(ids[place]))
    return found


@every("name", IDS)
@every("shape", SHAPES)
def test_entries_meet_the_spaces_that_a_loop_finds(name, shape):
    ids = IDS[name]
    found = met(ids, shape)
    is_one = all(len(some) == 1 for some in found.values())
    assert is_constant_where_broadcast(ids, shape) == is_one
    if is_one:
        entries = at_entries(ids, shape)
        assert entries.shape == shape
        assert all({int(entries[place])} == some for place, some in found.items())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_by_groups_are_noted_with_their_channels(groups, transposed):
    kind = torch.nn.ConvTranspose2d if transposed else torch.nn.Conv2d
    layer = kind(4, 6, 3, groups=groups)
    view = trace(torch.nn.Sequential(layer, torch.nn.ReLU(), torch.nn.Conv2d(6, 2, 1)))
    first = view.layers[0]
    assert first.kind == ("conv_transpose" if transposed else "conv")
    assert (first.inputs.numel(), first.outputs.numel()) == (4, 6)
    assert (first.weight, first.bias) == ("0.weight", "0.bias")
    feeds = view.scalings["0.weight"].feeds
    rows = feeds.expand(layer.weight.shape)[:, :, 0, 0]
    if not transposed:  # the first dimension is what goes out
        assert rows[:, 0].tolist() == first.outputs.tolist()
    else:  # the second is, of the group that the first belongs to
        out = first.outputs.reshape(groups, -1)
        for i in range(4):
            assert rows[i].tolist() == out[i * groups // 4].tolist()
