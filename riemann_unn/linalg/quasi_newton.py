"""Quasi-Newton directions from a few pairs of steps and changes of the gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["is_curved", "quasi_newton_direction"]

# The least curvature of a pair, relative to ‖s‖ ‖y‖: above rounding.
_CAUTION = 1e-12


def is_curved(step: Tensor, change: Tensor) -> bool:
    r"""Tell whether the gradient grew along a step, so that the pair may enter the memory.

    .. math:: \langle s, y \rangle > 10^{-12}\, \|s\|\, \|y\|

    Args:
        step: s, shape ``(N,)``.
        change: y, of the same shape.

    Reference:
        Huang, Absil and Gallivan, "A Riemannian BFGS method without differentiated retraction for
        nonconvex optimization problems" (2018), for cautious updates on manifolds.
    """
    size = float(torch.linalg.vector_norm(step)) * float(torch.linalg.vector_norm(change))
    return float(step @ change) > _CAUTION * size > 0


def quasi_newton_direction(
    gradient: Tensor, steps: Sequence[Tensor], changes: Sequence[Tensor]
) -> Tensor:
    r"""Return -H g, H the inverse Hessian that k pairs imply: the recursion of two loops.

    .. math::

        H_{i+1} = (I - \rho_i s_i y_i^T)\, H_i\, (I - \rho_i y_i s_i^T) + \rho_i s_i s_i^T,
        \qquad \rho_i = 1 / \langle s_i, y_i \rangle, \qquad
        H_0 = \operatorname{median}_i
        \frac{\langle s_i, y_i \rangle}{\langle y_i, y_i \rangle}\, I

    The median over the pairs, in place of the last pair's scale, saves 3 to 5 percent of the
    evaluations on each of four tasks with twelve starts (bench/optimality).

    Args:
        gradient: g, shape ``(N,)``, real.
        steps: s, oldest first, k of shape ``(N,)``; none for -g itself.
        changes: y, as many, with :math:`\langle s_i, y_i \rangle > 0`.

    Reference:
        Nocedal, "Updating quasi-Newton matrices with limited storage" (1980); Huang, Gallivan and
        Absil, "A Broyden class of quasi-Newton methods for Riemannian optimization" (2015).
    """
    q = -gradient
    if len(steps) == 0:
        return q
    curvature = [s @ y for s, y in zip(steps, changes, strict=True)]
    weights: list[Tensor] = []
    for s, y, sy in reversed(list(zip(steps, changes, curvature, strict=True))):
        weights.append(s @ q / sy)
        q = torch.addcmul(q, weights[-1], y, value=-1)
    scales = [sy / (y @ y) for y, sy in zip(changes, curvature, strict=True)]
    q = q * torch.stack(scales).median()
    for s, y, sy, weight in zip(steps, changes, curvature, reversed(weights), strict=True):
        q = torch.addcmul(q, weight - y @ q / sy, s)
    return q
