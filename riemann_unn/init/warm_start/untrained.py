"""Telling untrained weights, as initialisers draw them, from trained ones by singular values."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from ...linalg.procrustes import inner
from .matching import Placed

__all__ = ["random_gain", "set_initial_gains_"]

_NODES = 512
_SPREAD = 0.65  # standard deviation of the quotient below, for one singular value; measured
_DEVIATIONS = 3
_SHARPEST = 0.02  # a wider interval would accept trained weights


def random_gain(ratio: float) -> float:
    r"""Return :math:`\sum\sigma^3 / \sum\sigma^2`, in units of the root mean square of σ.

    For large matrices with independent entries, from Marchenko and Pastur's law.

    Args:
        ratio: the smaller over the larger dimension of the matrix.

    Reference:
        Bai and Silverstein, "Spectral analysis of large dimensional random matrices" (2010),
        chapter 3.
    """
    centre, half = 1 + ratio, 2 * math.sqrt(ratio)
    total = 0.0
    for k in range(1, _NODES + 1):  # Gauss's rule with a square root at both ends
        angle = k * math.pi / (_NODES + 1)
        total += math.sin(angle) ** 2 * math.sqrt(max(centre + half * math.cos(angle), 0.0))
    return total * half**2 / (2 * ratio * (_NODES + 1))


def set_initial_gains_(placed: Iterable[Placed]) -> bool:
    r"""Give untrained weights the gains that preserve the size of signals, :math:`\|W\|/\|U\|`.

    The inputs of a trained layer lie along the directions in which it is large; those of an
    untrained one along all directions alike, and gains for the former would make signals grow from
    layer to layer. The test is over all weights together; they count as trained where they are too
    few or too small to decide.

    Returns:
        Whether the weights are untrained.
    """
    total, off, count = 0, 0.0, 0
    sizes: list[tuple[Placed, float]] = []
    for item in placed:
        matrices = item.manifold.to_matrices(item.weight)
        short, long = sorted(matrices.shape[-2:])
        if short == 0 or not item.gain > 0:
            return False
        size = _length(item.weight) / _length(item.point)
        many = matrices.numel() // long
        off += many * (item.gain / size / random_gain(short / long) - 1)
        total, count = total + many, count + 1
        sizes.append((item, size))
    tolerance = _DEVIATIONS * _SPREAD * math.sqrt(count) / max(total, 1)
    if tolerance > _SHARPEST or abs(off) > tolerance * total:
        return False
    for item, size in sizes:
        item.gain = size
    return True


def _length(x: Tensor) -> float:
    return math.sqrt(inner(x, x))
