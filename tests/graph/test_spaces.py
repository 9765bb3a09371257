"""Spaces against sets: who is joined to whom, who is closed and why."""

from __future__ import annotations

import random

import torch

from riemann_unn.graph.spaces import ONE, ZERO, Spaces, compact, distinct


def classes(spaces, ids):
    found = {}
    for i in ids:
        found.setdefault(spaces.find(i), set()).add(i)
    return {frozenset(some) for some in found.values()}


def test_unions_are_those_of_sets():
    spaces, draw = Spaces(per_channel=True), random.Random(0)
    ids = spaces.new(40)
    sets = [{i} for i in ids.tolist()]
    for _ in range(25):
        pick = torch.tensor(draw.sample(ids.tolist(), 6)).reshape(2, 3)
        joined = spaces.union(pick[0], pick[1])
        assert all(spaces.find(i) == spaces.find(j) for i, j in zip(*pick.tolist(), strict=True))
        assert [spaces.find(i) for i in joined.tolist()] == [spaces.find(int(i)) for i in pick[0]]
        for i, j in zip(*pick.tolist(), strict=True):
            a, b = (next(s for s in sets if x in s) for x in (i, j))
            if a is not b:
                sets.remove(b)
                a |= b
        assert classes(spaces, ids.tolist()) == set(map(frozenset, sets))


def test_zeros_are_in_every_space_at_once():
    spaces = Spaces(per_channel=True)
    x = spaces.new(3)
    zeros = torch.full((3,), ZERO)
    for joined in (spaces.union(x, zeros), spaces.union(zeros, x)):
        assert torch.equal(joined, x)
    assert [spaces.reason(i) for i in x.tolist()] == [None] * 3
    spaces.union(x[:1], torch.tensor([ONE]))  # the control: what is added to a constant is closed
    assert spaces.reason(int(x[0])) == "it is a constant" and spaces.reason(int(x[1])) is None


def test_the_first_reason_to_close_is_kept_and_joining_closes():
    spaces = Spaces(per_channel=True)
    a, b = spaces.new(2), spaces.new(2)
    spaces.close(a[:1], "first")
    spaces.close(a, "second")
    assert [spaces.reason(i) for i in a.tolist()] == ["first", "second"]
    assert spaces.all_closed(a) and not spaces.all_closed(torch.cat([a, b]))
    spaces.union(a, b)
    assert [spaces.reason(i) for i in b.tolist()] == ["first", "second"]
    assert spaces.reason(spaces.closed("why")) == "why"


def test_broadcast_pairs_and_sums_over_dimensions():
    spaces = Spaces(per_channel=True)
    rows, columns = spaces.new(2), spaces.new(3)
    ids = spaces.union(rows[:, None].expand(2, 3), columns.expand(2, 3))
    assert len(classes(spaces, distinct(ids))) == 1  # every row meets every column
    spaces = Spaces(per_channel=True)
    x = spaces.new(6).reshape(2, 3)
    found = spaces.union_over(x, (1,))
    assert found.shape == (2, 1)
    assert classes(spaces, x.flatten().tolist()) == {frozenset(row) for row in x.tolist()}
    assert spaces.union_over(x, ()) is x


def test_one_space_for_all_channels():
    spaces = Spaces(per_channel=False)
    ids = spaces.new(5)
    assert ids.shape == (5,) and len(set(ids.tolist())) == 1
    assert spaces.new(0).shape == (0,)


def test_numbers_that_occur():
    long = torch.arange(7).repeat(2000)
    assert distinct(long) == distinct(torch.arange(7)) == list(range(7))
    wide = torch.arange(3)[:, None].expand(3, 50)
    assert compact(wide).shape == (3, 1) and distinct(wide) == [0, 1, 2]
