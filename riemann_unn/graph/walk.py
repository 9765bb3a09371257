"""A walk through a graph of ATen operations, with spaces in place of values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from .opaque_modules import opaque_path
from .program import Program, module_of, operation
from .spaces import ONE, ZERO, Spaces, compact
from .writes import Aliases, writes_to

__all__ = [
    "UNUSED",
    "Activation",
    "Call",
    "Layer",
    "Role",
    "Rule",
    "Walk",
    "Weight",
    "run_on_constants",
]


@dataclass(frozen=True)
class Activation:
    """An activation, as the space of each of its elements.

    Attributes:
        ids: int64 tensor of its shape, broadcast where possible.
    """

    ids: Tensor


@dataclass(frozen=True)
class Weight:
    """A parameter or a buffer, or a view of one.

    Attributes:
        name: canonical name.
        value: a view of its memory.
    """

    name: str
    value: Tensor


@dataclass(frozen=True)
class Call:
    """One operation with its arguments, and its name in messages.

    Attributes:
        node: the node.
        label: its name in messages.
        args: arguments by position.
        kwargs: arguments by name.
        result: the result, as tensors without values.
    """

    node: fx.Node
    label: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """Return an argument given by position or by name."""
        return self.args[index] if len(self.args) > index else self.kwargs.get(name, default)

    @property
    def input(self) -> Any:
        """The first argument."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()), None)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the operation on other arguments."""
        assert callable(self.node.target)
        return self.node.target(*args, **kwargs)


@dataclass(frozen=True)
class Role:
    """How a weight scales: the spaces that each entry feeds and reads.

    Both hold spaces and broadcast with the weight's own shape.
    """

    feeds: Tensor
    reads: Tensor


@dataclass(frozen=True)
class Layer:
    """One use of a weight by a linear map, a normalisation or an embedding.

    Attributes:
        node: name of the node.
        module: path of the module whose call it is, or ``""`` if the module does more than that.
        kind: ``"linear"``, ``"conv"``, ``"conv_transpose"``, ``"norm"``, ``"scale"`` (by entries)
            or ``"embedding"``.
        weight: name of its weight; a shared weight has its first name everywhere.
        bias: name of its bias, or None.
        inputs: int64 ``(in,)``, the space of each input channel; None for norms, which close their
            inputs, and for embeddings.
        outputs: int64 ``(out,)``, the space of each output channel.
    """

    node: str
    module: str
    kind: str
    weight: str
    bias: str | None
    inputs: Tensor | None
    outputs: Tensor


@dataclass
class Walk:
    """The state of one walk over a graph.

    Attributes:
        table: the rule of each operation, by its name.
        program: the graph and the origins of its placeholders.
        names: canonical name of each parameter and buffer, by identity of its memory.
        spaces: the union-find, which several walks may share.
        buffers: whether weights that are buffers may be scaled.
        roles: how weights scale, one entry for each use.
        layers: the layers in the order in which they run.
        closed: why a weight cannot be scaled, by name.
        rules: the name of the rule of each operation.
        opaque_results: the results of operations that are not homogeneous, without values.
        sources: the weights that the graph reads, by canonical name.
        weights: that name, by placeholder.
    """

    table: Mapping[str, Rule]
    program: Program
    names: Callable[[Tensor], str | None]
    spaces: Spaces
    buffers: bool = False
    roles: dict[str, list[Role]] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    closed: dict[str, str] = field(default_factory=dict)
    rules: dict[str, str] = field(default_factory=dict)
    opaque_results: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        """Apply the rules to the graph, from its inputs on."""
        values: dict[fx.Node, Any] = {}
        aliases = Aliases(self.program.graph)
        for node in self.program.graph.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            try:
                values[node] = self._node(node, args, dict(kwargs))
            except Exception as error:
                if node.op != "call_function":
                    raise
                values[node] = self._failed_rule(node, args, dict(kwargs), error)
            aliases.write_(node, values, self._overwritten)

    def _failed_rule(self, node: fx.Node, args: Any, kwargs: Any, error: Exception) -> Any:
        """Close all arguments of an operation whose rule failed."""
        text = (str(error).splitlines() or [""])[0]
        call = Call(node, self._label(node), args, kwargs, node.meta.get("val"))
        self.rules[node.name] = _opaque.__name__
        return self.opaque(call, f"{call.label} is not followed: {type(error).__name__}: {text}")

    def _overwritten(self, node: fx.Node, values: list[Any]) -> Any:
        """Close a tensor of which a part was written."""
        reason = f"{self._label(node)} writes a part of it"
        self.close(values, reason)
        return lambda shape: Activation(torch.tensor(self.spaces.closed(reason)).expand(shape))

    def _node(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.op == "output":
            self.close((args, kwargs), "it reaches the output of the network")
            return None
        name = operation(node)
        call = Call(node, self._label(node), args, kwargs, node.meta.get("val"))
        path = opaque_path(node.target, args)
        if path is not None:
            return self._opaque_module(call, path)
        if name.startswith("_assert"):
            return None
        leaves = tree_leaves((args, kwargs), is_leaf=_is_tracked)
        rule = self.table.get(name) or self.table.get(name.rstrip("_"), _opaque)
        if not any(isinstance(x, Activation) for x in leaves):
            weights = any(isinstance(x, Weight) for x in leaves)
            if weights and name in _LINEAR and isinstance(args[0], Tensor):
                first = self.constant(args[0], f"{call.label} reads a constant")
                call = replace(call, args=(first, *args[1:]))
            elif not (weights and name in _ON_WEIGHTS):
                return self._without_activations(call)
        self.rules[node.name] = rule.__name__
        result = rule(self, call)
        if not _fits(result, call.result):
            self.rules[node.name] = _opaque.__name__
            return self.opaque(call)
        return result

    def _placeholder(self, node: fx.Node) -> Any:
        source = self.program.sources[node.name]
        if source.kind == "input":  # its values may differ in other calls
            closed = self.spaces.closed(f"'{source.name}' is an input of the network")
            if not isinstance(source.value, Tensor):
                return source.value
            return Activation(torch.tensor(closed).expand(source.value.shape))
        value: Tensor = source.value.detach()
        if source.kind == "constant" or not (value.is_floating_point() or value.is_complex()):
            return value.clone()
        name = self.weights[node.name] = self.names(source.value) or source.name
        value = value.clone() if source.kind == "buffer" else value  # the graph may write to it
        self.sources[name] = value
        if source.kind == "buffer" and not self.buffers:
            self.closed.setdefault(name, _buffer(name))
        return Weight(name, value)

    def _opaque_module(self, call: Call, path: str) -> Any:
        why = f"'{path}' ({self.program.classes[path]}) is closed: {self.program.opaque[path]}"
        return self.opaque(call, why)

    def _label(self, node: fx.Node) -> str:
        """Return the function's name as the user called it, with the module."""
        path = module_of(node)
        _, _, name = (node.meta.get("torch_fn") or ("", ""))[1].rpartition(".")
        name = (name or operation(node)).strip("_") if "__" in name else name or operation(node)
        if path and path in self.program.classes:
            return f"{name} in '{path}' ({self.program.classes[path]})"
        return f"{name} (node '{node.name}')"

    def _without_activations(self, call: Call) -> Any:
        """Run an operation on constants, on weights, or on plain Python values."""
        self.close_weights((call.args, call.kwargs), f"{call.label} reads it")
        copy = writes_to(call.node)  # not into the model's tensors
        args, kwargs = tree_map(
            lambda x: (x.value.clone() if copy else x.value) if isinstance(x, Weight) else x,
            (call.args, call.kwargs),
            is_leaf=_is_tracked,
        )
        return run_on_constants(call.node, args, kwargs)

    def owns(self, path: str, name: str) -> bool:
        """Whether a weight is one of a module's own tensors, under any name."""
        return any(self.names(x) == name for x in self.program.tensors.get(path, ()))

    # -- used by rules --------------------------------------------------------------------------

    def opaque(self, call: Call, why: str | None = None) -> Any:
        """Close the inputs; the results have scale one."""
        why = why or f"{call.label} is not positively homogeneous, or not known to be"
        self.close((call.args, call.kwargs), why)
        self.opaque_results[call.node.name] = call.result
        return tree_map(lambda x: self.constant(x, why), call.result)

    def constant(self, x: Any, reason: str) -> Any:
        """Return a tensor as an activation of scale one, and other values unchanged."""
        if isinstance(x, Weight):
            self.closed.setdefault(x.name, reason)
            x = x.value
        if not isinstance(x, Tensor):
            return x
        zero = not bool(compact(x).any())
        space = ZERO if zero else self.spaces.closed(reason)
        return Activation(torch.tensor(space).expand(x.shape))

    def close(self, values: Any, reason: str) -> None:
        """Close the spaces of all activations, and the weights, in arguments."""
        for x in tree_leaves(values, is_leaf=_is_tracked):
            if isinstance(x, Activation):
                self.spaces.close(x.ids, reason)
        self.close_weights(values, reason)

    def close_weights(self, values: Any, reason: str) -> None:
        """Record that the weights in arguments cannot be scaled."""
        for x in tree_leaves(values, is_leaf=_is_tracked):
            if isinstance(x, Weight):
                self.closed.setdefault(x.name, reason)

    def scale(self, weight: Weight, feeds: Tensor, reads: Tensor | None = None) -> None:
        """Record how a weight, or a view of one, scales; spaces broadcast with the view."""
        reads = torch.tensor(ONE) if reads is None else reads
        own = self.sources[weight.name]
        shape = weight.value.shape
        parts = [x.expand(shape) for x in (feeds, reads)]
        again = tuple(d for d, n in enumerate(shape) if n > 1 and weight.value.stride(d) == 0)
        parts = [self.spaces.union_over(x, again) for x in parts]
        self.roles.setdefault(weight.name, []).append(
            Role(*(_in_own_shape(x, weight.value, own) for x in parts))
        )

    def share(self, reasons: Mapping[str, str]) -> None:
        """Make every weight scale the same way in all its uses, or not at all if it is closed."""
        for roles in self.roles.values():
            first = roles[0]
            for i, role in enumerate(roles[1:]):
                first = Role(
                    self._merged(first.feeds, role.feeds), self._merged(first.reads, role.reads)
                )
                roles[i + 1] = first
            roles[:] = [first]
        for name, roles in list(self.roles.items()):
            reason = reasons.get(name) or self.closed.get(name)
            if reason == _buffer(name) and self._pass_scales(roles[0]):
                del self.roles[name]
                continue
            for ids in map(compact, (roles[0].feeds, roles[0].reads)) if reason else ():
                self.spaces.close(ids[ids != UNUSED], reason or "")

    def _pass_scales(self, role: Role) -> bool:
        """Give the two sides of a constant map the same scale, so that it need not change."""
        feeds, reads = torch.broadcast_tensors(role.feeds, role.reads)
        if any(bool(((compact(x) == UNUSED) | (compact(x) == ONE)).any()) for x in (feeds, reads)):
            return False
        self.spaces.union(feeds, reads)
        return True

    def _merged(self, a: Tensor, b: Tensor) -> Tensor:
        """Merge two uses: one scale where both use an entry, else that of the one that does."""
        if not any(bool((compact(x) == UNUSED).any()) for x in (a, b)):
            return self.spaces.union(a, b)
        a, b = torch.broadcast_tensors(a, b)
        both = (a != UNUSED) & (b != UNUSED)
        self.spaces.union(a[both], b[both])
        return torch.where(a == UNUSED, b, a)


def _buffer(name: str) -> str:
    return f"'{name}' is a buffer"


def run_on_constants(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Run an operation on values that depend on no input; random values become ones."""
    assert callable(node.target)
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        # Not zeros, which have a space of their own.
        return args[0].fill_(1) if writes_to(node) else tree_map(_ones, node.meta.get("val"))
    with torch.no_grad():
        return node.target(*args, **kwargs)


# Linear maps by a weight, also of constants.
_LINEAR = frozenset(["conv1d", "conv2d", "conv3d", "linear", "matmul", "mm", "bmm"])


def _opaque(walk: Walk, call: Call) -> Any:
    """The rule of operations without one."""
    return walk.opaque(call)


Rule = Callable[[Walk, Call], Any]
"""What an operation does to spaces: it returns what is known of the result."""

UNUSED = -1
"""Stands for the space of an entry that no operation reads."""

# Operations that return a view of a weight.
_ON_WEIGHTS = frozenset(
    [
        *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"),
        *("view_as", "expand", "expand_as", "permute", "transpose", "t", "numpy_T", "mT"),
        *("adjoint", "movedim", "moveaxis", "swapaxes", "swapdims", "chunk", "unsafe_chunk"),
        *("split", "unsafe_split", "split_with_sizes", "unbind", "narrow", "select", "slice"),
        *("detach", "alias", "contiguous", "to", "getitem"),
    ]
)


def _in_own_shape(ids: Tensor, view: Tensor, own: Tensor) -> Tensor:
    """Convert the spaces of a view's entries to those of the whole tensor's."""
    offset = view.storage_offset() - own.storage_offset()
    if view.shape == own.shape and view.stride() == own.stride() and offset == 0:
        return ids
    full = torch.full((_extent(own),), UNUSED)
    ids = ids[tuple(slice(0, 1) if s == 0 else slice(None) for s in view.stride())]
    full.as_strided(ids.shape, view.stride(), offset).copy_(ids)
    return _compacted(full.as_strided(own.shape, own.stride()))


def _extent(x: Tensor) -> int:
    """Return the extent of a tensor's memory, in entries."""
    if x.numel() == 0:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))


def _compacted(ids: Tensor) -> Tensor:
    """Broadcast constant dimensions, so that they take no memory."""
    shape = ids.shape
    for dim in range(ids.ndim):
        first = ids.narrow(dim, 0, 1)
        if ids.shape[dim] > 1 and torch.equal(ids, first.expand_as(ids)):
            ids = first
    return compact(ids).clone().expand(shape)


def _is_tracked(x: Any) -> bool:
    return isinstance(x, (Activation, Weight))


def _ones(x: Any) -> Any:
    return torch.ones(x.shape, dtype=x.dtype, device=x.device) if isinstance(x, Tensor) else x


def _fits(found: Any, expected: Any) -> bool:
    """Whether a rule's result has the shape of the operation's."""
    if isinstance(found, Activation):
        return isinstance(expected, Tensor) and found.ids.shape == expected.shape
    if isinstance(found, (tuple, list)):
        return len(found) == len(expected) and all(map(_fits, found, expected))
    return True
