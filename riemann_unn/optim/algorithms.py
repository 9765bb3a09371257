"""The named algorithms: each is :class:`ManifoldOptimizer` with one φ."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .optimizer import ManifoldOptimizer

__all__ = ["ProjUNND", "ProjUNNT"]


class ProjUNNT(ManifoldOptimizer):
    r"""ProjUNN-T: a rank-k step along the tangent space, by the exponential map.

    .. math:: X^+ = \exp\bigl(\tfrac12 (\Delta_k X^H - X \Delta_k^H)\bigr)\, X,
        \qquad \Delta_k = A B^H

    Cost O(k n p) for an (n, p) parameter. Arguments, errors and behaviour are
    those of :class:`ManifoldOptimizer`, but for ``phi``, which is fixed.

    Reference:
        Kiani et al., "projUNN" (2022), algorithm projUNN-T, section 4.
    """

    def __init__(self, params: Iterable[Any], lr: float | Tensor, **options: Any) -> None:
        super().__init__(params, lr, phi="exp", **options)


class ProjUNND(ManifoldOptimizer):
    r"""ProjUNN-D: a rank-k step straight ahead, then back by the nearest unitary matrix.

    .. math:: X^+ = \operatorname{polar}(X + \Delta_k)
        = (X + \Delta_k)\bigl((X + \Delta_k)^H (X + \Delta_k)\bigr)^{-1/2}

    Cost O(k n p) for an (n, p) parameter. Arguments, errors and behaviour are
    those of :class:`ManifoldOptimizer`, but for ``phi``, which is fixed.

    Reference:
        Kiani et al., "projUNN" (2022), algorithm projUNN-D, section 4.
    """

    def __init__(self, params: Iterable[Any], lr: float | Tensor, **options: Any) -> None:
        super().__init__(params, lr, phi="polar", **options)
