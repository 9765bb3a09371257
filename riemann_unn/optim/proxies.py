"""Proxies: plain tensors that replace shared parameters in the base for one step.

A base sees the local part of a sharded parameter, so it needs no operation that sharded tensors
lack; where it needs whole matrices it sees all of the parameter on one process, none on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..interruption import restoring

__all__ = ["Proxy", "step_proxies"]


@dataclass(eq=False)
class Proxy:
    """What a base sees in the place of a parameter.

    Args:
        param: the parameter.
        zeros: the tensor that the base displaces.
        gradient: the gradient to show.
        state: the base's state of the parameter, before and after the step.
    """

    param: Tensor
    zeros: Tensor
    gradient: Tensor
    state: dict[str, Any]


def step_proxies(base: Optimizer, proxies: Sequence[Proxy], step: Callable[[], None]) -> None:
    """Step a base with proxies in the place of parameters, in its groups and its state."""
    if not proxies:
        step()
        return
    lists = [(group["params"], list(group["params"])) for group in base.param_groups]
    params = {one.param: nn.Parameter(one.zeros, requires_grad=False) for one in proxies}

    def work() -> None:
        for one in proxies:
            params[one.param].grad = one.gradient
            if one.state:
                base.state[params[one.param]] = one.state
        for shown, own in lists:
            shown[:] = [params.get(p, p) for p in own]
        step()
        for one in proxies:
            one.state = dict(base.state.get(params[one.param], {}))

    def restore() -> None:
        for shown, own in lists:
            shown[:] = own
        for param in params.values():
            base.state.pop(param, None)

    restoring(work, restore)
