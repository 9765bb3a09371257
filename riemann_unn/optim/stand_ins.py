"""Stand-ins: plain tensors that a base optimizer sees in the place of parameters for one step.

Of a sharded parameter a base sees the local part, and so needs no operation that sharded tensors
lack; of one that it needs whole, all of it at one process and nothing at the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..interruption import restoring

__all__ = ["StandIn", "step_stand_ins"]


@dataclass(eq=False)
class StandIn:
    """What a base sees of a parameter.

    Args:
        param: the parameter.
        zeros: the tensor that the base displaces.
        gradient: the gradient to show.
        state: what the base keeps of the parameter, and after the step what it has made of it.
    """

    param: Tensor
    zeros: Tensor
    gradient: Tensor
    state: dict[str, Any]


def step_stand_ins(base: Optimizer, stand_ins: Sequence[StandIn], step: Callable[[], None]) -> None:
    """Step a base that has stand-ins in the place of parameters, in its groups and its state."""
    if not stand_ins:
        step()
        return
    lists = [(group["params"], list(group["params"])) for group in base.param_groups]
    params = {one.param: nn.Parameter(one.zeros, requires_grad=False) for one in stand_ins}

    def work() -> None:
        for one in stand_ins:
            params[one.param].grad = one.gradient
            if one.state:
                base.state[params[one.param]] = one.state
        for shown, own in lists:
            shown[:] = [params.get(p, p) for p in own]
        step()
        for one in stand_ins:
            one.state = dict(base.state.get(params[one.param], {}))

    def restore() -> None:
        for shown, own in lists:
            shown[:] = own
        for param in params.values():
            base.state.pop(param, None)

    restoring(work, restore)
