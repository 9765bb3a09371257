"""The named algorithms: each is :class:`ManifoldOptimizer` with one φ."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .optimizer import ManifoldOptimizer

__all__ = ["Cayley", "Expm", "ProjUNND", "ProjUNNT"]


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


class Cayley(ManifoldOptimizer):
    r"""Steps along the tangent space by the Cayley transform, whole or of rank k.

    .. math:: X^+ = (I - \tfrac12 K)^{-1} (I + \tfrac12 K)\, X,
        \qquad K = \tfrac12 (\Delta X^H - X \Delta^H)

    With ``rank=None``, the default, Δ is taken whole: O(n³) for square
    matrices, O(n p²) for tall ones, for which nothing n by n is formed. With a
    rank k the inverse is that of a 2k by 2k core, by the Sherman-Morrison-Woodbury
    formula, at O(k n p). The transform agrees with the exponential to second
    order. Other arguments, errors and behaviour are those of
    :class:`ManifoldOptimizer`, but for ``phi``, which is fixed.

    Reference:
        Wen and Yin, "A feasible method for optimization with orthogonality
        constraints" (2013), section 2 and lemma 4.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        *,
        rank: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, phi="cayley", rank=rank, **options)


class Expm(ManifoldOptimizer):
    r"""Steps along the tangent space by the matrix exponential, whole or of rank k.

    .. math:: X^+ = \exp(K)\, X, \qquad K = \tfrac12 (\Delta X^H - X \Delta^H)

    With ``rank=None``, the default, Δ is taken whole: O(n³) for square
    matrices, O(n p²) for tall ones, for which nothing n by n is formed. With a
    rank k it is :class:`ProjUNNT`. Other arguments, errors and behaviour are
    those of :class:`ManifoldOptimizer`, but for ``phi``, which is fixed.

    Reference:
        Lezcano-Casado and Martínez-Rubio, "Cheap orthogonal constraints in
        neural networks" (2019), section 3.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        *,
        rank: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, phi="exp", rank=rank, **options)
