"""Recipes: how each package trains a net with one orthogonal recurrence and free weights."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import riemann_unn as ru
from riemann_unn.demo.models import SequenceModel

__all__ = ["RECIPES", "Recipe"]

Optimizers = list[torch.optim.Optimizer]

# The recurrence acts at every step, so its gradient is larger.
_SLOWDOWN = 32


class Recipe:
    """A name and a way to make the optimizers; the recurrence takes 1/32 of the rate."""

    def __init__(
        self, name: str, build: Callable[[SequenceModel, float], Optimizers], needs: str = "torch"
    ) -> None:
        self.name, self.build, self.needs = name, build, needs

    def missing(self) -> str | None:
        return None if find_spec(self.needs) is not None else f"{self.needs} is not installed"


def _groups(model: SequenceModel, lr: float) -> list[dict[str, Any]]:
    """Parameter groups of the recurrence, or its parametrization, and of the other weights."""
    slow = [p for name, p in model.named_parameters() if "weight_hh" in name]
    ids = {id(p) for p in slow}
    free = [p for p in model.parameters() if id(p) not in ids]
    return [{"params": slow, "lr": lr / _SLOWDOWN}, {"params": free}]


def _untagged(model: SequenceModel) -> Tensor:
    """Remove the tag of the recurrence, for packages with their own constraint."""
    weight = model.rnn.weight_hh_l0
    assert isinstance(weight, Tensor)
    return ru.untag_(weight)


def _ours(kind: str, **options: Any) -> Callable[[SequenceModel, float], Optimizers]:
    def build(model: SequenceModel, lr: float) -> Optimizers:
        return [getattr(ru.optim, kind)(_groups(model, lr), lr=lr, **options)]

    return build


def _unconstrained(model: SequenceModel, lr: float) -> Optimizers:
    _untagged(model)
    return [torch.optim.Adam(_groups(model, lr), lr=lr, fused=True)]


def _geoopt(model: SequenceModel, lr: float) -> Optimizers:
    import geoopt

    start = _untagged(model).detach()
    manifold = geoopt.Stiefel(canonical=False)
    model.rnn.weight_hh_l0 = geoopt.ManifoldParameter(start, manifold=manifold)
    return [geoopt.optim.RiemannianAdam(_groups(model, lr), lr=lr)]


def _pogo(model: SequenceModel, lr: float) -> Optimizers:
    from pogo import POGO
    from pogo.base import VectorAdam

    _untagged(model)
    slow, free = _groups(model, lr)
    constrained = POGO(
        slow["params"], VectorAdam(), lr=slow["lr"], flatten_fn=lambda x: x.unsqueeze(0)
    )
    return [constrained, torch.optim.RMSprop(free["params"], lr=lr)]


def _parametrized(model: SequenceModel, lr: float) -> Optimizers:
    _untagged(model)
    rnn: Any = model.rnn
    nn.utils.parametrizations.orthogonal(rnn, "weight_hh_l0", orthogonal_map="cayley")
    # The layer looks its weights up by name, and torch finds no parameter by this one any more.
    rnn.get_parameter = lambda name: getattr(rnn, name)
    return [torch.optim.RMSprop(_groups(model, lr), lr=lr)]


_RMSPROP: dict[str, Any] = {"base": torch.optim.RMSprop}
RECIPES: list[Recipe] = [
    Recipe("unconstrained, Adam", _unconstrained),
    Recipe("ProjUNN-T, rank 1", _ours("ProjUNNT", rank=1)),
    Recipe("ProjUNN-T, rank 1, RMSprop base", _ours("ProjUNNT", rank=1, **_RMSPROP)),
    Recipe("ProjUNN-D, rank 1, RMSprop base", _ours("ProjUNND", rank=1, **_RMSPROP)),
    Recipe("Cayley, dense, RMSprop base", _ours("Cayley", **_RMSPROP)),
    Recipe("geoopt Adam, QR", _geoopt, "geoopt"),
    Recipe("POGO, its Adam", _pogo, "pogo"),
    Recipe("parametrization, cayley, RMSprop", _parametrized),
]
