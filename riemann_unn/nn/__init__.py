"""Layers whose weights are initialised on their manifold and tagged, and activations for them.

They are plain modules: train them with an optimizer from ``riemann_unn.optim`` and the tagged
weights stay orthogonal or unitary; nothing is added to the forward pass.
"""

from .activations import ModReLU, PhaseSigmoid
from .conv import CircularConv1d, CircularConv2d, CircularConv3d
from .conv_recurrent import ConvRNN
from .lipschitz import GroupSort, certified_radius
from .low_rank import LowRankLinear
from .low_rank_conv import LowRankConv2d
from .low_rank_convs import (
    LowRankConv1d,
    LowRankConv3d,
    LowRankConvTranspose1d,
    LowRankConvTranspose2d,
    LowRankConvTranspose3d,
)
from .recurrence_init import gate_inputs_
from .recurrent import OrthogonalRNN

__all__ = [
    "CircularConv1d",
    "CircularConv2d",
    "CircularConv3d",
    "ConvRNN",
    "GroupSort",
    "LowRankConv1d",
    "LowRankConv2d",
    "LowRankConv3d",
    "LowRankConvTranspose1d",
    "LowRankConvTranspose2d",
    "LowRankConvTranspose3d",
    "LowRankLinear",
    "ModReLU",
    "OrthogonalRNN",
    "PhaseSigmoid",
    "certified_radius",
    "gate_inputs_",
]
