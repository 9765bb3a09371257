"""Stand-ins: plain local tensors that a base optimizer sees in the place of sharded parameters.

The base then needs no operation that sharded tensors lack, and its state is sharded like them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ManifoldTypeError
from ..parallel import local_part, sharded_like

__all__ = ["OWN_STATE", "check_elementwise", "standing_in"]

# What an optimizer of ours keeps of a parameter beside the base.
OWN_STATE = ("retraction_step", "master", "sketch_directions")

_ELEMENTWISE = {
    "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop",
    "SGD",
}  # fmt: skip


def check_elementwise(base: type[Optimizer], name: str) -> None:
    """Refuse a base that would do otherwise on the parts of a matrix than on the whole.

    Raises:
        ManifoldTypeError: it is not of those of torch.optim that are known to be elementwise, and
            does not say ``is_elementwise = True``.
    """
    known = any(
        cls.__module__.startswith("torch.optim") and cls.__name__ in _ELEMENTWISE
        for cls in base.__mro__
    )
    if not getattr(base, "is_elementwise", known):
        raise ManifoldTypeError(
            f"{name} is sharded, and base={base.__name__} is not known to move each entry by its "
            "own gradient alone, so that its parts would not move as the whole; use one that does, "
            "such as Adam, or set is_elementwise = True in a class of your own that does"
        )


@contextmanager
def standing_in(base: Optimizer, shown: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Iterator[None]:
    """Let a base step plain tensors in the place of parameters, for the time of a context.

    Args:
        base: the optimizer.
        shown: sharded parameters, each with local zeros that the base displaces, and the local
            part of the gradient to show.
    """
    if not shown:
        yield
        return
    lists = [(group["params"], list(group["params"])) for group in base.param_groups]
    kept = [(p, base.state[p]) for p, _, _ in shown if p in base.state]
    stands = {p: nn.Parameter(zeros, requires_grad=False) for p, zeros, _ in shown}

    def restore() -> None:
        for params, own in lists:
            params[:] = own
        for stand in stands.values():
            base.state.pop(stand, None)

    try:
        try:
            for p, state in kept:
                base.state[stands[p]] = {
                    key: local_part(value) if isinstance(value, Tensor) else value
                    for key, value in state.items()
                    if key not in OWN_STATE
                }
            for p, _, gradient in shown:
                stands[p].grad = gradient
            for params, own in lists:
                params[:] = [stands.get(p, p) for p in own]
            yield
            for p, stand in stands.items():
                if stand in base.state:
                    _keep(base.state[p], base.state[stand], p, stand)
        finally:
            restore()
    finally:
        restore()


def _keep(state: dict[str, Any], found: dict[str, Any], p: Tensor, stand: Tensor) -> None:
    """Take over what a base has kept of a stand-in: tensors of its shape are sharded like p."""
    for key, value in found.items():
        is_part = isinstance(value, Tensor) and value.shape == stand.shape
        old = state.get(key)
        if is_part and isinstance(old, Tensor) and local_part(old).is_set_to(value):
            continue
        state[key] = sharded_like(value, p) if is_part else value
