"""Initial recurrences: initial values of recurrent matrices on the orthogonal or unitary group.

Every family is a function ``(n, dtype, device) -> (n, n)`` matrix, real or complex by ``dtype``,
drawn from torch's global generator. The families differ in their spectrum on the unit circle, which
determines how a linear recurrence remembers:

========== ======================================= =========================================
family     real                                    complex
========== ======================================= =========================================
henaff     2x2 rotations, angles U(-pi, pi)        diagonal phases, angles U(-pi, pi)
cayley     2x2 rotations, angles U(0, pi/2)        diagonal phases, angles U(-pi/2, pi/2)
slow       2x2 rotations, angles U(0, 0.1)         diagonal phases, angles U(-0.1, 0.1)
haar       uniform on O(n)                         uniform on U(n)
identity   the identity                            the identity
========== ======================================= =========================================

An odd real size ends in a single 1 on the diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..manifolds import Orthogonal, Unitary

__all__ = [
    "RECURRENCES",
    "cayley_recurrence",
    "gate_inputs_",
    "haar",
    "henaff",
    "identity",
    "slow",
]

_SLOW = 0.1  # radians

Recurrence = Callable[[int, torch.dtype, "torch.device | None"], Tensor]


def henaff(n: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Rotations of coordinate planes, by angles uniform on the circle.

    Real: ``blockdiag(R(t_1), R(t_2), ...)`` with ``t ~ U(-pi, pi)``; complex: ``diag(e^{i t})``.

    Args:
        n: Size of the matrix.
        dtype: Real or complex type of the result.
        device: Where to create it.

    Reference:
        Henaff, Szlam, LeCun, "Recurrent Orthogonal Networks and Long-Memory Tasks", ICML 2016.
    """
    count = n if dtype.is_complex else n // 2
    angles = torch.empty(count, dtype=dtype.to_real(), device=device).uniform_(-math.pi, math.pi)
    return _from_angles(angles, n, dtype)


def cayley_recurrence(n: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Cayley transform of random 2x2 skew blocks: rotations by less than a right angle.

    ``(I + A)^{-1} (I - A)`` with blocks ``[[0, s], [-s, 0]]``, ``s = sqrt((1 - cos t) / (1 + cos
    t))`` and ``t ~ U(0, pi/2)``. As ``s = tan(t/2)`` each block is exactly the rotation by ``t``,
    and is written down as such. The complex analogue ``diag(e^{i t})`` takes ``t ~ U(-pi/2,
    pi/2)``, the same spectrum as the conjugate pairs of the real one.

    Args:
        n: Size of the matrix.
        dtype: Real or complex type of the result.
        device: Where to create it.

    Reference:
        Helfrich, Willmott, Ye, "Orthogonal Recurrent Neural Networks with Scaled Cayley Transform",
        ICML 2018, initialization of the skew-symmetric matrix (their diagonal scaling is the
        identity here).
    """
    count, low = (n, -math.pi / 2) if dtype.is_complex else (n // 2, 0.0)
    angles = torch.empty(count, dtype=dtype.to_real(), device=device).uniform_(low, math.pi / 2)
    return _from_angles(angles, n, dtype)


def slow(n: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Rotations by at most a tenth of a radian, for states that ReLU must not erase.

    A state of two positive coordinates that is rotated by t a step loses one of them to ReLU after
    at most a quarter turn; the share of a coordinate after T steps is ``cos(t)^T``.

    Args:
        n: Size of the matrix.
        dtype: Real or complex type of the result.
        device: Where to create it.
    """
    count, low = (n, -_SLOW) if dtype.is_complex else (n // 2, 0.0)
    angles = torch.empty(count, dtype=dtype.to_real(), device=device).uniform_(low, _SLOW)
    return _from_angles(angles, n, dtype)


def haar(n: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """A uniformly random orthogonal or unitary matrix.

    Args:
        n: Size of the matrix.
        dtype: Real or complex type of the result.
        device: Where to create it.
    """
    manifold = Unitary() if dtype.is_complex else Orthogonal()
    sample: Tensor = manifold.random(n, n, dtype=dtype, device=device)
    return sample.detach()


def identity(n: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """The identity matrix.

    Args:
        n: Size of the matrix.
        dtype: Real or complex type of the result.
        device: Where to create it.
    """
    return torch.eye(n, dtype=dtype, device=device)


RECURRENCES: dict[str, Recurrence] = {
    "henaff": henaff,
    "cayley": cayley_recurrence,
    "slow": slow,
    "haar": haar,
    "identity": identity,
}
"""Every family by the name that ``OrthogonalRNN(init=...)`` takes."""


@torch.no_grad()
def gate_inputs_(rnn: nn.Module, scale: float = 8.0) -> None:
    """Make every other state a gate for the input, and the states between them a memory.

    In the first layer, input weights of even states are drawn from U(-scale, scale) and their
    biases are ``-scale``: with ReLU such a state is 0 unless several inputs of about 1 come
    together, as when a number is marked. Odd states have no input and no bias. With the rotations
    of ``init="slow"`` each odd state adds a small share of the gate before it, and keeps it, so
    that sums of gated inputs are a linear function of the last state from the start. The default
    scale compensates for the small share.

    All these weights act at every step of a sequence: give them, as the recurrence, a learning
    rate that is hundreds of times smaller than that of the readout.

    Args:
        rnn: An ``OrthogonalRNN`` with ReLU and biases.
        scale: Of the input weights.

    Raises:
        ValueError: If it has another nonlinearity or no biases: nothing would be gated.
    """
    nonlinearity, bias = getattr(rnn, "nonlinearity", None), getattr(rnn, "bias_ih_l0", None)
    if nonlinearity != "relu" or bias is None:
        raise ValueError(
            "gate_inputs_ needs an OrthogonalRNN with nonlinearity='relu' and bias=True, "
            f"got {nonlinearity=}, bias={bias is not None}"
        )
    weight = rnn.get_parameter("weight_ih_l0")
    weight.uniform_(-scale, scale)
    weight[1::2] = 0.0
    bias.zero_()
    bias[::2] = -scale


def _from_angles(angles: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """Diagonal phases if ``dtype`` is complex, else a block diagonal of 2x2 rotations."""
    if dtype.is_complex:
        return torch.diag(torch.polar(torch.ones_like(angles), angles))
    matrix = torch.eye(n, dtype=dtype, device=angles.device)
    even = torch.arange(0, 2 * len(angles), 2, device=angles.device)
    matrix[even, even] = matrix[even + 1, even + 1] = angles.cos()
    matrix[even, even + 1] = -angles.sin()
    matrix[even + 1, even] = angles.sin()
    return matrix
