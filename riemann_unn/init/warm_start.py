"""Warm start: the nearest points on their manifolds to the weights a model has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..diagnostics import orthogonality_error
from ..errors import ManifoldError, OffManifoldError
from ..tagging import manifold_of, tagged_parameters

__all__ = ["WarmStart", "warm_start_"]


@dataclass(frozen=True)
class WarmStart:
    """What :func:`warm_start_` did to one parameter.

    Attributes:
        distance: relative distance moved, ‖W - U‖ / ‖W‖.
        error_before: orthogonality error of the weights as they were.
        error_after: orthogonality error of the weights as they are.
    """

    distance: float
    error_before: float
    error_after: float


@torch.no_grad()
def warm_start_(target: nn.Module | nn.Parameter) -> dict[str, WarmStart]:
    r"""Move every tagged parameter to the nearest point of its manifold, in place.

    .. math:: U = \arg\min_{U^H U = I} \|W - U\|_F = W (W^H W)^{-1/2}

    Trained weights so keep as much of what they learned as the constraint
    allows; a weight that is on its manifold already moves by rounding only.

    Args:
        target: a module with tagged parameters, or one tagged parameter.

    Returns:
        For each parameter, by name, the distance moved and the orthogonality
        errors before and after. If one fails, none is changed.

    Raises:
        ManifoldError: nothing is tagged.
        OffManifoldError: weights with NaN or infinity, which no point is near to.

    Reference:
        Chang, "A projection algorithm for the unitary weights" (2021), for the
        warm start; Higham (2008), chapter 8, for the nearest unitary matrix.
    """
    if isinstance(target, nn.Module):
        tagged = tagged_parameters(target)
    else:
        tagged = [("parameter", target)] if manifold_of(target) is not None else []
    if not tagged:
        raise ManifoldError("nothing is tagged; tag parameters with riemann_unn.tag_ first")
    points: list[tuple[str, nn.Parameter, Tensor]] = []
    for name, p in tagged:
        manifold = manifold_of(p)
        assert manifold is not None
        if not torch.isfinite(p).all():
            raise OffManifoldError(
                f"{name!r} holds NaN or infinity, so no point of {manifold!r} is nearest; "
                "initialise it again. No parameter was changed"
            )
        points.append((name, p, manifold.projx(p.detach())))
    report = {}
    for name, p, point in points:
        before = float(orthogonality_error(p))
        size = torch.linalg.vector_norm(p).clamp_min(torch.finfo(p.dtype).tiny)
        distance = float(torch.linalg.vector_norm(p - point) / size)
        p.copy_(point)
        report[name] = WarmStart(distance, before, float(orthogonality_error(p)))
    return report
