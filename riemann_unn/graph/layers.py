"""Operations with weights: where their channels are, and how weights and biases scale with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .propagate import Call, Parameter, Role, Use, Walk
from .spaces import Activation

__all__ = ["FUNCTIONS", "MODULES"]

Rule = Callable[[Walk, Call], Any]


def _channels(walk: Walk, ids: Tensor, dim: int) -> Tensor:
    """The space of each channel along a dimension; what a weight reads alike gets one scale."""
    dim %= ids.ndim
    others = tuple(d for d in range(ids.ndim) if d != dim)
    return walk.spaces.union_over(ids, others).reshape(-1)


def _parameter(walk: Walk, module: nn.Module, name: str) -> Parameter | None:
    """A module's own parameter; None if it is computed from others, or there is none."""
    value = module._parameters.get(name)
    return None if value is None else Parameter(walk.names(value) or name, value)


def _finish(
    walk: Walk,
    call: Call,
    kind: str,
    weight: Parameter,
    bias: Parameter | None,
    role: tuple[tuple[int, ...], Callable[[Tensor], Tensor], Tensor | None],
    inputs: Tensor | None,
    channels: int,
    dim: int,
    meta: Tensor | None = None,
) -> Activation:
    """Make the output, whose channels along ``dim`` are new spaces, and note how weights scale."""
    meta = walk.meta(call) if meta is None else meta
    view, place, loss = role
    outputs = walk.spaces.new(channels)
    walk.roles.setdefault(weight.name, []).append(Role(view, place(outputs), loss))
    if bias is not None:
        walk.roles.setdefault(bias.name, []).append(Role((channels,), outputs, None))
    path = str(call.node.target) if call.module is not None else ""
    walk.uses.append(
        Use(
            call.node.name,
            path,
            kind,
            weight.name,
            bias.name if bias is not None else None,
            inputs,
            outputs,
        )
    )
    shape = [1] * meta.ndim
    shape[dim] = channels
    return Activation(meta, outputs.reshape(shape).expand(meta.shape))


def _linear(walk: Walk, call: Call, weight: Any, bias: Any) -> Any:
    x = call.input
    if not _usable(x, weight, bias) or weight.value.ndim != 2:
        return walk.opaque(
            call, f"the weight or bias of {call.label} is computed, or shared in part"
        )
    out, into = weight.value.shape
    inputs = _channels(walk, x.ids, -1)
    role = ((out, into), lambda s: s.reshape(-1, 1), inputs.reshape(1, -1))
    return _finish(walk, call, "linear", weight, bias, role, inputs, out, -1)


def _convolution(
    walk: Walk, call: Call, weight: Any, bias: Any, dims: int, groups: int, transposed: bool
) -> Any:
    x = call.input
    if not _usable(x, weight, bias):
        return walk.opaque(call, f"the weight or bias of {call.label} is computed")
    inputs = _channels(walk, x.ids, -dims - 1)
    first, second, *kernel = weight.value.shape
    ones = (1,) * len(kernel)
    if transposed:  # (in, out / groups, *kernel)
        view = (groups, first // groups, second, *kernel)
        out = second * groups
        loss = inputs.reshape(groups, -1, 1, *ones)

        def place(s: Tensor) -> Tensor:
            return s.reshape(groups, 1, -1, *ones)
    else:  # (out, in / groups, *kernel)
        view = (groups, first // groups, second, *kernel)
        out = first
        loss = inputs.reshape(groups, 1, -1, *ones)

        def place(s: Tensor) -> Tensor:
            return s.reshape(groups, -1, 1, *ones)

    kind = "conv_transpose" if transposed else "conv"
    return _finish(walk, call, kind, weight, bias, (view, place, loss), inputs, out, -dims - 1)


def _usable(x: Any, weight: Any, bias: Any) -> bool:
    return (
        isinstance(x, Activation)
        and isinstance(weight, Parameter)
        and (bias is None or isinstance(bias, Parameter))
    )


def _module_parts(walk: Walk, call: Call) -> tuple[Any, Any]:
    """Weight and bias of a layer; a bias that is computed counts as no parameter at all."""
    module = call.module
    assert module is not None
    weight = _parameter(walk, module, "weight")
    bias = _parameter(walk, module, "bias")
    if bias is None and getattr(module, "bias", None) is not None:
        return None, None
    return weight, bias


def _linear_module(walk: Walk, call: Call) -> Any:
    return _linear(walk, call, *_module_parts(walk, call))


def _linear_function(walk: Walk, call: Call) -> Any:
    return _linear(walk, call, call.argument(1, "weight"), call.argument(2, "bias"))


def _conv_module(dims: int, transposed: bool) -> Rule:
    def rule(walk: Walk, call: Call) -> Any:
        groups = getattr(call.module, "groups", 1)
        return _convolution(walk, call, *_module_parts(walk, call), dims, groups, transposed)

    return rule


def _conv_function(dims: int, transposed: bool) -> Rule:
    place = 6

    def rule(walk: Walk, call: Call) -> Any:
        groups = call.argument(place, "groups", 1)
        parts = call.argument(1, "weight"), call.argument(2, "bias")
        return _convolution(walk, call, *parts, dims, groups, transposed)

    return rule


def _norm(walk: Walk, call: Call) -> Any:
    """Normalisation closes what goes in; its affine part opens new spaces."""
    why = f"{call.label} normalises it"
    x = call.input
    walk.close((call.args, call.kwargs), why)
    weight, bias = _module_parts(walk, call)
    if not isinstance(x, Activation) or weight is None:
        return walk.opaque(call, f"{call.label} has no affine part that could be scaled")
    channels = weight.value.shape[0]
    role = ((channels,), lambda s: s, None)
    dim = 1 - x.ids.ndim if _batched(call, x) else -x.ids.ndim
    return _finish(walk, call, "norm", weight, bias, role, None, channels, dim, x.meta)


def _batched(call: Call, x: Activation) -> bool:
    """Instance normalisation alone takes a single example without a batch dimension."""
    kinds = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    single = {kind: dims + 2 for dims, kind in enumerate(kinds)}
    return not isinstance(call.module, kinds) or x.ids.ndim != single[type(call.module)]


def _embedding(walk: Walk, call: Call) -> Any:
    module = call.module
    weight = None if module is None else _parameter(walk, module, "weight")
    if weight is None or getattr(module, "max_norm", None) is not None:
        return walk.opaque(call, f"{call.label} renormalises its rows, or computes them")
    walk.close((call.args, call.kwargs), f"{call.label} reads it as indices")
    count, width = weight.value.shape
    role = ((count, width), lambda s: s.reshape(1, -1), None)
    return _finish(walk, call, "embedding", weight, None, role, None, width, -1)


MODULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear_module,
    nn.Conv1d: _conv_module(1, False),
    nn.Conv2d: _conv_module(2, False),
    nn.Conv3d: _conv_module(3, False),
    nn.ConvTranspose1d: _conv_module(1, True),
    nn.ConvTranspose2d: _conv_module(2, True),
    nn.ConvTranspose3d: _conv_module(3, True),
    nn.Embedding: _embedding,
    **dict.fromkeys(
        (
            *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm),
            *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        ),
        _norm,
    ),
}

FUNCTIONS: dict[Any, Rule] = {
    F.linear: _linear_function,
    F.conv1d: _conv_function(1, False),
    F.conv2d: _conv_function(2, False),
    F.conv3d: _conv_function(3, False),
    F.conv_transpose1d: _conv_function(1, True),
    F.conv_transpose2d: _conv_function(2, True),
    F.conv_transpose3d: _conv_function(3, True),
}
