"""Layers whose recurrent weights are born on their manifold and tagged.

They are plain modules: train them with an optimizer from ``riemann_unn.optim`` and the tagged
weights stay orthogonal or unitary; nothing is added to the forward pass.
"""

from .activations import ModReLU
from .recurrent import OrthogonalRNN

__all__ = ["ModReLU", "OrthogonalRNN"]
