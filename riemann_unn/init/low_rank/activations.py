"""The activation of each layer, as given or as found in the model's graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...graph.inferred_input import inferred_input
from ...graph.isolation import without_weak_references
from ...graph.program import Program, read
from ...linalg import ACTIVATIONS
from ...linalg.low_rank.activation_kernel import as_activation
from ..calibration import Batch, Forward, batches_of, cannot_run
from ..recording import evaluating, same_buffers
from .followers import Follower, followers
from .plan import Candidates, by_pattern
from .problem import Method

__all__ = ["ActivationLike", "activations", "program_or_reason"]

ActivationLike = str | Callable[[Tensor], Tensor]


def program_or_reason(
    model: nn.Module, batches: Sequence[Batch] | None, inputs: Any, forward: Forward | None
) -> Program | str:
    """Return a model's program in evaluation mode, or the reason why there is none."""
    try:
        with without_weak_references(model), evaluating(model):
            if inputs is not None:
                batches = batches_of(inputs, model, forward=forward)
            first = batches[0] if batches else Batch((inferred_input(model),), {})
            return read(model, first.args, first.kwargs, forward=first.forward)
    except Exception as error:  # the model's own code may raise anything
        for batch in batches[:1] if batches else ():
            _check(model, batch)
        return f"{type(error).__name__}: {error}"


def _check(model: nn.Module, batch: Batch) -> None:
    """Run the model, and raise an error if it does not accept the inputs."""
    with evaluating(model), same_buffers(model):
        try:
            batch(model)
        except Exception as error:
            raise cannot_run(error, batch, model) from error


def activations(
    program: Program | str,
    found: Candidates,
    activation: ActivationLike | Mapping[str, ActivationLike] | None,
    method: Method,
) -> dict[str, Follower]:
    """Return the follower of each layer.

    Raises:
        ValueError: it is unknown, and the method needs it.
    """
    if isinstance(activation, Mapping):
        given = by_pattern(activation, found, "activation")
    else:
        given = {} if activation is None else dict.fromkeys(found.layers, activation)
    traced = followers(program, {name: t.module for name, t in found.layers.items()})
    result: dict[str, Follower] = {}
    for name in found.layers:
        follower = traced[name]
        if name in given:
            norm = None if isinstance(follower, str) else follower.norm
            follower = Follower(as_activation(given[name]), norm)
        elif isinstance(follower, str):
            if method == "function":
                raise ValueError(
                    f"the activation after {name!r} is unknown: {follower}; pass activation=, a "
                    "name such as 'relu' or a dict of them by name pattern ('identity' for none)"
                )
            follower = Follower(ACTIVATIONS["identity"], None, follower)
        result[name] = follower
    return result
