"""The objective of path conditioning, region by region."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...graph import ModelGraph
from ...graph.regions import regions
from ...linalg.rescaling import (
    EnergyBlock,
    Rescaling,
    balance_energies,
    log_balanced,
    may_overflow,
)

__all__ = ["Solution", "origin_of", "solve", "weighted_by"]


@dataclass(frozen=True)
class Solution:
    """The minimiser, over all regions.

    Attributes:
        scales: float64 ``(spaces,)``, one for closed spaces.
        without_energy: bool ``(spaces,)``, those left unscaled for that reason.
        before: sum of the objectives at the given weights.
        after: the same at the minimiser.
        gradient: the largest relative gradient of a region.
        iterations: the most of a region.
        converged: whether all regions did.
    """

    scales: Tensor
    without_energy: Tensor
    before: float
    after: float
    gradient: float
    iterations: int
    converged: bool


def weighted_by(
    energies: Mapping[str, Tensor], reference: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Divide energies by a reference.

    Raises:
        ValueError: it is not positive, or of another shape.
    """
    weighted = dict(energies)
    for name, r in (reference or {}).items():
        if name not in weighted or r.shape != weighted[name].shape or not bool((r > 0).all()):
            names = ", ".join(f"'{n}' {tuple(g.shape)}" for n, g in weighted.items())
            raise ValueError(
                f"the reference of '{name}' must be positive, of the shape of one of the traced "
                f"parameters: {names}; got {tuple(r.shape)}"
            )
        weighted[name] = weighted[name] / r.detach().double().to(weighted[name].device)
    return weighted


def origin_of(view: ModelGraph, own: Mapping[str, Tensor]) -> Tensor | None:
    """Return logarithms of squared scales ``(spaces,)`` at which path energies stay in range.

    None if they do so without.
    """
    if sum(_orders_of_magnitude(own[name]) for name in view.scalings) < _FAR:
        return None
    squares = _squares(view, own)
    origin = torch.zeros(len(view.reasons), dtype=torch.float64)
    far = False
    for names in _parts(view):
        part = _Part(view, names)
        blocks = part.blocks(squares)
        if may_overflow(blocks):
            origin[part.spaces] = -log_balanced(blocks, part.count)
            far = True
    return origin if far else None


# Orders of magnitude along a net from which ranges are checked in detail.
_FAR = 100.0


def _orders_of_magnitude(x: Tensor) -> float:
    """Return the largest absolute logarithm of the squared lengths of rows."""
    rows = x.detach().reshape(x.shape[0] if x.ndim else 1, -1)
    lengths = torch.linalg.vector_norm(rows, dim=1).double()
    lengths = lengths[lengths > 0]
    return 2 * float(lengths.log10().abs().max()) if lengths.numel() else 0.0


def _squares(view: ModelGraph, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: own[n].detach().abs().double().square() for n in view.scalings}


def solve(
    view: ModelGraph,
    energies: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    method: str,
    tolerance: float,
    origin: Tensor | None = None,
) -> Solution:
    """Minimise over the scales of all free spaces.

    Args:
        view: the model.
        energies: of each weight, over its reference.
        own: the weights.
        method: ``"logdet"`` or ``"enorm"``.
        tolerance: relative size of the gradient to stop at.
        origin: logarithms of squared scales ``(spaces,)`` at which the energies are given; by
            default zero.

    Warns:
        UserWarning: a region stopped above the tolerance.
    """
    squares = _squares(view, own) if method == "enorm" else {}
    z = torch.zeros(len(view.reasons), dtype=torch.float64)
    without = torch.zeros(len(view.reasons), dtype=torch.bool)
    found = []
    for names in _parts(view):
        part = _Part(view, names)
        if method == "logdet":
            at = None if origin is None else origin[part.spaces]
            solution = part.aligned(energies, tolerance, at)
        else:
            solution = part.smallest(energies, squares, tolerance)
        z[part.spaces] = solution.z
        without[part.spaces] = solution.unscaled
        found.append(solution)
    worst = max(s.gradient for s in found)
    if not all(s.converged for s in found):
        warnings.warn(
            f"path conditioning stopped at a relative gradient of {worst:.1e}, above {tolerance=}: "
            "the weights are no worse than before, but not optimal. Where many weights are exactly "
            "zero there may be no optimum; otherwise raise tolerance, or call undo()",
            UserWarning,
            stacklevel=8,
        )
    return Solution(
        z.mul(0.5).exp(),
        without,
        sum(s.before for s in found),
        sum(s.after for s in found),
        worst,
        max(s.iterations for s in found),
        all(s.converged for s in found),
    )


def _parts(view: ModelGraph) -> list[list[str]]:
    """Return the weights of each region with a free space."""
    parts: dict[int, list[str]] = {}
    for name, region in regions(view).items():
        parts.setdefault(region, []).append(name)
    free = view.free

    def is_open(name: str) -> bool:
        ids = view.scalings[name].feeds, view.scalings[name].reads
        return any(x is not None and bool(free[x].any()) for x in ids)

    return [names for names in parts.values() if any(map(is_open, names))]


class _Part:
    """One region: its weights, its free spaces, numbered, and its objective."""

    def __init__(self, view: ModelGraph, names: Sequence[str]) -> None:
        self.scalings = [view.scalings[name] for name in names]
        ids = [x for s in self.scalings for x in (s.feeds, s.reads) if x is not None]
        touched = torch.cat([x.reshape(-1).unique() for x in ids]).unique()
        self.spaces = touched[view.free[touched]]
        self.count = len(self.spaces)
        self._number = torch.full((len(view.reasons),), self.count)
        self._number[self.spaces] = torch.arange(self.count)

    def blocks(self, values: Mapping[str, Tensor]) -> list[EnergyBlock]:
        """Return the blocks of the solver; rows and columns of closed spaces are summed."""
        blocks = []
        for scaling in self.scalings:
            energy, feeds, reads = scaling.matrices(values[scaling.name].cpu())
            rows = self._number[feeds]
            columns = torch.full((len(rows), energy.shape[2]), self.count)
            if reads is not None:
                columns = self._number[reads]
            if bool((columns == self.count).all()):
                energy, columns = energy.sum(2, keepdim=True), columns[:, :1]
            if bool((rows == self.count).all()):
                energy, rows = energy.sum(1, keepdim=True), rows[:, :1]
            count = values[scaling.name].numel() // energy.numel()
            blocks.append(EnergyBlock(energy.contiguous(), rows, columns, count))
        return blocks

    def aligned(
        self, energies: Mapping[str, Tensor], tolerance: float, origin: Tensor | None
    ) -> Rescaling:
        """Minimise F, which aligns the path kernel with the reference."""
        blocks = self.blocks(energies)
        # A common factor only shifts the objective; it prevents overflow of sums.
        peak = max(float(b.energy.max()) for b in blocks)
        unit = 2.0 ** math.frexp(peak)[1] if peak > 0 else 1.0
        for block in blocks:
            block.energy.div_(unit)
        found = balance_energies(blocks, self.count, tol=tolerance, origin=origin)
        shift = sum(energies[s.name].numel() for s in self.scalings) * math.log(unit)
        return Rescaling(found.z, found.before + shift, found.after + shift, *_rest(found))

    def smallest(
        self, energies: Mapping[str, Tensor], squares: Mapping[str, Tensor], tolerance: float
    ) -> Rescaling:
        """Minimise the sum of squares of the weights."""
        # Channels without paths are frozen here too: their norm could shrink without bound.
        unscaled = balance_energies(self.blocks(energies), self.count, tol=1.0).unscaled
        found = balance_energies(
            self.blocks(squares), self.count, linear=False, tol=tolerance, frozen=unscaled
        )
        before, after = math.exp(found.before), math.exp(found.after)
        return Rescaling(-found.z, before, after, *_rest(found))


def _rest(solution: Rescaling) -> tuple[float, int, bool, Tensor]:
    return solution.gradient, solution.iterations, solution.converged, solution.unscaled
