"""Rules for sums of products, as einsum letters: linear maps, matrix products, attention."""

from __future__ import annotations

import math
from string import ascii_lowercase
from typing import Any

from torch import Tensor

from .layers import bias_role, record_layer
from .walk import Activation, Call, Rule, Walk, Weight

__all__ = ["RULES"]


def contract(
    walk: Walk, call: Call, operands: tuple[Any, Any], letters: tuple[str, str, str], bias: Any
) -> Any:
    """Sum over the letters of two operands that the result lacks.

    Args:
        walk: the walk.
        call: the call.
        operands: two tensors.
        letters: those of the two operands' dimensions, and of the result's.
        bias: a bias along the last dimension, or None.
    """
    (a, b), (of_a, of_b, out) = operands, letters
    if isinstance(a, Activation) and isinstance(b, Weight):
        return _map(walk, call, a, b, of_a, of_b, out, bias)
    if isinstance(b, Activation) and isinstance(a, Weight):
        return _map(walk, call, b, a, of_b, of_a, out, bias)
    if bias is not None:
        return walk.opaque(call, f"the weight of {call.label} is computed")
    if isinstance(a, Activation) and isinstance(b, Activation):
        if walk.spaces.all_closed(b.ids):
            return _mixed(walk, call, a, b, of_a, out)
        return _mixed(walk, call, b, a, of_b, out)
    weight = "the weight" if any(isinstance(x, Tensor) for x in operands) else "an operand"
    return walk.opaque(call, f"{weight} of {call.label} is computed, or a constant")


def _mixed(walk: Walk, call: Call, x: Activation, other: Any, of_x: str, out: str) -> Activation:
    """Homogeneous in one operand if the other is closed, as attention in its values."""
    walk.close(other, f"{call.label} multiplies two activations")
    gone = tuple(d for d, letter in enumerate(of_x) if letter not in out)
    ids = walk.spaces.union_over(x.ids, gone)
    return Activation(_arranged(ids, of_x, out).expand(call.result.shape))


def _arranged(ids: Tensor, own: str, wanted: str) -> Tensor:
    """Permute dimensions to the order of other letters, with length one for missing ones."""
    kept = [letter for letter in own if letter in wanted]
    dropped = tuple(d for d, letter in enumerate(own) if letter not in wanted)
    ids = ids[tuple(0 if d in dropped else slice(None) for d in range(ids.ndim))]
    ids = ids.permute([kept.index(letter) for letter in wanted if letter in kept])
    return ids[tuple(slice(None) if letter in kept else None for letter in wanted)]


def _map(
    walk: Walk, call: Call, x: Activation, w: Weight, of_x: str, of_w: str, out: str, bias: Any
) -> Any:
    """A linear map by a weight: its result has new spaces."""
    if bias is not None and not isinstance(bias, Weight):
        return walk.opaque(call, f"the bias of {call.label} is computed")
    fed = [letter for letter in of_w if letter in out]
    read = [letter for letter in of_w if letter in of_x]
    if any(letter not in fed and letter not in read for letter in of_w):
        return walk.opaque(call, f"the weight of {call.label} is summed before it is used")
    size = dict(zip(of_w, w.value.shape, strict=True))
    own = dict(zip(of_x, x.ids.shape, strict=True))
    if any(own[letter] != size[letter] for letter in read):
        return walk.opaque(call, f"the weight of {call.label} is broadcast")
    others = tuple(d for d, letter in enumerate(of_x) if letter not in of_w)
    inputs = _arranged(walk.spaces.union_over(x.ids, others), of_x, "".join(read))
    outputs = walk.spaces.new(math.prod(size[letter] for letter in fed))
    outputs = outputs.reshape([size[letter] for letter in fed])
    walk.scale(w, _arranged(outputs, "".join(fed), of_w), _arranged(inputs, "".join(read), of_w))
    ids = _arranged(outputs, "".join(fed), out).expand(call.result.shape)
    if bias is not None:
        bias_role(walk, call, bias, ids)
    record_layer(walk, call, "linear", w, bias, inputs.reshape(-1), outputs.reshape(-1))
    return Activation(ids)


def linear(walk: Walk, call: Call) -> Any:
    x, w, bias = call.input, call.argument(1, "weight"), call.argument(2, "bias")
    if _ndim(w) != 2:
        return walk.opaque(call, f"the weight of {call.label} is no matrix")
    outer = ascii_lowercase[: len(call.result.shape) - 1]
    return contract(walk, call, (x, w), (outer + "y", "zy", outer + "z"), bias)


def matmul(walk: Walk, call: Call) -> Any:
    a, b = call.input, call.argument(1, "other", call.argument(1, "mat2"))
    return _product(walk, call, a, b, None)


def addmm(walk: Walk, call: Call) -> Any:
    bias, a, b = call.args[:3]
    scalars = (call.kwargs.get("beta", 1), call.kwargs.get("alpha", 1))
    if scalars != (1, 1):
        return walk.opaque(call)
    return _product(walk, call, a, b, bias)


def _product(walk: Walk, call: Call, a: Any, b: Any, bias: Any) -> Any:
    """A matrix product, batched or not."""
    m, n = (_ndim(x) for x in (a, b))
    batch = ascii_lowercase[: max(m, n) - 2] if max(m, n) > 2 else ""
    of_a = batch[len(batch) - max(m - 2, 0) :] + ("y" if m == 1 else "xy")
    of_b = batch[len(batch) - max(n - 2, 0) :] + ("y" if n == 1 else "yz")
    out = batch + ("x" if m > 1 else "") + ("z" if n > 1 else "")
    return contract(walk, call, (a, b), (of_a, of_b, out), bias)


def _ndim(x: Any) -> int:
    value = x.ids if isinstance(x, Activation) else x.value if isinstance(x, Weight) else x
    return int(value.ndim)


def einsum(walk: Walk, call: Call) -> Any:
    equation, operands = call.args[0].replace(" ", ""), call.args[1]
    into, arrow, out = equation.partition("->")
    parts = into.split(",")
    repeated = any(len(set(p)) < len(p) for p in (*parts, out))
    if len(parts) != 2 or not arrow or "." in equation or repeated:
        return walk.opaque(call, f"{call.label} of '{equation}' is not followed")
    return contract(walk, call, tuple(operands), (parts[0], parts[1], out), None)


def attention(walk: Walk, call: Call) -> Any:
    """Homogeneous in the values, whose channels it keeps."""
    q, k, v = call.args[:3]
    rest = (q, k, call.args[3:], {n: x for n, x in call.kwargs.items() if n != "value"})
    walk.close(rest, f"{call.label} makes weights of it")
    if not isinstance(v, Activation):
        return walk.opaque(call)
    ids = walk.spaces.union_over(v.ids, (v.ids.ndim - 2,))
    heads = call.result.shape[-3] if call.result.ndim > 2 else 1
    if ids.ndim > 2 and ids.shape[-3] not in (1, heads):  # grouped-query attention
        ids = ids.repeat_interleave(heads // ids.shape[-3], dim=-3)
    return Activation(ids.expand(call.result.shape))


RULES: dict[str, Rule] = {
    "linear": linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "__matmul__"), matmul),
    **dict.fromkeys(("addmm", "baddbmm"), addmm),
    "einsum": einsum,
    "scaled_dot_product_attention": attention,
}
