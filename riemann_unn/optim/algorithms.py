"""The named algorithms: each is :class:`ManifoldOptimizer` with one φ."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .optimizer import ManifoldOptimizer

__all__ = ["Cayley", "Expm", "ProjUNND", "ProjUNNT"]


class ProjUNNT(ManifoldOptimizer):
    r"""ProjUNN-T: a step of rank k in the tangent space, by the exponential map.

    .. math:: X^+ = X \exp(-\mathrm{lr}\,\Omega_k), \qquad
        \Omega_k \approx \Omega = \tfrac12 (X^H G - G^H X)

    Cost O(k n p) for an (n, p) parameter. Arguments, errors and behaviour are those of
    :class:`ManifoldOptimizer`, but for ``phi``, which is fixed.

    Reference:
        Kiani et al., "projUNN" (2022), algorithm projUNN-T, section 4; its sketches of the
        Euclidean gradient are ``sketch="lsi"`` and ``"column"``.
    """

    def __init__(self, params: Iterable[Any], lr: float | Tensor, **options: Any) -> None:
        super().__init__(params, lr, phi="exp", **options)


class ProjUNND(ManifoldOptimizer):
    r"""ProjUNN-D: a step of rank k straight ahead, then back by the nearest unitary matrix.

    .. math:: X^+ = X \operatorname{polar}(I - \mathrm{lr}\,\Omega_k)

    of square X the polar factor of :math:`X - \mathrm{lr}\,X \Omega_k`. Cost and arguments are
    those of :class:`ProjUNNT`.

    Reference:
        Kiani et al., "projUNN" (2022), algorithm projUNN-D, section 4.
    """

    def __init__(self, params: Iterable[Any], lr: float | Tensor, **options: Any) -> None:
        super().__init__(params, lr, phi="polar", **options)


class Cayley(ManifoldOptimizer):
    r"""Steps in the tangent space by the Cayley transform, whole or of rank k.

    .. math:: X^+ = X\,(I - \tfrac12 K)^{-1} (I + \tfrac12 K), \qquad K = -\mathrm{lr}\,\Omega

    With ``rank=None``, the default, O(n³) for square matrices, O(n p²) for tall ones, for which
    nothing n by n is formed; with a rank k O(k n p). The transform agrees with the exponential to
    second order. Other arguments are those of :class:`ManifoldOptimizer`.

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
    r"""Steps in the tangent space by the matrix exponential, whole or of rank k.

    .. math:: X^+ = X \exp(-\mathrm{lr}\,\Omega)

    As :class:`Cayley`; with a rank k it is :class:`ProjUNNT`.

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
