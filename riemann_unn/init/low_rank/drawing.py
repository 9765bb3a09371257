"""Drawing new dense weights, before they are split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .followers import Follower
from .targets import Target

__all__ = ["Draw", "drawn"]

Draw = str | Callable[[Tensor], Any]


def drawn(layer: Target, draw: Draw, follower: Follower) -> Tensor:
    """Return a new weight, in the layout that torch's initialisers expect."""
    weight = layer.blank()
    if callable(draw):
        draw(weight)
    elif draw == "default":
        nn.init.kaiming_uniform_(weight, a=5**0.5)
    else:
        function = getattr(nn.init, f"{draw}_", None)
        if function is None:
            raise ValueError(
                f"{draw=} is no initialiser: use 'default', a name of torch.nn.init without its "
                "underscore such as 'kaiming_normal', or a function that fills a weight in place"
            )
        if draw.startswith("kaiming"):
            linear = follower.activation.slope == 1.0
            function(weight, nonlinearity="linear" if linear else "relu")
        else:
            function(weight)
    return weight
