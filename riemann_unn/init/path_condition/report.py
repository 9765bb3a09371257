"""The report of path conditioning: objective, scales, groups, and closed layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..table import Report, Table, plain

__all__ = ["ClosedLayer", "PathConditioning", "RescaledGroup"]


@dataclass(frozen=True)
class RescaledGroup:
    """Channels that the same parameters feed and read.

    Attributes:
        fed_by: the parameters that are multiplied by the scales.
        read_by: the weights that are divided by them.
        channels: how many scales there are.
        largest: the largest scale or inverse scale.
        dead: the number of channels left unscaled because they have no incoming or outgoing energy.
    """

    fed_by: tuple[str, ...]
    read_by: tuple[str, ...]
    channels: int
    largest: float
    dead: int


@dataclass(frozen=True)
class ClosedLayer:
    """A layer with output channels that are not rescaled.

    Attributes:
        layer: path of the module, or name of the node.
        channels: how many of its output channels.
        reason: the operation or parameter that closes them.
    """

    layer: str
    channels: int
    reason: str


@dataclass(frozen=True)
class PathConditioning(Report):
    """The report of :func:`path_condition_`; printing it gives a table.

    Attributes:
        method: ``"logdet"`` or ``"enorm"``.
        objective_before: the objective before.
        objective_after: the objective after.
        gradient: largest entry of the gradient, relative to the sum of magnitudes of its terms.
        iterations: sweeps of the solver.
        converged: whether ``gradient`` is within the tolerance.
        parameters: how many parameters are in the objective.
        largest_scale: the largest scale or inverse scale of a channel.
        median_scale: the median over channels of the same.
        groups: the rescaled channels.
        closed: the layers that were not rescaled, with the reason.
        change: relative change of the model's output on the calibration data or on random inputs,
            in the mode the model is in; NaN if the model could not be run.
        scales: by canonical parameter name, its factor, in its shape.
    """

    method: str
    objective_before: float
    objective_after: float
    gradient: float
    iterations: int
    converged: bool
    parameters: int
    largest_scale: float
    median_scale: float
    groups: tuple[RescaledGroup, ...]
    closed: tuple[ClosedLayer, ...]
    change: float
    scales: Mapping[str, Tensor] = field(repr=False)
    _original: Mapping[str, tuple[Tensor, Tensor]] = field(repr=False)

    def undo(self) -> None:
        """Restore the previous values of every rescaled parameter, bit for bit, in one call."""
        parameters, values = zip(*self._original.values(), strict=True)
        torch._foreach_copy_([p.detach() for p in parameters], values)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain nested values, for a log or a JSON file."""
        values: dict[str, Any] = plain(self)
        return values

    def _parts(self) -> list[str | Table]:
        rows = [("fed by", "read by", "channels", "largest scale", "dead")]
        for g in self.groups:
            names = (", ".join(g.fed_by), ", ".join(g.read_by))
            rows.append((*names, str(g.channels), f"{g.largest:.3g}", str(g.dead)))
        closed = [f"closed: '{c.layer}' ({c.channels}): {c.reason}" for c in self.closed]
        return [
            f"{self.method}: objective {self.objective_before:.10g} -> "
            f"{self.objective_after:.10g}, {self.parameters:,} parameters",
            f"gradient {self.gradient:.1e} after {self.iterations} iterations"
            + ("" if self.converged else ", NOT CONVERGED"),
            f"scales: largest {self.largest_scale:.3g}, median {self.median_scale:.3g}; "
            f"relative change of the function {self.change:.1e}",
            "",
            Table(rows, right=range(2, 5)),
            "",
            *closed,
        ]
