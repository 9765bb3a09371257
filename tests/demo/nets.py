"""Nets of the demos, few and small."""

from __future__ import annotations

from torch import nn

import riemann_unn as ru
from riemann_unn.demo import warmstart


def small_nets() -> tuple[warmstart.Net, warmstart.Net]:
    """A net of few weights beside the small residual one, of the demo of warm starts."""
    deep = warmstart.Net(
        "deep net",
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)),
        {"1.weight": ru.Stiefel()},
        1,
    )
    residual = warmstart.Net(
        "residual net", lambda: warmstart._residual_net(3), warmstart.NETS[1].tags, 1
    )
    return deep, residual
