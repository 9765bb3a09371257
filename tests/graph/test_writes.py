"""Operations in place change the values of all views that are read later, and of no other."""

from __future__ import annotations

import torch
from torch import nn

from riemann_unn.graph import trace
from riemann_unn.graph.writes import Aliases, writes_to


class Writing(nn.Module):
    def forward(self, x):
        y = x * 2
        before, after, other = y.view(-1), y.view(-1), x + 1
        z = before * 3
        y.mul_(5)
        return z + after + other.view(-1)


def test_views_that_are_read_later_are_overwritten():
    graph = trace(Writing(), torch.zeros(2, 2)).program.graph
    nodes = {node.name: node for node in graph.nodes}
    (write,) = [node for node in graph.nodes if writes_to(node)]
    target = write.args[0]
    views = [n for n in graph.nodes if n.op == "call_function" and "view" in n.name]
    before, after = (n for n in views if n.args[0] is target)
    values = {node: node.name for node in graph.nodes if node.op != "output"}
    asked = []

    def overwritten(node, some):
        asked.append((node, list(some)))
        return lambda shape: ("new", tuple(shape))

    Aliases(graph).write_(write, values, overwritten)
    (told,) = asked
    assert told[0] is write and set(told[1]) == {after.name, target.name, write.name}
    assert values[after] == ("new", (4,)) and values[target] == ("new", (2, 2))
    assert values[before] == before.name  # nobody reads it any more
    assert all(values[n] == n.name for n in nodes.values() if n in values and n.name == "add")


def test_without_another_view_the_result_takes_the_place():
    class Simple(nn.Module):
        def forward(self, x):
            y = x * 2
            y.mul_(5)
            return y + 1

    graph = trace(Simple(), torch.zeros(2)).program.graph
    (write,) = [node for node in graph.nodes if writes_to(node)]
    values = {node: node.name for node in graph.nodes if node.op != "output"}
    Aliases(graph).write_(write, values, lambda *_: None)
    reads_target = any(user is not write for user in write.args[0].users)
    assert values[write.args[0]] == (write.name if reads_target else write.args[0].name)
