"""Operations with weights: where their channels are, and how weights and biases scale with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .propagate import Call, Layer, Parameter, Role, Walk
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
    shape: Sequence[int],
) -> Activation:
    """Make the output, whose channels along ``dim`` are new spaces, and note how weights scale."""
    view, place, loss = role
    outputs = walk.spaces.new(channels)
    walk.roles.setdefault(weight.name, []).append(Role(view, place(outputs), loss))
    if bias is not None:
        walk.roles.setdefault(bias.name, []).append(Role((channels,), outputs, None))
    path = str(call.node.target) if call.module is not None else ""
    walk.uses.append(
        Layer(
            call.node.name,
            path,
            kind,
            weight.name,
            bias.name if bias is not None else None,
            inputs,
            outputs,
        )
    )
    thin = [1] * len(shape)
    thin[dim] = channels
    return Activation(call.input.meta.new_empty(shape), outputs.reshape(thin).expand(*shape))


def _linear(walk: Walk, call: Call, weight: Any, bias: Any) -> Any:
    x = call.input
    if not _usable(x, weight, bias) or weight.value.ndim != 2:
        return walk.opaque(
            call, f"the weight or bias of {call.label} is computed, or shared in part"
        )
    out, into = weight.value.shape
    if x.ids.shape[-1] != into:
        raise ValueError(f"{into} features are read, but there are {x.ids.shape[-1]}")
    inputs = _channels(walk, x.ids, -1)
    role = ((out, into), lambda s: s.reshape(-1, 1), inputs.reshape(1, -1))
    return _finish(
        walk, call, "linear", weight, bias, role, inputs, out, -1, (*x.ids.shape[:-1], out)
    )


def _convolution(
    walk: Walk, call: Call, weight: Any, bias: Any, dims: int, transposed: bool
) -> Any:
    x = call.input
    if not _usable(x, weight, bias):
        return walk.opaque(call, f"the weight or bias of {call.label} is computed")
    inputs = _channels(walk, x.ids, -dims - 1)
    groups = _option(call, "groups", transposed)
    first, second, *kernel = weight.value.shape
    read = first if transposed else second * groups
    if len(inputs) != read:
        raise ValueError(f"{read} channels are read, but there are {len(inputs)}")
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
    lengths = _lengths(call, x.ids.shape[-dims:], kernel, transposed)
    shape = (*x.ids.shape[: -dims - 1], out, *lengths)
    return _finish(
        walk, call, kind, weight, bias, (view, place, loss), inputs, out, -dims - 1, shape
    )


_CONV = ("stride", "padding", "dilation", "groups")
_CONV_TRANSPOSE = ("stride", "padding", "output_padding", "groups", "dilation")


def _option(call: Call, name: str, transposed: bool) -> Any:
    """An option of a convolution, from its module or its arguments."""
    if call.module is not None:
        return getattr(call.module, name)
    position = 3 + (_CONV_TRANSPOSE if transposed else _CONV).index(name)
    return call.argument(position, name, 0 if "padding" in name else 1)


def _lengths(
    call: Call, lengths: Sequence[int], kernel: Sequence[int], transposed: bool
) -> list[int]:
    """How long the result of a convolution is in each dimension."""

    def each(name: str) -> list[int]:
        option = _option(call, name, transposed)
        return list(option) if isinstance(option, (tuple, list)) else [option] * len(lengths)

    stride, dilation = each("stride"), each("dilation")
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    padding = _option(call, "padding", transposed)
    if isinstance(padding, str):
        total = reach if padding == "same" else [0] * len(lengths)
    else:
        total = [2 * p for p in each("padding")]
    if transposed:
        extra = each("output_padding")
        parts = zip(lengths, stride, total, reach, extra, strict=True)
        return [(n - 1) * s - p + r + e + 1 for n, s, p, r, e in parts]
    parts4 = zip(lengths, stride, total, reach, strict=True)
    result = [(n + p - r - 1) // s + 1 for n, s, p, r in parts4]
    if min(result) < 1:
        raise ValueError(f"the kernel {tuple(kernel)} is larger than the input {tuple(lengths)}")
    return result


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


def layer_module(walk: Walk, call: Call) -> Any:
    return _linear(walk, call, *_module_parts(walk, call))


def _linear_function(walk: Walk, call: Call) -> Any:
    return _linear(walk, call, call.argument(1, "weight"), call.argument(2, "bias"))


def _conv_module(dims: int, transposed: bool) -> Rule:
    def rule(walk: Walk, call: Call) -> Any:
        return _convolution(walk, call, *_module_parts(walk, call), dims, transposed)

    return rule


def _conv_function(dims: int, transposed: bool) -> Rule:
    def rule(walk: Walk, call: Call) -> Any:
        parts = call.argument(1, "weight"), call.argument(2, "bias")
        return _convolution(walk, call, *parts, dims, transposed)

    return rule


def norm(walk: Walk, call: Call) -> Any:
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
    return _finish(walk, call, "norm", weight, bias, role, None, channels, dim, x.ids.shape)


def _batched(call: Call, x: Activation) -> bool:
    """Instance normalisation alone takes a single example without a batch dimension."""
    kinds = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    single = {kind: dims + 2 for dims, kind in enumerate(kinds)}
    return not isinstance(call.module, kinds) or x.ids.ndim != single[type(call.module)]


def embedding(walk: Walk, call: Call) -> Any:
    module = call.module
    weight = None if module is None else _parameter(walk, module, "weight")
    if weight is None or getattr(module, "max_norm", None) is not None:
        return walk.opaque(call, f"{call.label} renormalises its rows, or computes them")
    walk.close((call.args, call.kwargs), f"{call.label} reads it as indices")
    count, width = weight.value.shape
    role = ((count, width), lambda s: s.reshape(1, -1), None)
    shape = (*call.input.ids.shape, width)
    made = _finish(walk, call, "embedding", weight, None, role, None, width, -1, shape)
    return Activation(made.meta.to(weight.value.dtype), made.ids)


MODULES: dict[type[nn.Module], Rule] = {
    nn.Linear: layer_module,
    nn.Conv1d: _conv_module(1, False),
    nn.Conv2d: _conv_module(2, False),
    nn.Conv3d: _conv_module(3, False),
    nn.ConvTranspose1d: _conv_module(1, True),
    nn.ConvTranspose2d: _conv_module(2, True),
    nn.ConvTranspose3d: _conv_module(3, True),
    nn.Embedding: embedding,
    **dict.fromkeys(
        (
            *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm),
            *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        ),
        norm,
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
