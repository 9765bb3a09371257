"""Bases: which classes of ``torch.optim`` are supported, and how a displacement is computed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from inspect import signature
from itertools import repeat
from numbers import Real
from operator import attrgetter
from typing import Any

from torch import Tensor
from torch.optim import SGD, Optimizer

from ..errors import ManifoldTypeError, NonFiniteError
from ..interruption import each, restoring, undoing, without_torch_function

__all__ = [
    "can_be_captured",
    "check_base",
    "check_rates",
    "check_sharded",
    "displace_",
    "is_plain_sgd",
    "kept_whole",
    "plain_scale",
]

# Getters and setters in C: an interruption cannot come between one parameter and the next.
_VALUE, _GRAD = attrgetter("data"), attrgetter("grad")
_SET_VALUE = Tensor.data.__set__  # type: ignore[attr-defined]
_SET_GRAD = Tensor.grad.__set__  # type: ignore[union-attr]
_REFUSED = {
    "SparseAdam": "it takes sparse gradients only, and a manifold step is dense",
}


def check_base(base: object, manifold_optimizer: type[Optimizer]) -> None:
    """Refuse a base that is no optimizer class, or cannot work on displacements.

    Raises:
        ManifoldTypeError: naming the class and another to use.
    """
    if not (isinstance(base, type) and issubclass(base, Optimizer)):
        raise ManifoldTypeError(f"{base=} must be a class of torch.optim, such as torch.optim.Adam")
    if issubclass(base, manifold_optimizer):
        raise ManifoldTypeError(f"base={base.__name__} is a manifold optimizer already")
    if base.__name__ in _REFUSED:
        raise ManifoldTypeError(
            f"base={base.__name__} cannot be used: {_REFUSED[base.__name__]}; "
            "use another class of torch.optim, such as Adam"
        )


# Elementwise bases: the step of an entry depends on that entry's gradients alone.
_ELEMENTWISE = {
    "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop",
    "SGD",
}  # fmt: skip
# Bases that need whole matrices, with the entries of their state that have the matrix's shape.
_WHOLE = {"Muon": ("momentum_buffer",)}


def check_sharded(base: Optimizer, name: str) -> None:
    """Refuse a base whose step on the parts of a matrix differs from that on the whole.

    Raises:
        ManifoldTypeError: it is neither Muon nor one that is known to be elementwise, nor does it
            say ``is_elementwise = True``.
    """
    own = [cls.__name__ for cls in type(base).__mro__ if cls.__module__.startswith("torch.optim")]
    is_known = own[0] in _ELEMENTWISE or own[0] in _WHOLE
    if not getattr(base, "is_elementwise", is_known):
        raise ManifoldTypeError(
            f"{name} is sharded, and base={type(base).__name__} is not known to move each entry by "
            "its own gradient alone, so that parts would not move as the whole does; use one that "
            "does, such as Adam, or set is_elementwise = True in a class of your own that does"
        )


def kept_whole(base: Optimizer) -> tuple[str, ...] | None:
    """Return the matrix-shaped state entries of a base that needs whole matrices, else None."""
    names = (cls.__name__ for cls in type(base).__mro__)
    return next((_WHOLE[name] for name in names if name in _WHOLE), None)


def can_be_captured(base: type[Optimizer], groups: Iterable[dict[str, Any]]) -> bool:
    """Tell whether a base has an argument ``capturable`` that works where the parameters are."""
    has_it = "capturable" in signature(base).parameters
    params = (p[1] if isinstance(p, tuple) else p for group in groups for p in group["params"])
    return has_it and not any(isinstance(p, Tensor) and p.is_cpu for p in params)


def check_rates(
    groups: Iterable[dict[str, Any]], *, start: int = 0, reads_tensors: bool = True
) -> None:
    """Refuse a learning rate of NaN or infinity, which a base would write into every parameter.

    Args:
        groups: groups of parameters; those without a rate of their own are passed over.
        start: the index of the first.
        reads_tensors: whether to read tensors on the host.

    Raises:
        NonFiniteError: naming the group.
        ManifoldTypeError: a learning rate is no number.
    """
    for index, group in enumerate(groups, start):
        lr = group.get("lr", 0.0)
        # Reading a tensor on an accelerator would wait for it; the move is checked later.
        if lr is None or (isinstance(lr, Tensor) and not (lr.is_cpu and reads_tensors)):
            continue
        if not isinstance(lr, (Real, Tensor)):
            raise ManifoldTypeError(f"param_groups[{index}] has {lr=}, which is no number")
        if not math.isfinite(lr):
            raise NonFiniteError(
                f"param_groups[{index}] has lr={float(lr)}, which would move every parameter to "
                "NaN or infinity; set a finite learning rate. Nothing was changed"
            )


def is_plain_sgd(base: Optimizer, group: dict[str, object]) -> bool:
    """Tell whether the base moves by -lr times the gradient, so that it needs no zero tensors."""
    return type(base) is SGD and group["momentum"] == 0


def plain_scale(base: Optimizer, group: dict[str, Any]) -> float | Tensor | None:
    """Return the factor that plain SGD multiplies a gradient by; None for any other base."""
    if not is_plain_sgd(base, group):
        return None
    scale: float | Tensor = group["lr"] * (1 if group.get("maximize") else -1)
    return scale


def displace_(
    base: Optimizer,
    shown: Iterable[tuple[Tensor, Tensor, Tensor]],
    hidden: Iterable[Tensor],
    *arguments: Any,
) -> None:
    """Step a base on tangent coordinates in the place of tagged parameters, which do not change.

    Args:
        base: the optimizer; parameters that are neither shown nor hidden get its own step.
        shown: parameters, each with zeros that the base displaces, and the gradient to show.
        hidden: parameters whose gradient the base does not see.
        arguments: of the base's step.
    """
    shown = list(shown)
    members, zeros, gradients = zip(*shown, strict=True) if shown else ((), (), ())
    params = [*members, *hidden]
    values, grads = list(map(_VALUE, params)), list(map(_GRAD, params))

    def put_back() -> None:
        each(_SET_VALUE, params, values)
        each(_SET_GRAD, params, grads)

    def put_in_place() -> None:
        each(_SET_GRAD, params, repeat(None))
        each(_SET_VALUE, members, zeros)
        each(_SET_GRAD, members, gradients)

    def restore() -> None:
        without_torch_function(put_back)

    def step() -> None:
        without_torch_function(put_in_place)
        _unhooked_step(base, *arguments)

    restoring(step, restore)


def _unhooked_step(base: Optimizer, *arguments: Any) -> None:
    """Call the base's own step, without torch's hooks, which belong to the outer optimizer."""
    known = len(base.state)

    def drop_new_states() -> None:
        # New states may be incomplete, and the next step would not initialise them again.
        for p in list(base.state)[known:]:
            base.state.pop(p, None)

    step = type(base).step
    is_hooked = getattr(step, "hooked", False)
    own = partial(getattr(step, "__wrapped__", step), base) if is_hooked else base.step
    own = partial(own, *arguments)
    undoing(own, drop_new_states)
