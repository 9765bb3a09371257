"""Walking an fx graph with spaces in place of numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import GraphError
from .spaces import ZERO, Activation, Spaces

__all__ = ["Call", "Layer", "Parameter", "Role", "Walk"]


@dataclass(frozen=True)
class Parameter:
    """A parameter that the graph reads by name."""

    name: str
    value: Tensor


@dataclass(frozen=True)
class Call:
    """One operation: what is called, on what, and how a message should name it."""

    node: fx.Node
    label: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    module: nn.Module | None = None

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """Return an argument given by position or by name."""
        return self.args[index] if len(self.args) > index else self.kwargs.get(name, default)

    @property
    def input(self) -> Any:
        """The first argument."""
        return self.argument(0, "input", self.kwargs.get("x"))


@dataclass(frozen=True)
class Role:
    """How a parameter, reshaped to ``view``, scales: by ``gain`` and by one over ``loss``.

    Both hold spaces and broadcast with the view.
    """

    view: tuple[int, ...]
    gain: Tensor
    loss: Tensor | None


@dataclass(frozen=True)
class Layer:
    """One call of a layer with a weight.

    Attributes:
        node: name of the fx node.
        module: path of the module, or ``""`` for a call such as ``F.linear``.
        kind: ``"linear"``, ``"conv"``, ``"conv_transpose"``, ``"norm"`` or ``"embedding"``.
        weight: name of its weight; a shared weight has its first name everywhere.
        bias: name of its bias, or None.
        inputs: int64 ``(in,)``, the space of each input channel; None for norms, which close what
            they read, and for embeddings.
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
        root: the traced module.
        names: canonical name of each parameter, by identity of its memory.
        rigid: reason by name for parameters that must not be scaled.
        spaces: the union-find, which several walks may share.
        roles: how parameters scale, one entry for each use.
        uses: the layers in the order in which they run.
        frozen: why a parameter cannot be scaled, by name.
        rules: the name of the rule that each operation went by.
        closed: what came out of operations that are not homogeneous, on the meta device.
    """

    root: nn.Module
    names: Callable[[Tensor], str | None]
    rigid: Mapping[str, str]
    spaces: Spaces
    roles: dict[str, list[Role]] = field(default_factory=dict)
    uses: list[Layer] = field(default_factory=list)
    frozen: dict[str, str] = field(default_factory=dict)
    rules: dict[str, str] = field(default_factory=dict)
    closed: dict[str, Any] = field(default_factory=dict)

    def run(self, graph: fx.Graph, inputs: Mapping[str, Any]) -> None:
        """Follow a graph from its inputs, which are tensors or other values by name."""
        values: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            try:
                values[node] = self._node(node, args, dict(kwargs), inputs)
            except GraphError:
                raise
            except Exception as error:
                text = (str(error).splitlines() or [""])[0]
                raise GraphError(
                    f"node '{node.name}' ({node.format_node()}) cannot be followed: "
                    f"{type(error).__name__}: {text}. Pass example inputs of the shapes that the "
                    "model is used with"
                ) from error

    def _node(self, node: fx.Node, args: Any, kwargs: Any, inputs: Mapping[str, Any]) -> Any:
        from .rules import FUNCTIONS, METHODS, MODULES, attribute, opaque

        if node.op == "placeholder":
            value = inputs[node.name] if node.name in inputs else (*args, None)[0]
            reason = f"'{node.name}' is an input of the network"
            return tree_map(lambda x: self.constant(x, reason), value)
        if node.op == "output":
            self.close((args, kwargs), "it reaches the output of the network")
            return None
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        if node.op == "call_module":
            path = str(node.target)
            module = self.root.get_submodule(path)
            label = f"'{path}' ({type(module).__name__})"
            call = Call(node, label, _functional(module), args, kwargs, module)
            if module._forward_hooks or module._forward_pre_hooks:
                return self.opaque(call, f"{label} has forward hooks, which may do anything")
            rule = MODULES.get(type(module), opaque)
            self.rules[node.name] = rule.__name__
            return rule(self, call)
        if node.op == "call_method":
            name = str(node.target)
            function = _method(name)
            rule = METHODS.get(name, opaque)
        else:
            assert callable(node.target)
            function = node.target
            name = getattr(function, "__name__", str(function))
            rule = FUNCTIONS.get(function, opaque)
        call = Call(node, f"{name} (node '{node.name}')", function, args, kwargs)
        if function is getattr:
            return attribute(self, call)
        leaves = tree_leaves((args, kwargs), is_leaf=_ours)
        if not any(isinstance(x, Activation) for x in leaves):
            return self._without_activations(call)
        self.rules[node.name] = rule.__name__
        return rule(self, call)

    def _attribute(self, path: str) -> Any:
        owner, _, name = path.rpartition(".")
        value = getattr(self.root.get_submodule(owner), name)
        if isinstance(value, nn.Parameter):
            canonical = self.names(value)
            return Parameter(canonical or path, value.detach())
        return value.clone() if isinstance(value, Tensor) else value

    def _without_activations(self, call: Call) -> Any:
        """Run an operation on constants, on parameters, or on plain Python values."""
        self.freeze((call.args, call.kwargs), f"{call.label} reads it")
        args, kwargs = tree_map(
            lambda x: x.value.clone() if isinstance(x, Parameter) else x,
            (call.args, call.kwargs),
            is_leaf=_ours,
        )
        with torch.no_grad():
            return call.function(*args, **kwargs)

    # -- what rules use -------------------------------------------------------------------------

    def meta(self, call: Call) -> Any:
        """Run the operation on meta tensors."""
        args, kwargs = tree_map(_to_meta, (call.args, call.kwargs), is_leaf=_ours)
        with torch.no_grad():
            return tree_map(_to_meta, call.function(*args, **kwargs))

    def meta_or_zeros(self, call: Call) -> Any:
        """The same, with zeros where a shape depends on values."""
        try:
            return self.meta(call)
        except Exception:
            args, kwargs = tree_map(_to_zeros, (call.args, call.kwargs), is_leaf=_ours)
            with torch.no_grad():
                return tree_map(_to_meta, call.function(*args, **kwargs))

    def opaque(self, call: Call, why: str | None = None) -> Any:
        """Close what goes in, and hand out activations whose scale is fixed."""
        why = why or f"{call.label} is not positively homogeneous, or not known to be"
        self.close((call.args, call.kwargs), why)
        for p in call.module.parameters() if call.module is not None else ():
            self.frozen.setdefault(self.names(p) or "", why)
        meta = self.meta_or_zeros(call)
        self.closed[call.node.name] = meta
        return tree_map(lambda x: self.constant(x, why), meta)

    def constant(self, x: Any, reason: str) -> Any:
        """Turn a tensor into an activation whose scale is fixed; leave other values alone."""
        if isinstance(x, Parameter):
            self.frozen.setdefault(x.name, reason)
            x = x.value
        if not isinstance(x, Tensor):
            return x
        zero = x.device.type != "meta" and not bool(x.any())
        space = ZERO if zero else self.spaces.fixed(reason)
        return Activation(_to_meta(x), torch.tensor(space).expand(x.shape))

    def close(self, values: Any, reason: str) -> None:
        """Fix the spaces of all activations, and the parameters, in some arguments."""
        for x in tree_leaves(values, is_leaf=_ours):
            if isinstance(x, Activation):
                self.spaces.fix(x.ids, reason)
        self.freeze(values, reason)

    def freeze(self, values: Any, reason: str) -> None:
        """Note that the parameters in some arguments cannot be scaled."""
        for x in tree_leaves(values, is_leaf=_ours):
            if isinstance(x, Parameter):
                self.frozen.setdefault(x.name, reason)

    def share(self) -> None:
        """Make every parameter scale the same way in all its uses, and keep rigid ones."""
        for name, roles in self.roles.items():
            first = roles[0]
            for role in roles[1:]:
                same = role.view == first.view and (role.loss is None) == (first.loss is None)
                if same:
                    self.spaces.union(first.gain, role.gain)
                    if first.loss is not None and role.loss is not None:
                        self.spaces.union(first.loss, role.loss)
                else:
                    self.frozen.setdefault(name, f"'{name}' is used in two different ways")
        for name, roles in self.roles.items():
            reason = self.rigid.get(name) or self.frozen.get(name)
            for role in roles if reason else ():
                for ids in (role.gain, role.loss):
                    if ids is not None and reason:
                        self.spaces.fix(ids, reason)


def _ours(x: Any) -> bool:
    return isinstance(x, (Activation, Parameter))


def _to_meta(x: Any) -> Any:
    if isinstance(x, Activation):
        return x.meta
    if isinstance(x, Parameter):
        x = x.value
    return x.detach().to("meta") if isinstance(x, Tensor) else x


def _to_zeros(x: Any) -> Any:
    x = _to_meta(x)
    return torch.zeros(x.shape, dtype=x.dtype) if isinstance(x, Tensor) else x


def _functional(module: nn.Module) -> Callable[..., Any]:
    """The module as a function that reads and writes copies of its tensors."""

    def copy(x: Tensor, meta: bool) -> Tensor:
        return x.detach().to("meta") if meta else x.detach().cpu().clone()

    def call(*args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        meta = all(x.device.type == "meta" for x in tensors)
        copies = {k: copy(v, meta) for k, v in module.named_buffers()}
        for k, v in module.named_parameters():
            # Modules may ask for their parameters by name and kind.
            copies[k] = nn.Parameter(copy(v, meta), requires_grad=False)
        return torch.func.functional_call(module, copies, args, kwargs)

    return call


def _method(name: str) -> Callable[..., Any]:
    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(x, name)(*args, **kwargs)

    return call
