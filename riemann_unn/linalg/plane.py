"""Steps of rank one: φ turns a plane, and the four numbers of that turn have a closed form."""

from __future__ import annotations

import cmath
import math
from typing import Any

import torch
from torch import Tensor

from .maps import Phi

__all__ = ["turn_of_plane"]


class _Numbers:
    """The functions of torch that this file calls, for one Python number instead of a tensor.

    A call of torch takes a hundred times as long as the arithmetic of one number.
    """

    sqrt, hypot, sin, arctan, exp = math.sqrt, math.hypot, math.sin, math.atan, cmath.exp

    @staticmethod
    def where(condition: bool, this: Any, that: Any) -> Any:
        return this if condition else that

    @staticmethod
    def conj(number: complex) -> complex:
        return number.conjugate()


def _skew_turn(xp: Any, corner: Any, beside: Any, phi: Phi) -> tuple[Any, ...]:
    """The entries of φ(K) - I for K = ½ [[2 i corner, beside], [-beside, 0]], two real numbers.

    K = i m I + r N with N² = -I, so that exp(K) = exp(i m) (cos r I + sin r N); the Cayley
    transform is the same of other angles.
    """
    middle = 0.5 * corner
    radius = xp.hypot(middle, 0.5 * beside)
    plus, minus = 0.5 * (middle + radius), 0.5 * (middle - radius)
    if phi == "cayley":
        plus, minus = xp.arctan(plus), xp.arctan(minus)
    drift, turn = plus + minus, plus - minus
    sine = xp.sin(turn) / xp.where(radius == 0, 1.0, radius)
    # The cosine minus one, without cancellation.
    half = xp.sin(0.5 * turn)
    fall = -2 * half * half
    lean, below = 1j * (sine * middle), -0.5 * sine * beside
    phase = xp.exp(1j * drift)
    rise = 2j * xp.sin(0.5 * drift) * xp.exp(0.5j * drift)  # the phase minus one
    return phase * (fall + lean) + rise, -phase * below, phase * below, phase * (fall - lean) + rise


def _real_turn(xp: Any, beside: Any, phi: Phi) -> tuple[Any, ...]:
    """The same where corner is zero: the turn of a real plane by one angle."""
    angle = 0.5 * beside
    if phi == "cayley":
        angle = 2 * xp.arctan(0.5 * angle)
    half, sine = xp.sin(0.5 * angle), xp.sin(angle)
    fall = -2 * half * half  # the cosine minus one, without cancellation
    return fall, sine, -sine, fall


def _polar_turn(xp: Any, corner: Any, beside: Any, special: bool) -> tuple[Any, ...]:
    """The entries of the polar factor of M = [[1 + corner, beside], [0, 1]], minus I.

    M + exp(i arg det M) adj(M)ᴴ is the polar factor times a number.
    """
    det = 1 + corner
    size = abs(det)
    phase = xp.where((size == 0) | special, 1.0, det / xp.where(size == 0, 1.0, size))
    first, second = det + phase, -phase * xp.conj(beside)
    length = xp.hypot(abs(first), abs(second))
    # Every rotation is as near as another to some reflections.
    first, length = xp.where(length == 0, 1.0, first), xp.where(length == 0, 1.0, length)
    first, second = first / length, second / length
    return first - 1, -phase * xp.conj(second), second, phase * xp.conj(first) - 1


def _turn(
    xp: Any, aa: Any, cc: Any, across: Any, *, phi: Phi, special: bool, is_complex: bool
) -> tuple[list[Any], Any]:
    """The entries of T, and how many times rounding they may be off."""
    a, c = xp.sqrt(aa), xp.sqrt(cc)
    # A vector that is zero has no direction, and turns nothing whichever it is given.
    a_unit = xp.where(a == 0, 1.0, a)
    cosine = across / (a_unit * c)
    size = abs(cosine)
    rest = 1 - size * size
    sine = xp.sqrt(xp.where((rest > 0) & (aa < math.inf), rest, math.nan))
    # In the orthonormal basis of the plane a is (a, 0), and c is (c cosine, c sine).
    corner, beside = a * c * xp.conj(cosine), a * c * sine
    if phi == "polar":
        entries = _polar_turn(xp, corner, beside, special)
    elif is_complex:
        entries = _skew_turn(xp, corner.imag, beside, phi)
    else:
        entries = _real_turn(xp, beside, phi)
    t00, t01, t10, t11 = entries
    # Back to the basis of a and c themselves.
    p, q = cosine / sine, 1 / sine
    m00, m01, m10, m11 = t00 - p * t10, t01 - p * t11, q * t10, q * t11
    p = xp.conj(p)
    back = [
        (m00 - p * m01) / (a_unit * a_unit),
        q * m01 / (a_unit * c),
        (m10 - p * m11) / (c * a_unit),
        q * m11 / (c * c),
    ]
    return back, q * q * xp.hypot(abs(t00), abs(t10))


def turn_of_plane(gram: Tensor, *, phi: Phi, special: bool = False) -> tuple[Tensor, float]:
    r"""Return the turn of a step of rank one in the basis of its two vectors.

    .. math:: Q\,\bigl(\varphi(Q^H a\, c^H Q) - I\bigr)\,Q^H = W T W^H, \qquad
        W = [a\; c], \quad Q = \operatorname{orth} W

    Args:
        gram: :math:`W^H W`, shape ``(..., 2, 2)``, in double precision.
        phi: which map, see :func:`unitary_core`.
        special: the nearest rotation for ``"polar"``.

    Returns:
        T of shape ``(..., 2, 2)``, and how many times rounding the turn may be off, at worst;
        not-a-number where the vectors are parallel.
    """
    options: dict[str, Any] = {"phi": phi, "special": special, "is_complex": gram.is_complex()}
    if gram.ndim == 2 and gram.device.type == "cpu" and not gram.requires_grad:
        (aa, across), (_, cc) = gram.tolist()
        try:
            entries, loss = _turn(_Numbers, aa.real, cc.real, across, **options)
        except (ArithmeticError, ValueError):  # beyond the range of numbers
            return torch.full_like(gram, math.nan), math.nan
        return torch.tensor([entries[:2], entries[2:]], dtype=gram.dtype), loss
    diagonal = gram.diagonal(dim1=-2, dim2=-1).real
    entries, loss = _turn(torch, diagonal[..., 0], diagonal[..., 1], gram[..., 0, 1], **options)
    stacked = torch.stack(entries, dim=-1).unflatten(-1, (2, 2))
    return stacked, float(loss.max())
