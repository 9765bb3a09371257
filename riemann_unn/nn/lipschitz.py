"""Layers of 1-Lipschitz networks, and certificates from their margins."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["GroupSort", "certified_radius"]


class GroupSort(nn.Module):
    r"""Sort the channels within groups: an activation that keeps the norm of its gradient.

    .. math:: (y_{gk+1} \le \dots \le y_{gk+k}) = \operatorname{sort}(x_{gk+1}, \dots, x_{gk+k})

    It permutes, so it is 1-Lipschitz and neither loses nor adds norm; between orthogonal layers
    it makes networks 1-Lipschitz that can approximate any 1-Lipschitz function.

    Args:
        group_size: channels in a group; 2 is MaxMin.
        dim: the dimension of the channels.

    Shapes: any real tensor whose size along ``dim`` is a multiple of ``group_size``.

    Raises:
        ValueError: ``group_size`` is below 1 or does not divide the channels.

    Reference:
        Anil, Lucas and Grosse, "Sorting out Lipschitz function approximation" (2019), section 4.
    """

    def __init__(self, group_size: int = 2, dim: int = 1) -> None:
        super().__init__()
        if group_size < 1:
            raise ValueError(f"{group_size=} must be at least 1")
        self.group_size, self.dim = group_size, dim

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation.

        Args:
            input: a real tensor.
        """
        channels = input.shape[self.dim]
        if channels % self.group_size:
            raise ValueError(f"{channels} channels do not divide into groups of {self.group_size}")
        dim = self.dim % input.ndim
        groups = input.unflatten(dim, (-1, self.group_size))
        ordered: Tensor = groups.sort(dim=dim + 1).values
        return ordered.flatten(dim, dim + 1)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"group_size={self.group_size}, dim={self.dim}"


def certified_radius(
    logits: Tensor, labels: Tensor | None = None, *, lipschitz: float = 1.0
) -> Tensor:
    r"""Return how far an input may move, in the 2-norm, before its class can change.

    .. math:: r = \frac{\max(0,\; f_y(x) - \max_{j \ne y} f_j(x))}{\sqrt2\, L}

    for a network f that is L-Lipschitz: a difference of two logits is
    :math:`\sqrt2 L`-Lipschitz. The share of inputs with a radius above ε is the certified
    robust accuracy at ε, against every attack of that size.

    Args:
        logits: shape ``(..., classes)``, at least two.
        labels: the true classes ``(...)``: wrong answers then have radius 0. By
            default the class that the logits choose.
        lipschitz: the constant L of the network, 1 if all its layers are orthogonal.

    Returns:
        Radii, shape ``(...)``.

    Raises:
        ValueError: there are fewer than two classes, or ``lipschitz`` is not positive.

    Reference:
        Tsuzuku, Sato and Sugiyama, "Lipschitz-margin training" (2018), proposition 1.
    """
    if logits.shape[-1] < 2:
        raise ValueError(f"at least two classes are needed, got {tuple(logits.shape)}")
    if not lipschitz > 0:
        raise ValueError(f"{lipschitz=} must be positive")
    chosen = logits.argmax(-1) if labels is None else labels
    right = logits.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    others = logits.scatter(-1, chosen.unsqueeze(-1), -torch.inf).amax(-1)
    radius: Tensor = (right - others).clamp_min(0) / (math.sqrt(2) * lipschitz)
    return radius
