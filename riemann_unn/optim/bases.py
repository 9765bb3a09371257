"""Bases: which classes of torch.optim can find the displacement, and how one is asked for it."""

from __future__ import annotations

from torch.optim import Optimizer

from ..errors import ManifoldTypeError

__all__ = ["check_base", "unhooked_step"]

_REFUSED = {
    "LBFGS": "it evaluates the loss several times in a step, away from the manifold",
    "SparseAdam": "it takes sparse gradients only, and a manifold step is dense",
}


def check_base(base: object, manifold_optimizer: type[Optimizer]) -> None:
    """Refuse what is no optimizer class, or one that cannot work on displacements.

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


def unhooked_step(base: Optimizer) -> None:
    """Call the base's own step; torch's hooks and profiling belong to the outer optimizer."""
    step = type(base).step
    getattr(step, "__wrapped__", step)(base) if getattr(step, "hooked", False) else base.step()
