"""Regions: the positively homogeneous parts of a model, and their weights."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from .model import ModelGraph
from .program import operation

__all__ = ["boundaries", "keeps_statistics", "regions"]


def keeps_statistics(node: fx.Node) -> bool:
    """Whether a normalisation is an affine map in evaluation mode."""
    return operation(node) == "batch_norm" and all(
        len(node.args) > i and node.args[i] is not None for i in (3, 4)
    )


def _ends(view: ModelGraph, node: fx.Node) -> list[fx.Node]:
    """Return the arguments of a node at which a region ends."""
    rule = view.rules.get(node.name)
    if node.name in view.opaque_results:
        return node.all_input_nodes
    if rule == "norm" and not keeps_statistics(node):
        return node.all_input_nodes[:1]
    if rule == "attention":
        return node.all_input_nodes[:2]
    return []


def boundaries(view: ModelGraph) -> set[fx.Node]:
    """Return the nodes that an operation reads which is not positively homogeneous.

    A region ends there, and other readers of the node are in another region.
    """
    return {end for node in view.program.graph.nodes for end in _ends(view, node)}


class _Union:
    def __init__(self) -> None:
        self._parent: list[int] = []

    def new(self) -> int:
        self._parent.append(len(self._parent))
        return len(self._parent) - 1

    def find(self, i: int) -> int:
        while self._parent[i] != i:
            i = self._parent[i]
        return i

    def join(self, ids: Iterable[int]) -> int:
        roots = sorted({self.find(i) for i in ids})
        if not roots:
            return self.new()
        for root in roots[1:]:
            self._parent[root] = roots[0]
        return roots[0]


def regions(view: ModelGraph) -> dict[str, int]:
    """Return the number of the region of each weight that has spaces.

    A region is a part of the model through which positive scalings pass: it begins and ends at
    inputs, at outputs, and at operations that are not homogeneous, such as an attention's softmax
    or a normalisation without fixed statistics. Regions with a common weight or free space are
    merged.
    """
    union, ends = _Union(), boundaries(view)
    weights: dict[fx.Node, str] = {}
    after: dict[fx.Node, int] = {}
    home: dict[str, int] = {}
    for node in view.program.graph.nodes:
        if node.op == "placeholder":
            name = view.weights.get(node.name, "")
            if name in view.scalings:
                weights[node] = name
            continue
        if node.name not in view.rules or node.op == "output":
            continue
        own = set(_ends(view, node))
        used = [weights[x] for x in node.all_input_nodes if x in weights]
        inputs = [x for x in node.all_input_nodes if x in after and x not in own]
        if used and len(used) == len(node.all_input_nodes):  # a view of a weight
            weights[node] = used[0]
            continue
        here = union.join([*(after[x] for x in inputs), *(home[w] for w in used if w in home)])
        home.update(dict.fromkeys(used, here))
        after[node] = union.new() if node in ends or node.name in view.opaque_results else here
    for name in view.scalings:  # weights of the other mode are not in this graph
        home.setdefault(name, union.new())
    owner: dict[int, int] = {}
    for name, scaling in view.scalings.items():
        for ids in (scaling.feeds, scaling.reads):
            for i in ids.unique().tolist() if ids is not None else ():
                if view.reasons[i] is None:
                    union.join([owner.setdefault(i, home[name]), home[name]])
    number: dict[int, int] = {}
    return {name: number.setdefault(union.find(home[name]), len(number)) for name in view.scalings}
