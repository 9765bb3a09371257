"""The tag itself: an attribute of the parameter, and a class that carries it through copies."""

from __future__ import annotations

import geoopt
from torch import Tensor, nn

from ..manifolds import MatrixManifold, Stiefel
from .foreign_optimizers import watch_foreign_optimizers

__all__ = ["drop_tag_", "is_constrained", "manifold_of", "name_of", "set_tag_"]

_ATTRIBUTE = "manifold"
_STIEFEL = Stiefel()
_NAME = "tagged_as"  # for messages only: deepcopy drops it, unlike the manifold


def set_tag_(p: nn.Parameter, manifold: MatrixManifold, name: str | None = None) -> None:
    """Write a tag; nothing is checked."""
    # The class keeps the tag through deepcopy and pickle, which drop plain attributes; the object
    # stays the one that modules have registered. A tensor of another class, such as a DTensor, gets
    # the attribute alone.
    if type(p) is nn.Parameter:
        p.__class__ = geoopt.ManifoldParameter
    setattr(p, _ATTRIBUTE, manifold)
    if name is not None:
        setattr(p, _NAME, name)
    watch_foreign_optimizers()


def drop_tag_(p: Tensor) -> None:
    """Remove a tag; a parameter without one does not change."""
    if manifold_of(p) is None:
        return
    for attribute in (_ATTRIBUTE, _NAME):
        if hasattr(p, attribute):
            delattr(p, attribute)
    if type(p) is geoopt.ManifoldParameter:
        p.__class__ = nn.Parameter


def manifold_of(p: Tensor) -> MatrixManifold | None:
    """Return the manifold a tensor is tagged with, or None.

    A parameter on one of geoopt's own Stiefel manifolds counts as tagged ``Stiefel()``: their
    constraint is the same, and the optimizers here step it alike. ``p.manifold`` stays what it is.
    """
    manifold = getattr(p, _ATTRIBUTE, None)
    if isinstance(manifold, geoopt.Stiefel):
        return _STIEFEL
    return manifold if isinstance(manifold, MatrixManifold) else None


def name_of(p: Tensor) -> str | None:
    """Return the name a parameter was tagged under, if known."""
    name: str | None = getattr(p, _NAME, None)
    return name


def is_constrained(p: Tensor) -> bool:
    """Tell whether a tensor is on any manifold, geoopt's own included."""
    manifold = getattr(p, _ATTRIBUTE, None)
    return isinstance(manifold, geoopt.Manifold) and not isinstance(manifold, geoopt.Euclidean)
