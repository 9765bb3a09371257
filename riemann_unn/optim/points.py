"""Points: the tagged parameters of an optimizer, their names, and the checks they must pass."""

from __future__ import annotations

import cmath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import geoopt
import torch
from torch import Tensor

from ..errors import ManifoldError, ManifoldTypeError
from ..manifolds import MatrixManifold, Stiefel
from ..tagging import manifold_of

__all__ = ["Point", "as_groups", "check_duplicates", "check_kind", "nonfinite", "tagged_points"]


@dataclass(eq=False)
class Point:
    """A tagged parameter in its group, under the name that messages give it.

    ``value`` is what moves: the parameter's own memory, or the master copy in
    single precision of a parameter that is stored in half.
    """

    name: str
    param: Tensor
    group: dict[str, Any]
    manifold: MatrixManifold
    value: Tensor

    @property
    def is_half(self) -> bool:
        """Whether the parameter is stored too coarsely to be a point itself."""
        return self.param.dtype in (torch.float16, torch.bfloat16)

    @property
    def grad(self) -> Tensor:
        """The parameter's gradient, which the caller knows to be there."""
        assert self.param.grad is not None
        return self.param.grad

    def matrices(self, x: Tensor) -> Tensor:
        """Return the manifold's matrix view of a tensor of the parameter's shape."""
        return self.manifold.to_matrices(x)


def tagged_points(groups: list[dict[str, Any]]) -> Iterator[Point]:
    """Go through the tagged parameters of some groups.

    Raises:
        ManifoldTypeError: a parameter is on a manifold this package does not
            know, so that it would be trained as if it were on none.
    """
    for index, group in enumerate(groups):
        names = group.get("param_names")
        for i, p in enumerate(group["params"]):
            manifold = manifold_of(p) or _same_as(getattr(p, "manifold", None))
            if manifold is not None:
                given = names[i] if names else getattr(p, "tagged_as", None)
                where = f"param_groups[{index}]['params'][{i}] of shape {tuple(p.shape)}"
                yield Point(where if given is None else repr(given), p, group, manifold, p.detach())
                continue
            foreign = getattr(p, "manifold", None)
            if isinstance(foreign, geoopt.Manifold) and not isinstance(foreign, geoopt.Euclidean):
                raise ManifoldTypeError(
                    f"a parameter of shape {tuple(p.shape)} is on {foreign!r}, which is not a "
                    "manifold of this package, so it would be trained unconstrained; tag it with "
                    "riemann_unn.tag_"
                )


def _same_as(manifold: object) -> MatrixManifold | None:
    """Return ours for geoopt's Stiefel manifolds: they ask the same of a point."""
    return Stiefel() if isinstance(manifold, geoopt.Stiefel) else None


def as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Return groups with their parameters in lists; the caller's dicts are left as they are."""
    if isinstance(params, Tensor):
        raise ManifoldTypeError(
            "params must be an iterable of parameters or groups, not one tensor"
        )
    items = list(params)
    if not items:
        raise ManifoldError("the optimizer got an empty parameter list")
    groups = [dict(g) for g in items] if isinstance(items[0], dict) else [{"params": items}]
    for group in groups:
        given = group["params"]
        if not isinstance(given, set):  # torch refuses sets with a message of its own
            group["params"] = [given] if isinstance(given, Tensor) else list(given)
    return groups


def check_duplicates(params: Iterable[Any]) -> None:
    """Refuse a list of parameters, or of names with parameters, that holds one twice.

    Raises:
        ManifoldError: naming the parameter.
    """
    seen: set[int] = set()
    for i, item in enumerate(params):
        p = item[1] if isinstance(item, tuple) else item
        if id(p) in seen:
            name = repr(item[0]) if isinstance(item, tuple) else f"number {i}"
            raise ManifoldError(
                f"parameter {name} is given twice and would be moved twice a step; give it once"
            )
        seen.add(id(p))


def check_kind(point: Point) -> None:
    """Refuse a parameter whose shape or dtype its manifold does not take.

    Raises:
        ManifoldError: naming the parameter.
    """
    reason = point.manifold.why_not(point.param.shape, point.param.dtype)
    if reason is not None:
        raise ManifoldError(f"{point.name} is tagged {point.manifold!r} but {reason}")


def nonfinite(points: list[Point], tensors: list[Tensor]) -> list[Point]:
    """Return the points whose tensor holds NaN or infinity, after one quick look at all."""
    pairs = [(point, t) for point, t in zip(points, tensors, strict=True) if t.numel() > 0]
    if not pairs:
        return []
    # The sum of a finite tensor can overflow, so it only clears, never accuses.
    sums = [t.sum() for _, t in pairs]
    if len(sums) > 4 and len({(t.device, t.dtype) for t in sums}) == 1:
        sums = [torch.stack(sums).sum()]
    if all(cmath.isfinite(t.item()) for t in sums):
        return []
    return [point for point, t in pairs if not bool(torch.isfinite(t).all())]
