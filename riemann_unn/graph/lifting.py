"""The energy of each parameter: how much the paths through it carry, for one backward pass."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from .model import ModelGraph

__all__ = ["path_energies"]

_AS_THEY_ARE = ("same", "cast", "clamp")


@dataclass(frozen=True)
class _Constant:
    """A tensor that is no activation of the lifted network."""

    value: Tensor


def path_energies(
    model: nn.Module, view: ModelGraph, data: Sequence[Any] | None = None
) -> dict[str, Tensor]:
    r"""Return the diagonal of the path kernel: the squared paths through each parameter without it.

    .. math:: g_i = (\partial\Phi^T \partial\Phi)_{ii}
        = \sum_{\text{paths } p \ni i} \; \prod_{j \in p,\, j \ne i} \theta_j^2

    It is the gradient, with respect to :math:`\theta^2`, of the sum of outputs of the network whose
    weights are squared, which is fed with ones. Batch normalisation is there the affine map that it
    is in evaluation mode. Where an operation is not homogeneous the network ends, and another one
    that is fed with ones begins.

    Args:
        model: the model that was traced.
        view: what :func:`riemann_unn.graph.trace` gave for it.
        data: inputs whose squares take the place of ones.

    Returns:
        By canonical name, for each parameter that touches a space, a float64 tensor of its shape,
        for one example: the mean over the first dimension of the first input.

    Reference:
        Lebeurrier, Vayer, Gribonval, "Path-conditioned training" (2026); Gonon, Brisebarre,
        Riccietti, Gribonval, "A path-norm toolkit for modern networks" (2024), for the lifting.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    squares = {name: _square(own[name]).requires_grad_() for name in view.scalings}
    by_memory = {own[name].data_ptr(): name for name in view.scalings}
    lifted = _Lifted(model, view, squares, by_memory, data is not None)
    with torch.enable_grad():
        total = lifted.run(data)
    names = list(squares)
    found: Sequence[Tensor | None] = [None] * len(names)
    if total.requires_grad:
        found = torch.autograd.grad(total, list(squares.values()), allow_unused=True)
    first = next((x for x in view.inputs.values() if isinstance(x, Tensor) and x.ndim), None)
    batch = max(first.shape[0], 1) if first is not None else 1
    return {
        name: torch.zeros_like(squares[name]) if g is None else g.clamp_min_(0).div_(batch)
        for name, g in zip(names, found, strict=True)
    }


class _Lifted:
    """The network with squared weights, as a walk over the same graph."""

    def __init__(
        self,
        model: nn.Module,
        view: ModelGraph,
        squares: Mapping[str, Tensor],
        by_memory: Mapping[int, str],
        looks_up: bool,
    ) -> None:
        self.model, self.view, self.squares = model, view, squares
        self.by_memory, self.looks_up = by_memory, looks_up
        self.ends: list[Tensor] = []
        self.device = next((s.device for s in squares.values()), torch.device("cpu"))

    def run(self, data: Sequence[Any] | None) -> Tensor:
        """Return the sum of all that leaves the network, or a part of it."""
        values: dict[fx.Node, Any] = {}
        names = [node.name for node in self.view.graph.nodes if node.op == "placeholder"]
        given = dict(zip(names, data or (), strict=False))
        for node in self.view.graph.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "placeholder":
                value = given.get(node.name, self.view.inputs.get(node.name, (*args, None)[0]))
                values[node] = tree_map(self._input, value)
            elif node.op == "output":
                self._end((args, kwargs))
            else:
                values[node] = self._operation(node, args, dict(kwargs))
                if _in_place(node) and isinstance(node.args[0], fx.Node):
                    values[node.args[0]] = values[node]
        return sum(self.ends, torch.zeros((), dtype=torch.float64, device=self.device))

    def _input(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        real = x.is_floating_point() or x.is_complex()
        if x.device.type == "meta":
            kind = torch.float64 if real else x.dtype
            x = (torch.ones if real else torch.zeros)(x.shape, dtype=kind, device=self.device)
        x = x.detach().to(self.device)
        return _square(x) if real else _Constant(x)

    def _end(self, values: Any) -> None:
        self.ends += [x.sum() for x in tree_leaves(values) if isinstance(x, Tensor)]

    def _operation(self, node: fx.Node, args: Any, kwargs: dict[str, Any]) -> Any:
        name = node.name
        if name in self.view.constants:
            return _Constant(self.view.constants[name].clone())
        if node.op == "get_attr":
            owner, _, attribute = str(node.target).rpartition(".")
            value = getattr(self.model.get_submodule(owner), attribute)
            if isinstance(value, nn.Parameter):
                return self._square(value)
            return _Constant(value.clone()) if isinstance(value, Tensor) else value
        if name in self.view.closings:
            self._end((args, kwargs))
            return tree_map(self._input, self.view.closings[name])
        rule = self.view.rules.get(name)
        first = args[0] if args else next(iter(kwargs.values()), None)
        second = args[1] if len(args) > 1 else kwargs.get("other")
        if rule in _AS_THEY_ARE:
            return first
        if rule == "add" or (rule == "reduce" and isinstance(second, (Tensor, _Constant))):
            return self._sum(node, first, second)
        if rule == "multiply":
            return _squared(first) * _squared(second)
        if rule == "divide":
            return first / _squared(second)
        if node.op == "call_module":
            return self._module(self.model.get_submodule(str(node.target)), rule, first)
        plain = tree_map(lambda x: x.value if isinstance(x, _Constant) else x, (args, kwargs))
        if node.op == "call_method":
            method = "reshape" if node.target == "view" else str(node.target)
            result = getattr(plain[0][0], method)(*plain[0][1:], **plain[1])
        else:
            assert callable(node.target)
            result = node.target(*plain[0], **plain[1])
        if rule is None:  # nothing of the network took part, only constants or weights
            lifted = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            if not lifted:
                return tree_map(lambda x: _Constant(x) if isinstance(x, Tensor) else x, result)
        return result

    def _square(self, p: Tensor) -> Tensor:
        name = self.by_memory.get(p.data_ptr())
        return _square(p) if name is None else self.squares[name]

    def _sum(self, node: fx.Node, a: Any, b: Any) -> Tensor:
        """Differences too: a path keeps its energy when its sign changes."""
        kind = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if kind in ("maximum", "fmax", "max"):
            return torch.maximum(_squared(a), _squared(b))
        if kind in ("minimum", "fmin", "min"):
            return torch.minimum(_squared(a), _squared(b))
        alpha = node.kwargs.get("alpha", 1)
        factor = alpha**2 if isinstance(alpha, (int, float)) else 1
        result: Tensor = _squared(a) + factor * _squared(b)
        return result

    def _module(self, module: nn.Module, rule: str | None, x: Any) -> Any:
        if rule == "embedding":
            weight = self._square(module.get_parameter("weight"))
            if self.looks_up:
                return nn.functional.embedding(x.value, weight)
            return weight.mean(0).expand(*x.value.shape, -1)
        own = {name: self._square(p) for name, p in module.named_parameters()}
        if rule == "norm":
            return _normalised(module, own, x)
        return torch.func.functional_call(module, own, (x,)) if own else module(x)


def _normalised(module: nn.Module, own: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Normalisation as an affine map with constant statistics, squared."""
    weight = own["weight"]
    shape = (-1, *(1,) * (x.ndim - 2))
    constant = torch.zeros_like(weight)
    mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if isinstance(mean, Tensor) and isinstance(variance, Tensor):
        epsilon = getattr(module, "eps", 0.0)
        scaled = weight / (variance.detach().double() + epsilon)
        weight, constant = scaled, scaled * mean.detach().double().square()
    if "bias" in own:
        constant = constant + own["bias"]
    return x * weight.reshape(shape) + constant.reshape(shape)


def _square(x: Tensor) -> Tensor:
    return (x.detach().abs() if x.is_complex() else x.detach()).double().square()


def _squared(x: Any) -> Any:
    if isinstance(x, _Constant):
        return _square(x.value)
    return x if isinstance(x, Tensor) else abs(x) ** 2


def _in_place(node: fx.Node) -> bool:
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    augmented = node.target in (operator.iadd, operator.isub, operator.imul, operator.itruediv)
    return augmented or (str(name).endswith("_") and not str(name).endswith("__"))
