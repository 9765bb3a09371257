"""Rules for operations with weights: convolutions, normalisations, embeddings, scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .program import module_of
from .spaces import compact
from .walk import Activation, Call, Layer, Rule, Walk, Weight

__all__ = ["RULES"]


def record_layer(
    walk: Walk,
    call: Call,
    kind: str,
    weight: Weight,
    bias: Weight | None,
    inputs: Tensor | None,
    outputs: Tensor,
) -> None:
    """Record a use of a weight."""
    path = module_of(call.node)
    inside = [user for user in call.node.users if f"{module_of(user)}.".startswith(f"{path}.")]
    owner = weight.name.rpartition(".")[0]
    is_whole = path and not inside and (owner == path or walk.owns(path, weight.name))
    name = bias.name if bias is not None else None
    walk.layers.append(
        Layer(call.node.name, path if is_whole else "", kind, weight.name, name, inputs, outputs)
    )


def bias_role(walk: Walk, call: Call, bias: Weight, ids: Tensor) -> None:
    """Record that a bias scales as the activation that it is added to."""
    shape = bias.value.shape
    if is_constant_where_broadcast(ids, shape):
        walk.scale(bias, at_entries(ids, shape))
    else:
        walk.close(Activation(ids), f"{call.label} adds one bias to several channels")
        walk.close_weights(bias, f"{call.label} adds it to several channels")


def _aligned(ids: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """The dimensions of the result along which an operand of this shape is broadcast."""
    missing = ids.ndim - len(shape)
    return tuple(
        d for d in range(ids.ndim) if d < missing or shape[d - missing] == 1 < ids.shape[d]
    )


def is_constant_where_broadcast(ids: Tensor, shape: Sequence[int]) -> bool:
    """Whether each entry of a broadcast operand belongs to one space only."""
    for dim in _aligned(ids, shape):
        if ids.shape[dim] > 1 and ids.stride(dim) != 0:
            short = compact(ids)
            if not torch.equal(short, short.narrow(dim, 0, 1).expand_as(short)):
                return False
    return True


def at_entries(ids: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the space of each entry of a broadcast operand, in the operand's shape."""
    for dim in _aligned(ids, shape):
        ids = ids.narrow(dim, 0, 1)
    return ids.reshape(ids.shape[ids.ndim - len(shape) :]).expand(shape)


def scaled_entries(walk: Walk, call: Call, ids: Tensor, weight: Weight) -> Activation:
    """An elementwise product with a weight, whose result has new spaces."""
    shape = weight.value.shape
    inputs = at_entries(ids, shape)
    outputs = walk.spaces.new(weight.value.numel()).reshape(shape)
    walk.scale(weight, outputs, inputs)
    record_layer(walk, call, "scale", weight, None, inputs.reshape(-1), outputs.reshape(-1))
    return Activation(outputs.expand(call.result.shape))


def _convolution(transposed: bool) -> Rule:
    def convolution(walk: Walk, call: Call) -> Any:
        x, w, bias = call.input, call.argument(1, "weight"), call.argument(2, "bias")
        usable = isinstance(w, Weight) and (bias is None or isinstance(bias, Weight))
        if not isinstance(x, Activation) or not usable:
            return walk.opaque(call, f"the weight or bias of {call.label} is computed")
        first, second, *kernel = w.value.shape
        groups, ones = int(call.argument(6, "groups", 1)), (1,) * len(kernel)
        dim = x.ids.ndim - len(kernel) - 1
        others = tuple(d for d in range(x.ids.ndim) if d != dim)
        inputs = walk.spaces.union_over(x.ids, others).reshape(-1)
        outputs = walk.spaces.new(second * groups if transposed else first)
        # The second dimension of the weight has other spaces in each group.
        rows, columns = (inputs, outputs) if transposed else (outputs, inputs)
        columns = columns.reshape(groups, second)
        if groups > 1:
            columns = columns.repeat_interleave(first // groups, dim=0)
        rows, columns = rows.reshape(-1, 1, *ones), columns.reshape(-1, second, *ones)
        walk.scale(w, *((columns, rows) if transposed else (rows, columns)))
        if bias is not None:
            walk.scale(bias, outputs)
        kind = "conv_transpose" if transposed else "conv"
        record_layer(walk, call, kind, w, bias, inputs, outputs)
        thin = outputs.reshape(-1, *(1,) * len(kernel))
        return Activation(thin.expand(call.result.shape))

    return convolution


def _norm(weight_at: int, channels_last: bool) -> Rule:
    """Normalisation closes its input; its affine part has new spaces."""

    def norm(walk: Walk, call: Call) -> Any:
        x, weight = call.input, call.argument(weight_at, "weight")
        bias = call.argument(weight_at + 1, "bias")
        bias = bias if isinstance(bias, (Weight, Tensor)) else None  # rms_norm has none
        rest = [v for v in (*call.args, *call.kwargs.values()) if v is not weight and v is not bias]
        walk.close(rest, f"{call.label} normalises it")
        if not isinstance(x, Activation) or not isinstance(weight, Weight):
            return walk.opaque(call, f"{call.label} has no affine part that could be scaled")
        shape = weight.value.shape
        outputs = walk.spaces.new(weight.value.numel()).reshape(shape)
        walk.scale(weight, outputs)
        if isinstance(bias, Weight):
            walk.scale(bias, outputs)
        elif bias is not None:
            return walk.opaque(call, f"the bias of {call.label} is computed")
        record_layer(walk, call, "norm", weight, bias, None, outputs.reshape(-1))
        first = call.result[0] if isinstance(call.result, (tuple, list)) else call.result
        if not channels_last:
            outputs = outputs.reshape(-1, *(1,) * (first.ndim - 2))
        made = Activation(outputs.expand(first.shape))
        if first is call.result:
            return made
        why = f"{call.label} gives statistics"
        return (made, *(walk.constant(y, why) for y in call.result[1:]))

    return norm


def embedding(walk: Walk, call: Call) -> Any:
    weight, indices = call.args[:2]
    walk.close(indices, f"{call.label} reads it as indices")
    if not isinstance(weight, Weight) or weight.value.ndim != 2:
        return walk.opaque(call, f"the rows of {call.label} are computed")
    outputs = walk.spaces.new(weight.value.shape[1])
    walk.scale(weight, outputs)
    record_layer(walk, call, "embedding", weight, None, None, outputs)
    return Activation(outputs.expand(call.result.shape))


RULES: dict[str, Rule] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution(False)),
    **dict.fromkeys(
        ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolution(True)
    ),
    **dict.fromkeys(("batch_norm", "instance_norm", "native_batch_norm"), _norm(1, False)),
    **dict.fromkeys(("group_norm",), _norm(2, False)),
    **dict.fromkeys(("layer_norm", "rms_norm", "native_layer_norm"), _norm(2, True)),
    "embedding": embedding,
}
