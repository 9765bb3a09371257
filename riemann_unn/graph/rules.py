"""What each operation does to spaces: keeps them, moves them, joins them, or closes them.

An operation that is in none of the tables is taken for one that is not positively homogeneous.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from . import layers
from .propagate import Call, Parameter, Walk
from .spaces import ZERO, Activation

__all__ = ["FUNCTIONS", "METHODS", "MODULES", "attribute", "opaque"]

Rule = Callable[[Walk, Call], Any]


def opaque(walk: Walk, call: Call) -> Any:
    """Close what goes in, and hand out activations whose scale is fixed."""
    return walk.opaque(call)


def same(walk: Walk, call: Call) -> Any:
    """Elementwise and homogeneous in the first argument: ReLU, dropout."""
    return _kept(walk, call, getattr(call.input, "meta", None))


def cast(walk: Walk, call: Call) -> Any:
    """Another floating point type, or another device."""
    try:
        meta = walk.meta(call)
    except (RuntimeError, NotImplementedError):  # meta tensors do not move
        meta = None
    moved = isinstance(meta, Tensor) and meta.device.type == "meta"
    return _kept(walk, call, meta if moved else call.input.meta)


def _kept(walk: Walk, call: Call, meta: Any) -> Any:
    x = call.input
    elementwise = isinstance(x, Activation) and isinstance(meta, Tensor)
    if (
        not elementwise
        or meta.shape != x.ids.shape
        or not (meta.is_floating_point() or meta.is_complex())
    ):
        return opaque(walk, call)
    rest = (call.args[1:], {k: v for k, v in call.kwargs.items() if v is not x})
    walk.close(rest, f"{call.label} reads it")
    for p in call.module.parameters() if call.module is not None else ():
        walk.frozen.setdefault(walk.names(p) or "", f"{call.label} reads it")
    return Activation(meta, x.ids)


def clamp(walk: Walk, call: Call) -> Any:
    """Only a clamp at zero from below or above is homogeneous."""
    low, high = call.argument(1, "min"), call.argument(2, "max")
    bounds = [b for b in (low, high) if b is not None]
    return (same if len(bounds) == 1 and _is_zero(bounds[0]) else opaque)(walk, call)


def move(walk: Walk, call: Call) -> Any:
    """Elements change place and nothing else: the operation itself moves the spaces."""
    x, rest = call.input, tree_leaves((call.args[1:], call.kwargs), is_leaf=_is_ours)
    others = [v for v in rest if v is not x]
    if not isinstance(x, Activation) or any(
        _is_ours(v) or isinstance(v, torch.dtype) for v in others
    ):
        return opaque(walk, call)
    if call.node.target == "view":  # spaces are broadcast, and have other strides than the numbers
        return _paired(x, x.ids.reshape(*call.args[1:], **call.kwargs))
    return _paired(x, _on_ids(call, call.args, call.kwargs))


def like(walk: Walk, call: Call) -> Any:
    """The shape or the type of another tensor."""
    x, meta = call.input, walk.meta(call)
    if not isinstance(x, Activation) or not (meta.is_floating_point() or meta.is_complex()):
        return opaque(walk, call)
    if x.ids.numel() == meta.numel():
        return Activation(meta, x.ids.reshape(meta.shape))
    return Activation(meta, x.ids.expand(meta.shape))


def join(walk: Walk, call: Call) -> Any:
    """Concatenation and stacking of a sequence of tensors."""
    first = call.argument(0, "tensors")
    if not isinstance(first, (list, tuple)):
        return opaque(walk, call)
    reason = f"{call.label} joins a constant to it"
    parts = [walk.constant(x, reason) for x in first]
    kwargs = {k: v for k, v in call.kwargs.items() if k != "tensors"}
    return _paired(parts[0], _on_ids(call, (parts, *call.args[1:]), kwargs))


def pad(walk: Walk, call: Call) -> Any:
    """Padding by zeros, or by what is there already."""
    mode, value = call.argument(2, "mode", "constant"), call.argument(3, "value")
    if mode == "constant" and not (value is None or _is_zero(value)):
        return opaque(walk, call)
    return move(walk, call)  # zero is also the number of the space of zeros


def getitem(walk: Walk, call: Call) -> Any:
    """Indexing, of a tensor or of a tuple of tensors."""
    if isinstance(call.args[0], Activation):
        return move(walk, call)
    return call.args[0][call.args[1]]


def window(dims: int | None) -> Rule:
    """Mix the elements along the last dimensions: pooling, interpolation."""

    def rule(walk: Walk, call: Call) -> Any:
        x = call.input
        if not isinstance(x, Activation):
            return opaque(walk, call)
        n = x.ids.ndim - 2 if dims is None else dims
        outer = x.ids.shape[: x.ids.ndim - n]
        # One channel of zeros tells the size of the result.
        small = torch.zeros((1,) * len(outer) + x.ids.shape[len(outer) :])
        args = tuple(small if a is x else a for a in call.args)
        result = call.function(*args, **{k: small if a is x else a for k, a in call.kwargs.items()})
        if not isinstance(result, Tensor):
            return opaque(walk, call)
        meta = x.meta.new_empty(*outer, *result.shape[len(outer) :])
        mixed = walk.spaces.union_over(x.ids, tuple(range(len(outer), x.ids.ndim)))
        return Activation(meta, mixed.expand(meta.shape))

    rule.__name__ = "window"
    return rule


def reduce(walk: Walk, call: Call) -> Any:
    """Sum, mean or extremum over some dimensions."""
    x, dim = call.input, call.argument(1, "dim")
    if isinstance(call.argument(1, "other", dim), (Activation, Parameter, Tensor)):
        return add(walk, call)  # torch.max and torch.min of two tensors
    if not isinstance(x, Activation) or call.kwargs.get("dtype") is not None:
        return opaque(walk, call)
    if dim is None or dim == ():
        dims = tuple(range(x.ids.ndim))
    else:
        dims = tuple(d % x.ids.ndim for d in ((dim,) if isinstance(dim, int) else dim))
    mixed = walk.spaces.union_over(x.ids, dims)
    if not call.argument(2, "keepdim", False):
        mixed = mixed[tuple(0 if d in dims else slice(None) for d in range(x.ids.ndim))]
    result = Activation(x.meta.new_empty(mixed.shape), mixed)
    if dim is None or _name(call) not in ("max", "min"):
        return result
    # Which element is the largest does not change when all of them are scaled alike.
    indices = torch.empty(mixed.shape, dtype=torch.int64, device="meta")
    fixed = walk.constant(indices, f"{call.label} gives indices")
    kind: Any = torch.return_types.max if _name(call) == "max" else torch.return_types.min
    return kind((result, fixed))


def add(walk: Walk, call: Call) -> Any:
    """Sums, differences and extrema of two tensors: both must have one scale."""
    parts = [call.input, call.argument(1, "other")]
    for part, other in (parts, parts[::-1]):
        if not isinstance(part, (Activation, Tensor, Parameter)):
            if not _is_zero(part):
                walk.close(other, f"{call.label} adds a constant to it")
            return other
    reason = f"{call.label} adds a constant to it"
    a, b = (walk.constant(x, reason) for x in parts)
    ids = walk.spaces.union(a.ids, b.ids)
    return Activation(a.meta.new_empty(ids.shape), ids)


def multiply(walk: Walk, call: Call) -> Any:
    """Products: homogeneous in one factor when the other keeps its scale."""
    a, b = call.input, call.argument(1, "other")
    if isinstance(a, Activation) and isinstance(b, Activation):
        if not walk.spaces.all_fixed(b.ids):
            a, b = b, a
        walk.close(b, f"{call.label} multiplies two activations")
    elif isinstance(b, Activation):
        a, b = b, a
    walk.freeze(b, f"{call.label} reads it")
    return _broadcast(a, b)


def divide(walk: Walk, call: Call) -> Any:
    """Quotients: homogeneous in the numerator when the denominator keeps its scale."""
    if call.kwargs.get("rounding_mode") is not None:
        return opaque(walk, call)
    other = call.argument(1, "other")
    walk.close(other, f"{call.label} divides by it")
    if not isinstance(call.input, Activation):
        return opaque(walk, call)
    return _broadcast(call.input, other)


def _broadcast(x: Activation, other: Any) -> Activation:
    """The spaces of ``x`` in the shape that an elementwise operation with ``other`` has."""
    tensor = {Activation: "ids", Parameter: "value"}.get(type(other))
    other = getattr(other, tensor) if tensor else other
    shape = torch.broadcast_shapes(x.ids.shape, getattr(other, "shape", ()))
    return Activation(x.meta.new_empty(shape), x.ids.expand(shape))


def _name(call: Call) -> str:
    return call.label.partition(" ")[0]


def plain(walk: Walk, call: Call) -> Any:
    """Questions about shape and kind, which have plain answers."""
    return walk.meta(call)


def constants(walk: Walk, call: Call) -> Any:
    """Tensors of the shape of another, or of its dtype, that hold none of its numbers."""
    meta = walk.meta(call)
    if "zeros" in _name(call):
        return Activation(meta, torch.tensor(ZERO).expand(meta.shape))
    return walk.constant(meta, f"{call.label} makes a constant")


def attribute(walk: Walk, call: Call) -> Any:
    """``getattr`` of a tensor: its shape and the like, or a transpose."""
    x, name = call.args
    if not isinstance(x, (Activation, Parameter)):
        return getattr(x, name)
    result = walk.meta(call)
    if not isinstance(result, Tensor):
        return result
    if isinstance(x, Activation) and name in ("T", "mT", "data"):
        return Activation(result, x.ids if name == "data" else getattr(x.ids, name))
    return opaque(walk, call)


def _is_activation(x: Any) -> bool:
    return isinstance(x, Activation)


def _is_ours(x: Any) -> bool:
    return isinstance(x, (Activation, Parameter))


def _is_zero(x: Any) -> bool:
    return isinstance(x, (int, float)) and x == 0


def _on_ids(call: Call, args: Any, kwargs: Any) -> Any:
    args, kwargs = tree_map(
        lambda x: x.ids if isinstance(x, Activation) else x, (args, kwargs), is_leaf=_is_activation
    )
    try:
        return call.function(*args, **kwargs)
    except (RuntimeError, NotImplementedError):  # no integer kernel, as for reflection
        args, kwargs = tree_map(
            lambda x: x.double() if isinstance(x, Tensor) and x.dtype == torch.int64 else x,
            (args, kwargs),
        )
        return tree_map(lambda x: x.long(), call.function(*args, **kwargs))


def _paired(x: Activation, ids: Any) -> Any:
    """Activations of the dtype of ``x`` for moved spaces."""
    return tree_map(lambda i: Activation(x.meta.new_empty(i.shape), i), ids)


def _named(names: str, rule: Rule) -> Iterable[tuple[str, Rule]]:
    return ((name, rule) for name in names.split())


_BY_NAME: dict[str, Rule] = dict(
    [
        *_named(
            "relu relu_ leaky_relu leaky_relu_ rrelu rrelu_ prelu neg neg_ negative abs abs_ "
            "positive pos clone contiguous detach requires_grad_ dropout dropout_ dropout1d "
            "dropout2d dropout3d",
            same,
        ),
        *_named("to type float double half bfloat16 cpu cuda", cast),
        *_named("view_as reshape_as expand_as type_as", like),
        *_named("clamp clamp_ clip clip_", clamp),
        *_named("clamp_min clamp_min_ clamp_max clamp_max_", clamp),
        *_named(
            "view reshape flatten unflatten ravel permute transpose transpose_ t movedim moveaxis "
            "swapaxes swapdims squeeze squeeze_ unsqueeze unsqueeze_ expand repeat tile "
            "chunk split split_with_sizes tensor_split unbind unsafe_chunk narrow select "
            "index_select roll flip pixel_shuffle pixel_unshuffle channel_shuffle "
            "broadcast_to repeat_interleave unfold",
            move,
        ),
        *_named("cat concat concatenate stack hstack vstack dstack", join),
        *_named("getitem", getitem),
        *_named("pad", pad),
        *_named("max_pool1d avg_pool1d adaptive_max_pool1d adaptive_avg_pool1d", window(1)),
        *_named("max_pool2d avg_pool2d adaptive_max_pool2d adaptive_avg_pool2d", window(2)),
        *_named("max_pool3d avg_pool3d adaptive_max_pool3d adaptive_avg_pool3d", window(3)),
        *_named("interpolate upsample upsample_nearest upsample_bilinear", window(None)),
        *_named("mean sum amax amin max min", reduce),
        *_named(
            "add add_ iadd sub sub_ isub subtract subtract_ maximum minimum fmax "
            "fmin __add__ __radd__",
            add,
        ),
        *_named("mul mul_ imul multiply multiply_ __mul__ __rmul__", multiply),
        *_named("div div_ truediv itruediv divide true_divide", divide),
        *_named("size dim ndimension numel nelement is_floating_point is_complex stride", plain),
        *_named(
            "new_zeros new_ones new_empty new_full zeros_like ones_like empty_like full_like "
            "rand_like randn_like",
            constants,
        ),
        *_named("get_device element_size is_contiguous", plain),
    ]
)

METHODS: dict[str, Rule] = {**_BY_NAME, "sub": add}

FUNCTIONS: dict[Any, Rule] = {
    getattr(home, name): rule
    for name, rule in _BY_NAME.items()
    for home in (torch, F, operator)
    if hasattr(home, name)
}
FUNCTIONS.update(layers.FUNCTIONS)

MODULES: dict[type[nn.Module], Rule] = {
    **dict.fromkeys(
        (
            *(nn.ReLU, nn.LeakyReLU, nn.RReLU, nn.PReLU, nn.Identity),
            *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
        ),
        same,
    ),
    **dict.fromkeys(
        (
            *(nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
            *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
            *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
            *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
            *(nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
        ),
        move,
    ),
    **dict.fromkeys(
        (nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveMaxPool1d, nn.AdaptiveAvgPool1d), window(1)
    ),
    **dict.fromkeys(
        (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d), window(2)
    ),
    **dict.fromkeys(
        (nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveMaxPool3d, nn.AdaptiveAvgPool3d), window(3)
    ),
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), window(None)),
    **layers.MODULES,
}
