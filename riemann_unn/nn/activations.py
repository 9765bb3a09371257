"""Nonlinearities of the modulus that preserve the phase."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ModReLU", "PhaseSigmoid"]


class ModReLU(nn.Module):
    r"""ReLU of the modulus with a learned threshold, keeping the sign or phase.

    .. math:: \operatorname{modReLU}(z) = \frac{z}{|z|} \, \max(|z| + b, 0), \qquad
              \operatorname{modReLU}(0) = 0

    With ``b = 0`` it is the identity, so a network starts out norm-preserving. At ``z = 0`` the
    value and the gradients with respect to ``z`` and ``b`` are zero, never NaN; complex numbers
    smaller than ``sqrt(finfo.tiny)``, whose phase has no representable derivative, count as zero.

    Shape:
        Input and output ``(..., features)``, real or complex; ``bias`` is ``(features,)`` and real.

    Args:
        features: Size of the last dimension, one bias each.
        dtype: Data type of the input. The bias takes the real type of the same precision.
        device: Where to create the bias.

    Raises:
        ValueError: If ``features`` is not positive, or ``dtype`` is not floating or complex.

    Reference:
        Arjovsky, Shah, Bengio, "Unitary Evolution Recurrent Neural Networks", ICML 2016,
        section 4 (the definition of modReLU).
    """

    def __init__(
        self,
        features: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if features < 1:
            raise ValueError(
                f"features must be positive, got {features}: one bias is kept for each"
            )
        if not (dtype.is_floating_point or dtype.is_complex):
            raise ValueError(f"ModReLU needs a floating or complex dtype, got {dtype}")
        self.features = features
        self.bias = nn.Parameter(torch.empty(features, dtype=dtype.to_real(), device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the bias from U(-0.01, 0.01), close to the identity."""
        nn.init.uniform_(self.bias, -0.01, 0.01)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation.

        Args:
            input: Tensor ``(..., features)``.
        """
        if not input.is_complex():
            # A real sign is locally constant, so its derivative is not needed.
            return input.detach().sgn() * torch.relu(input.abs() + self.bias)
        # The phase's derivative is 1/|z|, which overflows to NaN before |z| reaches zero.
        smallest = torch.finfo(self.bias.dtype).tiny ** 0.5
        safe = torch.where(input.detach().abs() > smallest, input, 0)
        return safe.sgn() * torch.relu(safe.abs() + self.bias)

    def extra_repr(self) -> str:
        """Show the number of features."""
        return f"{self.features}"


class PhaseSigmoid(nn.Module):
    r"""A sigmoid of the modulus that keeps the sign or phase.

    .. math:: \varphi(z) = \frac{g z}{\sqrt{1 + |g z|^2}}

    The modulus stays below 1. With a gain g above 1 it converges to :math:`\sqrt{1 - g^{-2}}` when
    the map is repeated, so a state keeps its phases, while its moduli converge; with g = 1 they
    decay slowly to zero.

    Args:
        gain: g, positive.

    Shapes: any tensor, real or complex.

    Raises:
        ValueError: ``gain`` is not positive.

    Reference:
        Magnasco, "Convolutional unitary or orthogonal recurrent neural networks" (2023), for
        nonlinearities that preserve the phase.
    """

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        if not gain > 0:
            raise ValueError(f"{gain=} must be positive")
        self.gain = gain

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation.

        Args:
            input: any tensor.
        """
        z = self.gain * input
        power = (z * z.conj()).real if z.is_complex() else z * z
        return z * torch.rsqrt(1 + power)

    def extra_repr(self) -> str:
        """Show the gain."""
        return f"gain={self.gain}"
