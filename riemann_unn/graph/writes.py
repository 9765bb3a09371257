"""Operations in place: what they write to, and which other tensors of a graph share the memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from .program import operation

__all__ = ["Aliases", "writes_to"]

# Operations that may return their argument, although their schema does not say so.
_MAY_RETURN_INPUT = frozenset(["dropout", "feature_dropout", "alpha_dropout", "to", "getitem"])


class Aliases:
    """Which nodes of a graph are views of the same memory.

    Args:
        graph: the graph.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._position = {node: i for i, node in enumerate(graph.nodes)}
        self._base: dict[fx.Node, fx.Node] = {}
        self._members: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            source = _viewed(node)
            base = node if source is None else self._base[source]
            self._base[node] = base
            self._members.setdefault(base, []).append(node)

    def write_(
        self,
        node: fx.Node,
        values: dict[fx.Node, Any],
        overwritten: Callable[[fx.Node, list[Any]], Callable[[Any], Any]],
    ) -> None:
        """Change the values of nodes that an operation in place writes to.

        Args:
            node: the operation, whose value is the result.
            values: by node.
            overwritten: takes the node and the values of all views, and returns a function from a
                shape to the value of a partly overwritten view.
        """
        for target in _written(node):
            if isinstance(values[node], Tensor):
                continue  # constants share memory as in the model
            here = self._position[node]
            members = self._members[self._base[target]]
            others = [
                other
                for other in members
                if other in values
                and other not in (target, node)
                and any(self._position[user] > here for user in other.users)
            ]
            later = [user for user in target.users if self._position[user] > here]
            if not others:
                if later:
                    values[target] = values[node]
                continue
            make = overwritten(node, [values[x] for x in (*others, target, node)])
            for other in (*others, target, node):
                value = other.meta.get("val")
                if isinstance(value, Tensor):
                    values[other] = make(value.shape)


def _viewed(node: fx.Node) -> fx.Node | None:
    """Return the node of which the result is a view, if any."""
    if node.op != "call_function":
        return None
    first = next((x for x in tree_leaves((node.args, node.kwargs)) if isinstance(x, fx.Node)), None)
    schema = getattr(node.target, "_schema", None)
    if operation(node) in _MAY_RETURN_INPUT or schema is None:
        return first
    return first if any(r.alias_info is not None for r in schema.returns) else None


def writes_to(node: fx.Node) -> bool:
    """Whether an operation writes into an argument."""
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def _written(node: fx.Node) -> list[fx.Node]:
    """The arguments that an operation writes to."""
    if node.op != "call_function" or not writes_to(node):
        return []
    schema: Any = node.target._schema  # type: ignore[union-attr]
    found: list[fx.Node] = []
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            found += [x for x in tree_leaves(given) if isinstance(x, fx.Node)]
    return found
