"""The activation, and batch normalisation, that follow a layer in the model's graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from ...graph.program import Program, module_of, operation
from ...linalg.low_rank.activation_kernel import ACTIVATIONS, Activation, leaky_relu

__all__ = ["Affine", "Follower", "followers"]

_SEEN_THROUGH = frozenset(
    [
        *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"),
        *("permute", "transpose", "contiguous", "clone", "detach", "alias", "to", "dropout"),
        *("feature_dropout", "max_pool1d", "max_pool2d", "max_pool3d"),
    ]
)
_POINTWISE = frozenset(
    [
        *("add", "sub", "rsub", "mul", "div", "pow", "tanh", "sigmoid", "erf", "exp", "relu"),
        *("clamp", "clamp_min", "clamp_max", "where", "gt", "lt", "ge", "le", "abs", "neg"),
        *("softplus", "log", "sqrt", "square", "hardtanh", "silu", "gelu", "to", "sign"),
    ]
)
_TESTED = torch.linspace(-3, 3, 25, dtype=torch.float64)


@dataclass(frozen=True)
class Affine:
    """A batch normalisation in evaluation mode as x * scale + offset; None without statistics."""

    scale: Tensor | None
    offset: Tensor | None


@dataclass(frozen=True)
class Follower:
    """The operations after a layer.

    Attributes:
        activation: its activation; the identity if there is none.
        norm: the batch normalisation between the two, if there is one.
        note: why the identity was taken, if there is no activation.
    """

    activation: Activation
    norm: Affine | None = None
    note: str | None = None


def followers(program: Program | str, layers: Mapping[str, nn.Module]) -> dict[str, Follower | str]:
    """Return the follower of each layer, or the reason why it is unknown.

    Dropout, reshaping and max pooling are skipped, and a batch normalisation directly after the
    layer is included.

    Args:
        program: the model's program in evaluation mode, or the reason why there is none.
        layers: layers of the model by name.
    """
    if isinstance(program, str):
        return dict.fromkeys(layers, program)
    found: dict[str, list[Follower]] = {}
    weights = {id(layer._parameters.get("weight")): name for name, layer in layers.items()}
    sources = program.sources
    for node in program.graph.nodes:
        for argument in node.all_input_nodes if node.op == "call_function" else ():
            name = _read_by(argument, sources, weights)
            if name is not None:
                end = _last_inside(node, module_of(node))
                found.setdefault(name, []).append(_follow(end, program))
    result: dict[str, Follower | str] = {}
    for name in layers:
        if name not in found:
            closed = next((p for p in program.opaque if f"{name}.".startswith(f"{p}.")), None)
            why = "" if closed is None else f": '{closed}' is closed, {program.opaque[closed]}"
            result[name] = f"what the model computes does not reach it{why}"
        elif all(_are_same(found[name][0], other) for other in found[name][1:]):
            result[name] = found[name][0]
        else:
            result[name] = _identity("different activations follow its several uses")
    return result


def _read_by(node: fx.Node, sources: Mapping[str, Any], weights: Mapping[int, str]) -> str | None:
    """Return the layer whose weight an argument is."""
    if node.op != "placeholder":
        return None
    return weights.get(id(sources[node.name].value))


def _last_inside(node: fx.Node, path: str) -> fx.Node:
    """Return the last node of the layer's own forward, such as a reshape or its bias."""
    while len(node.users) == 1:
        (user,) = node.users
        if module_of(user) != path or user.op == "output":
            break
        node = user
    return node


def _are_same(a: Follower, b: Follower) -> bool:
    return a.norm is b.norm and a.activation.name == b.activation.name


def _identity(note: str) -> Follower:
    return Follower(ACTIVATIONS["identity"], None, note)


def _follow(node: fx.Node, program: Program) -> Follower:
    norm: Affine | None = None
    direct = True
    while True:
        users = list(node.users)
        if not users:
            return _identity("its output is not used")
        if any(user.op == "output" for user in users):
            return _identity("its output is the model's")
        if len(users) > 1:
            found = _pointwise(node)
            if found is None:
                return _identity("its output is used in several places")
            return Follower(found, norm)
        node, before = users[0], node
        name = operation(node).rstrip("_")
        found = _activation(name, node, program) or _pointwise(before)
        if found is not None:
            return Follower(found, norm)
        if name == "batch_norm" and direct and norm is None:
            norm = _affine(node, program)
        elif name not in _SEEN_THROUGH:
            what = "an addition" if name in ("add", "sub") else name
            return _identity(f"{what} follows it, which is no elementwise activation")
        direct = False


def _activation(name: str, node: fx.Node, program: Program) -> Activation | None:
    """Return an operation as an activation, or None."""
    rest, extra = node.args[1:], dict(node.kwargs)
    if name == "prelu" and isinstance(rest[0], fx.Node):
        slope = getattr(program.sources.get(rest[0].name), "value", None)
        one = isinstance(slope, Tensor) and slope.numel() == 1
        return leaky_relu(float(slope.detach())) if one and slope is not None else None
    if any(isinstance(a, fx.Node) for a in tree_leaves((rest, extra))):
        return None
    if name == "leaky_relu":
        slope = rest[0] if rest else extra.get("negative_slope", 0.01)
        return leaky_relu(float(slope))  # type: ignore[arg-type]
    if name in ("relu", "abs"):
        return ACTIVATIONS[name]
    if name == "threshold" and tuple(rest) == (0, 0):
        return ACTIVATIONS["relu"]
    if name not in ACTIVATIONS:
        return None
    known = ACTIVATIONS[name]
    target: Any = getattr(torch.ops.aten, name, None)
    if target is None or not (rest or extra):
        return known
    return Activation(name, lambda x: target(x, *rest, **extra))


def _pointwise(start: fx.Node) -> Activation | None:
    """Return several operations on one tensor, such as x·σ(x), as an activation, or None."""
    inside: dict[fx.Node, None] = {}
    node = start
    while True:
        node = node.next
        if node.op == "root" or node.op == "output":
            return None
        arguments = node.all_input_nodes
        if not any(a is start or a in inside for a in arguments):
            continue
        alone = all(a is start or a in inside for a in arguments)
        if not alone or operation(node).rstrip("_") not in _POINTWISE:
            return None
        inside[node] = None
        open_ends = [n for n in (start, *inside) if any(u not in inside for u in n.users)]
        if open_ends == [node]:
            break
    if len(inside) == 1 and operation(node).rstrip("_") in ("to", "add", "mul", "div", "sub"):
        return None
    return _compiled(start, list(inside))


def _compiled(start: fx.Node, nodes: list[fx.Node]) -> Activation:
    """Return a composition of operations as an activation, under a known name if it has one."""

    def run(x: Tensor) -> Tensor:
        values: dict[fx.Node, Any] = {start: x.clone()}
        for node in nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            if operation(node) == "to":
                values[node] = args[0]
                continue
            assert callable(node.target)
            values[node] = node.target(*args, **kwargs)
        result: Tensor = values[nodes[-1]]
        return result

    found = run(_TESTED)
    for known in ACTIVATIONS.values():
        if torch.allclose(known(_TESTED.clone()), found.double(), rtol=0, atol=1e-12):
            return known
    slope = float(-found[0] / 3)
    if torch.allclose(leaky_relu(slope)(_TESTED), found.double(), rtol=0, atol=1e-12):
        return leaky_relu(slope)
    tanh_gelu = torch.nn.functional.gelu(_TESTED, approximate="tanh")
    if torch.allclose(tanh_gelu, found.double(), rtol=0, atol=1e-6):
        return Activation("gelu", lambda x: torch.nn.functional.gelu(x, approximate="tanh"))
    return Activation("pointwise", run)


def _affine(node: fx.Node, program: Program) -> Affine:
    """Return the scale and offset per channel of a batch normalisation in evaluation mode."""

    def value(i: int) -> Tensor | None:
        given = node.args[i] if len(node.args) > i else None
        source = program.sources.get(given.name) if isinstance(given, fx.Node) else None
        found = None if source is None else source.value
        return found.detach().double() if isinstance(found, Tensor) else None

    weight, bias, mean, variance = (value(i) for i in (1, 2, 3, 4))
    if mean is None or variance is None:
        return Affine(None, None)
    eps = node.args[7] if len(node.args) > 7 else 1e-5
    scale = (variance + float(eps)).rsqrt()  # type: ignore[arg-type]
    offset = -mean * scale
    if weight is not None:
        scale, offset = scale * weight, offset * weight
    return Affine(scale, offset if bias is None else offset + bias)
