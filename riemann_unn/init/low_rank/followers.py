"""Which activation follows a layer, found by tracing the model with torch.fx."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from ...graph.untouched import untouched
from ...linalg.low_rank.activation_kernel import ACTIVATIONS, Activation, as_activation, leaky_relu

__all__ = ["Follower", "affine_of", "followers"]

_SEEN_THROUGH = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Flatten,
    nn.Unflatten,
    nn.MaxPool1d,
    nn.MaxPool2d,
)
_METHODS_SEEN_THROUGH = {"view", "reshape", "flatten", "contiguous", "permute", "transpose"}
_FUNCTIONS_SEEN_THROUGH = {
    torch.flatten,
    functional.dropout,
    functional.dropout2d,
    functional.max_pool1d,
    functional.max_pool2d,
    torch.permute,
    torch.transpose,
}


@dataclass(frozen=True)
class Follower:
    """What follows a layer.

    Attributes:
        activation: its activation; the identity if there is none.
        norm: the batch normalisation between the two, if there is one.
        note: why the identity was taken, if there is no activation.
    """

    activation: Activation
    norm: nn.Module | None = None
    note: str | None = None


def _identity(note: str) -> Follower:
    return Follower(ACTIVATIONS["identity"], None, note)


_ELEMENTWISE = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.Mish,
    nn.ReLU,
    nn.SELU,
    nn.Sigmoid,
    nn.SiLU,
    nn.Softplus,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
)


def _call_activation(name: str, node: fx.Node) -> Activation | None:
    """Return the activation that a function or a method of this name is."""
    name = name.rstrip("_")
    extra: dict[str, Any] = {k: v for k, v in node.kwargs.items() if k not in ("inplace", "input")}
    rest = node.args[1:]
    if any(isinstance(a, fx.Node) for a in (*rest, *extra.values())):
        return None
    if name == "leaky_relu":
        slope = rest[0] if rest else extra.get("negative_slope", 0.01)
        return leaky_relu(float(slope))  # type: ignore[arg-type]
    if name == "relu" or name not in ACTIVATIONS or not (rest or extra):
        return ACTIVATIONS.get(name)
    function = ACTIVATIONS[name].function
    return Activation(name, lambda x: function(x, *rest, **extra))


def _follow(node: fx.Node, modules: dict[str, nn.Module]) -> Follower:
    norm: nn.Module | None = None
    direct = True
    while True:
        users = list(node.users)
        if len(users) != 1:
            return _identity("its output is used in several places" if users else "it is not used")
        node = users[0]
        passed, found = False, None
        if node.op == "output":
            return _identity("its output is the model's")
        if node.op == "call_module":
            module = modules[str(node.target)]
            one_slope = isinstance(module, nn.PReLU) and module.weight.numel() == 1
            if isinstance(module, _ELEMENTWISE) or one_slope:
                found = as_activation(module)
            passed = isinstance(module, _SEEN_THROUGH)
            batch_norm = isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))
            if batch_norm and direct and norm is None:
                norm, passed = module, True
            what = type(module).__name__
        elif node.op == "call_method":
            what = str(node.target)
            found = _call_activation(what, node)
            passed = what in _METHODS_SEEN_THROUGH
        else:
            what = getattr(node.target, "__name__", str(node.target))
            if node.target is operator.abs or _elementwise_call(node):
                found = _call_activation(what, node)
            passed = node.target in _FUNCTIONS_SEEN_THROUGH
        if found is not None:
            return Follower(found, norm)
        if not passed:
            return _identity(f"{what} follows it, which is no elementwise activation")
        direct = False


def _elementwise_call(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "").rstrip("_")
    homes = (torch, functional, torch.ops.aten, torch._C._nn)
    return name in ACTIVATIONS and any(
        node.target in (getattr(home, name, None), getattr(home, f"{name}_", None))
        for home in homes
    )


def _same(found: list[Follower]) -> bool:
    first = found[0]
    return all(
        f.norm is first.norm and f.activation.name == first.activation.name for f in found[1:]
    )


def followers(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Follower | str]:
    """Return what follows each layer, or in words why that cannot be told.

    Dropout, reshaping and max pooling are looked through, and a batch normalisation right
    behind the layer is noted.

    Args:
        model: the model; traced once, symbolically, and not changed.
        layers: layers of it by name.
    """
    # A module that is registered twice has one name in the trace, so go by identity.
    names = {id(layer): name for name, layer in layers.items()}
    try:
        with untouched(model):
            graph = fx.Tracer().trace(model)
    except Exception as error:  # the model's own code runs, and may raise anything
        reason = f"torch.fx cannot trace the model ({type(error).__name__}: {error})"
        return dict.fromkeys(layers, reason)
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, list[Follower]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            name = names.get(id(modules[str(node.target)]))
            if name is not None:
                found.setdefault(name, []).append(_follow(node, modules))
    result: dict[str, Follower | str] = {}
    for name in layers:
        if name not in found:
            result[name] = "the trace of the model does not reach it"
        elif _same(found[name]):
            result[name] = found[name][0]
        else:
            result[name] = _identity("different activations follow its several uses")
    return result


def affine_of(norm: nn.Module | None) -> tuple[Tensor, Tensor] | None:
    """Return gain and offset per channel of a batch normalisation in evaluation mode.

    None if there is none, or it keeps no statistics.
    """
    mean, var = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    if norm is None or not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        return None
    assert isinstance(norm.eps, float)
    gain = (var.double() + norm.eps).rsqrt()
    offset = -mean.double() * gain
    if isinstance(norm.weight, Tensor) and isinstance(norm.bias, Tensor):
        gain = gain * norm.weight.detach().double()
        offset = offset * norm.weight.detach().double() + norm.bias.detach().double()
    return gain, offset
