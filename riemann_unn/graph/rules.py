"""Rules: for each operation, whether it keeps, moves, joins or closes spaces.

An operation without a rule counts as not positively homogeneous.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from . import contractions, layers
from .program import operation
from .spaces import ZERO
from .walk import Activation, Call, Rule, Walk, Weight

__all__ = ["RULES", "opaque"]


def opaque(walk: Walk, call: Call) -> Any:
    """Close the inputs; the results have scale one."""
    return walk.opaque(call)


def same(walk: Walk, call: Call) -> Any:
    """Elementwise and homogeneous in the first argument: ReLU, dropout."""
    rest = (call.args[1:], {k: v for k, v in call.kwargs.items() if v is not call.input})
    walk.close(rest, f"{call.label} reads it")
    return cast(walk, call)


def cast(walk: Walk, call: Call) -> Any:
    """A change of precision or device."""
    x, result = call.input, call.result
    if (
        not isinstance(x, Activation)
        or not isinstance(result, Tensor)
        or result.shape != x.ids.shape
        or not (result.is_floating_point() or result.is_complex())
    ):
        return _view_of_weight(walk, call) if isinstance(x, Weight) else opaque(walk, call)
    return x


def clamp(walk: Walk, call: Call) -> Any:
    """Only a clamp at zero from below or above is homogeneous."""
    bounds = [call.argument(1, "min"), call.argument(2, "max")]
    bounds = [b for b in bounds if b is not None]
    return (same if len(bounds) == 1 and _is_zero(bounds[0]) else opaque)(walk, call)


def threshold(walk: Walk, call: Call) -> Any:
    """Homogeneous at zero, where it is ReLU."""
    is_relu = all(_is_zero(call.argument(i, n)) for i, n in ((1, "threshold"), (2, "value")))
    return (same if is_relu else opaque)(walk, call)


def compare(walk: Walk, call: Call) -> Any:
    """Signs, and comparisons with zero or within one scale, which no scale changes."""
    x, other = call.input, call.argument(1, "other", 0)
    if isinstance(x, Activation) and isinstance(other, Activation):
        walk.spaces.union(x.ids, other.ids)
    elif not isinstance(x, Activation) or not (_is_zero(other) or _is_zeros(other)):
        return opaque(walk, call)
    return walk.constant(call.result, f"{call.label} gives signs")


def where(walk: Walk, call: Call) -> Any:
    """Elements of two tensors, which must have one scale, by a mask."""
    mask, *parts = (call.argument(i, n) for i, n in enumerate(("condition", "self", "other")))
    walk.close(mask, f"{call.label} reads it as a mask")
    return _together(walk, call, parts)


def masked(walk: Walk, call: Call) -> Any:
    """Zeros where a mask says so."""
    x, mask, value = (call.argument(i, n) for i, n in enumerate(("self", "mask", "value")))
    if not (_is_zero(value) or _is_zeros(value)) or not isinstance(x, Activation):
        return opaque(walk, call)
    walk.close(mask, f"{call.label} reads it as a mask")
    return Activation(x.ids.expand(call.result.shape))


def move(walk: Walk, call: Call) -> Any:
    """Elements change position only: the operation is applied to the spaces."""
    x = call.input
    others = tree_leaves((call.args[1:], {k: v for k, v in call.kwargs.items() if v is not x}))
    if isinstance(x, Weight):
        return _view_of_weight(walk, call)
    if not isinstance(x, Activation) or any(map(_is_tracked, others)):
        return opaque(walk, call)
    if str(call.node.target).endswith("view.dtype"):
        return opaque(walk, call)
    return _moved(call, call.args, call.kwargs)


def _view_of_weight(walk: Walk, call: Call) -> Any:
    """The same view of a weight, or a constant where memory is not shared."""
    weight: Weight = call.input
    if any(_is_tracked(v) for v in tree_leaves((call.args[1:], call.kwargs), is_leaf=_is_tracked)):
        return opaque(walk, call)
    result = call.run(weight.value, *call.args[1:], **call.kwargs)
    memory = weight.value.untyped_storage().data_ptr()

    def named(part: Tensor) -> Any:
        if part.untyped_storage().data_ptr() == memory and part.dtype == weight.value.dtype:
            return Weight(weight.name, part)
        walk.close_weights(weight, f"{call.label} copies it")
        return part

    return tree_map(named, result)


def like(walk: Walk, call: Call) -> Any:
    """The shape of another tensor."""
    x = call.input
    if not isinstance(x, Activation):
        return opaque(walk, call)
    if x.ids.numel() == call.result.numel():
        return Activation(x.ids.reshape(call.result.shape))
    return Activation(x.ids.expand(call.result.shape))


def join(walk: Walk, call: Call) -> Any:
    """Concatenation and stacking of a sequence of tensors."""
    first = call.argument(0, "tensors")
    reason = f"{call.label} joins a constant to it"
    parts = [walk.constant(x, reason) for x in first]
    kwargs = {k: v for k, v in call.kwargs.items() if k != "tensors"}
    if operation(call.node) not in ("cat", "concat", "concatenate"):
        return _moved(call, (parts, *call.args[1:]), kwargs)
    # Only along this dimension; other broadcast dimensions stay so, and take no memory.
    dim = int(call.argument(1, "dim", kwargs.get("axis", 0))) % call.result.ndim
    found = [x.ids for x in parts if x.ids.ndim == call.result.ndim]  # torch skips empty vectors
    for d in range(call.result.ndim):
        if d != dim and all(x.shape[d] > 0 and x.stride(d) == 0 for x in found):
            found = [x.narrow(d, 0, 1) for x in found]
    return Activation(torch.cat(found, dim).expand(call.result.shape))


def pad(walk: Walk, call: Call) -> Any:
    """Padding by zeros, or by the tensor's own elements."""
    mode, value = call.argument(2, "mode", "constant"), call.argument(3, "value")
    if not isinstance(mode, str):  # constant_pad_nd
        mode, value = "constant", mode
    if mode == "constant" and not (value is None or _is_zero(value)):
        return opaque(walk, call)
    return move(walk, call)  # the space of zeros has the number 0


def getitem(walk: Walk, call: Call) -> Any:
    """One of several results."""
    return call.args[0][call.args[1]]


def window(dims: int | None) -> Rule:
    """Mix the elements along the last dimensions: pooling, interpolation."""

    def rule(walk: Walk, call: Call) -> Any:
        x = call.input
        first = call.result[0] if isinstance(call.result, (tuple, list)) else call.result
        if not isinstance(x, Activation):
            return opaque(walk, call)
        walk.close((call.args[1:], call.kwargs), f"{call.label} reads it")
        n = x.ids.ndim - 2 if dims is None else dims
        mixed = walk.spaces.union_over(x.ids, tuple(range(x.ids.ndim - n, x.ids.ndim)))
        return _and_indices(walk, call, Activation(mixed.expand(first.shape)))

    rule.__name__ = "window"
    return rule


def _and_indices(walk: Walk, call: Call, x: Activation) -> Any:
    """A result, with indices if the operation returns them."""
    if not isinstance(call.result, (tuple, list)):
        return x
    # The index of the largest does not change under a common scale.
    rest = (walk.constant(y, f"{call.label} gives indices") for y in call.result[1:])
    return (x, *rest)


def reduce(walk: Walk, call: Call) -> Any:
    """Sum, mean or extremum over some dimensions."""
    x, dim = call.input, call.argument(1, "dim")
    if isinstance(call.argument(1, "other", dim), (Activation, Weight, Tensor)):
        return add(walk, call)  # the larger of two tensors
    if not isinstance(x, Activation):
        return opaque(walk, call)
    if dim is None or dim == [] or dim == ():
        dims = tuple(range(x.ids.ndim))
    else:
        dims = tuple(d % x.ids.ndim for d in ((dim,) if isinstance(dim, int) else dim))
    mixed = walk.spaces.union_over(x.ids, dims)
    if not call.argument(2, "keepdim", False):
        mixed = mixed[tuple(0 if d in dims else slice(None) for d in range(x.ids.ndim))]
    return _and_indices(walk, call, Activation(mixed))


def add(walk: Walk, call: Call) -> Any:
    """Sums, differences and extrema of two tensors: both must have one scale."""
    return _together(walk, call, [call.input, call.argument(1, "other")])


def _together(walk: Walk, call: Call, parts: list[Any]) -> Any:
    reason = f"{call.label} adds a constant to it"
    shape = call.result.shape
    activations = [x for x in parts if isinstance(x, Activation)]
    for part, other in (parts, parts[::-1]):
        if isinstance(part, Weight) and isinstance(other, Activation):
            ids = other.ids.expand(shape)
            if layers.is_constant_where_broadcast(ids, part.value.shape):
                walk.scale(part, layers.at_entries(ids, part.value.shape))
                return Activation(ids)
        if isinstance(part, (int, float, complex)):
            if not _is_zero(part):
                walk.close(other, reason)
            return Activation(walk.constant(other, reason).ids.expand(shape))
    if not activations:
        return opaque(walk, call)
    a, b = (walk.constant(x, reason) for x in parts)
    return Activation(walk.spaces.union(a.ids, b.ids).expand(shape))


def multiply(walk: Walk, call: Call) -> Any:
    """Products: homogeneous in one factor if the other is closed."""
    a, b = call.input, call.argument(1, "other")
    shape = call.result.shape
    if isinstance(a, Activation) and isinstance(b, Activation):
        if not walk.spaces.all_closed(b.ids):
            a, b = b, a
        walk.close(b, f"{call.label} multiplies two activations")
    elif isinstance(b, Activation):
        a, b = b, a
    if isinstance(b, Weight):
        ids = a.ids.expand(shape)
        if b.value.numel() > 1 and layers.is_constant_where_broadcast(ids, b.value.shape):
            return layers.scaled_entries(walk, call, ids, b)
        walk.close_weights(b, f"{call.label} reads it")
    return Activation(a.ids.expand(shape))


def multiply_add(walk: Walk, call: Call) -> Any:
    """A sum with a product: ``x + value * a * b``."""
    product = replace(call, args=call.args[1:3], kwargs={})
    shape = torch.broadcast_shapes(*(_shape(x) for x in product.args))
    product = replace(product, result=torch.empty(shape, device="meta"))
    if not any(isinstance(x, Activation) for x in product.args):
        return opaque(walk, call)
    made = multiply(walk, product)
    return add(walk, replace(call, args=(call.args[0], made), kwargs={}))


def _shape(x: Any) -> torch.Size:
    value = x.ids if isinstance(x, Activation) else x.value if isinstance(x, Weight) else x
    return torch.Size(getattr(value, "shape", ()))


def divide(walk: Walk, call: Call) -> Any:
    """Quotients: homogeneous in the numerator if the denominator is closed."""
    other = call.argument(1, "other")
    walk.close(other, f"{call.label} divides by it")
    if not isinstance(call.input, Activation) or call.kwargs.get("rounding_mode") is not None:
        return opaque(walk, call)
    return Activation(call.input.ids.expand(call.result.shape))


def constants(walk: Walk, call: Call) -> Any:
    """Tensors that take shape or dtype from another, but none of its values."""
    if "zeros" in str(call.node.target):
        return Activation(torch.tensor(ZERO).expand(call.result.shape))
    return walk.constant(call.result, f"{call.label} makes a constant")


def overwrite(walk: Walk, call: Call) -> Any:
    """Overwrite a tensor with another's values."""
    source = call.argument(1, "src")
    if not isinstance(source, Activation):
        return opaque(walk, call)
    return Activation(source.ids.expand(call.result.shape))


def _is_tracked(x: Any) -> bool:
    return isinstance(x, (Activation, Weight))


def _is_zero(x: Any) -> bool:
    return isinstance(x, (int, float)) and x == 0


def _is_zeros(x: Any) -> bool:
    return isinstance(x, Tensor) and not bool(x.any())


def _moved(call: Call, args: Any, kwargs: Any) -> Any:
    """Apply an operation to spaces."""
    args, kwargs = tree_map(_as_ids, (args, kwargs), is_leaf=_is_tracked)
    try:
        ids = call.run(*args, **kwargs)
    except (RuntimeError, NotImplementedError):
        ids = _reshaped_or_doubled(call, args, kwargs)
    return tree_map(Activation, ids)


def _as_ids(x: Any) -> Any:
    if isinstance(x, Activation):
        return x.ids
    return x.cpu() if isinstance(x, Tensor) else x


def _reshaped_or_doubled(call: Call, args: Any, kwargs: Any) -> Any:
    """Apply a view by reshape, since strides differ, and padding in double, which integers lack."""
    x = args[0]
    if isinstance(x, Tensor) and isinstance(call.result, Tensor):
        if x.numel() == call.result.numel() and "view" in str(call.node.target):
            return x.reshape(call.result.shape)
        args, kwargs = tree_map(
            lambda v: v.double() if isinstance(v, Tensor) and v is x else v, (args, kwargs)
        )
        return call.run(*args, **kwargs).long()
    raise RuntimeError(f"{call.label} cannot move spaces")


def _named(names: str, rule: Rule) -> Iterable[tuple[str, Rule]]:
    return ((name, rule) for name in names.split())


RULES: dict[str, Rule] = dict(
    [
        *_named(
            "relu leaky_relu rrelu rrelu_with_noise prelu neg negative abs absolute positive clone "
            "contiguous detach alias lift_fresh dropout feature_dropout",
            same,
        ),
        *_named("to type_as _to_copy", cast),
        *_named("clamp clip clamp_min clamp_max", clamp),
        *_named("threshold", threshold),
        *_named("gt lt ge le eq ne greater less greater_equal less_equal sign sgn", compare),
        *_named("where", where),
        *_named("masked_fill", masked),
        *_named(
            "view reshape _unsafe_view flatten unflatten ravel permute transpose t numpy_T mT "
            "adjoint movedim moveaxis swapaxes swapdims squeeze unsqueeze expand repeat tile chunk "
            "split split_with_sizes tensor_split unbind unsafe_chunk unsafe_split narrow select "
            "slice index_select index roll flip pixel_shuffle pixel_unshuffle channel_shuffle "
            "broadcast_to repeat_interleave unfold diagonal rot90 atleast_1d atleast_2d "
            "unsafe_split_with_sizes native_channel_shuffle im2col fliplr flipud",
            move,
        ),
        *_named("view_as reshape_as expand_as", like),
        *_named("cat concat concatenate stack hstack vstack dstack column_stack", join),
        *_named("getitem", getitem),
        *_named(
            "pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d "
            "replication_pad1d replication_pad2d replication_pad3d",
            pad,
        ),
        *_named("max_pool1d avg_pool1d adaptive_max_pool1d adaptive_avg_pool1d", window(1)),
        *_named("max_pool1d_with_indices", window(1)),
        *_named("max_pool2d avg_pool2d adaptive_max_pool2d adaptive_avg_pool2d", window(2)),
        *_named("max_pool2d_with_indices _adaptive_avg_pool2d", window(2)),
        *_named("max_pool3d avg_pool3d adaptive_max_pool3d adaptive_avg_pool3d", window(3)),
        *_named("max_pool3d_with_indices _adaptive_avg_pool3d", window(3)),
        *_named(
            "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d "
            "_upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d "
            "upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d "
            "_upsample_bilinear2d_aa _upsample_bicubic2d_aa grid_sampler grid_sampler_2d "
            "grid_sampler_3d",
            window(None),
        ),
        *_named("mean sum amax amin max min", reduce),
        *_named("add sub subtract rsub maximum minimum fmax fmin", add),
        *_named("mul multiply", multiply),
        *_named("addcmul", multiply_add),
        *_named("div divide true_divide", divide),
        *_named(
            "new_zeros new_ones new_empty new_full zeros_like ones_like empty_like full_like "
            "rand_like randn_like",
            constants,
        ),
        *_named("copy_", overwrite),
        *contractions.RULES.items(),
        *layers.RULES.items(),
    ]
)
