"""Tangent coordinates of shared parameters: in blocks, or whole at one owner.

The interface of :mod:`riemann_unn.retractions`, of generators for
:func:`riemann_unn.parallel.together`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg.factor import length_of
from ..linalg.step.blocks import (
    block_coordinates,
    block_directions,
    block_gradient,
    block_rotate_,
)
from ..linalg.step.tangent import next_directions, starts_by_planes
from ..parallel import Computation, FromOwner, ToOwner
from ..parallel.placement import Placement
from ..retractions import Randomness, Retraction, Tangent

__all__ = ["InBlocks", "SharedTangent", "WithOwner", "from_owner", "shared_tangent", "to_owner"]


def to_owner(placement: Placement, owner: int, part: Tensor) -> Computation:
    """Gather the blocks of all processes at the owner; None on the others."""
    index = [block.index for block in placement.blocks]
    mine = placement.sizes[_rank(placement)] > 0 or part.numel() == 0
    parts = yield ToOwner(owner, part if mine else part.flatten()[:0], list(placement.sizes))
    if parts is None:
        return None
    whole = part.new_empty(placement.block.shape)
    for where, size, given in zip(index, placement.sizes, parts, strict=True):
        if size:
            whole[where] = given.view(whole[where].shape)
    return whole


def from_owner(placement: Placement, owner: int, whole: Tensor | None, like: Tensor) -> Computation:
    """Return this process's block of the owner's tensor."""
    parts = None
    if whole is not None:
        parts = [whole[block.index].contiguous() for block in placement.blocks]
    found = yield FromOwner(owner, parts, like)
    return found


def _rank(placement: Placement) -> int:
    return torch.distributed.get_rank(placement.group)


class InBlocks:
    """A low-rank step: directions and coordinates are whole on every process."""

    def __init__(self, retraction: Retraction, placement: Placement) -> None:
        self.retraction, self.placement = retraction, placement
        self._is_scaled = False
        self._added: Tensor | None = None

    def sketch(
        self, x: Tensor, g: Tensor, *, start: Tensor | None, source: Randomness, step: int
    ) -> Computation:
        """Find v, z = Ωv and X v; return the length of z."""
        self.v, self.coordinates, self.xv = yield from block_directions(
            self.placement.block,
            x,
            g,
            rank=self.retraction.rank or 1,
            start=start,
            draws=source,
        )
        self.move, self._by_planes = self.coordinates, starts_by_planes(step)
        return length_of(self.move)

    def scale(self, scale: float | Tensor) -> None:
        """Set the move to a multiple of the coordinates."""
        self.move, self._is_scaled = self.coordinates * scale, True

    def gradient(self, x: Tensor) -> Computation:
        """Return this process's block of the gradient that a base sees."""
        found = yield from block_gradient(
            self.placement.block, x, self.v, self.coordinates, self.xv
        )
        return found

    def read(self, x: Tensor, delta: Tensor) -> Computation:
        """Set the move from the displacement of a base; return its length."""
        self.move = yield from block_coordinates(self.placement.block, x, delta, self.v, self.xv)
        return length_of(self.move)

    def rotate_(self, x: Tensor, *, polish: bool, step: int) -> Computation:
        """Rotate the local block by the move, in place; return the largest angles."""
        angle, added = yield from block_rotate_(
            self.placement.block,
            x,
            self.v,
            self.move,
            self.xv,
            phi=self.retraction.phi,
            max_angle=self.retraction.max_angle,
            by_planes=self._by_planes,
        )
        if self._is_scaled:
            self._added = added
        return angle

    def next_start(self) -> Tensor | None:
        """Return where the next sketch starts."""
        if self._added is not None:
            return self._added
        return next_directions(self.v, self.coordinates, by_planes=self._by_planes)


class WithOwner:
    """A step of whole matrices, gathered at one process.

    A replicated matrix is owned by every process, and its gradient averaged.
    """

    def __init__(self, retraction: Retraction, placement: Placement, owner: int) -> None:
        self.retraction, self.placement, self.owner = retraction, placement, owner
        self._tangent: Tangent | None = None
        self.move: Tensor | None = None

    @property
    def _is_replicated(self) -> bool:
        return self.placement.block.is_whole

    def sketch(
        self, x: Tensor, g: Tensor, *, start: Tensor | None, source: Randomness, step: int
    ) -> Computation:
        """Find the coordinates of the gradient at the owner; return their length."""
        if self._is_replicated:
            if self.placement.is_averaged:
                (g,) = yield [self.placement.block.placed_whole(g)]
            self._x: Tensor | None = x
        else:
            self._x = yield from to_owner(self.placement, self.owner, x)
            g = yield from to_owner(self.placement, self.owner, g)
        if self._x is not None:
            self._tangent = self.retraction.tangent(
                self._x, g, start=start, source=source, step=step
            )
            self.move = self._tangent.coordinates
        length = yield from self._length(x)
        return length

    def _length(self, like: Tensor) -> Computation:
        """Send the norm of the move to all processes."""
        length = length_of(self.move) if self.move is not None else 0.0
        if self._is_replicated:
            return length
        lengths = torch.tensor([length], dtype=torch.float64, device=like.device)
        (lengths,) = yield [lengths]
        return lengths.item()

    def scale(self, scale: float | Tensor) -> None:
        """Set the move to a multiple of the coordinates."""
        if self._tangent is not None:
            self.move = self._tangent.scaled(scale)

    def gradient(self, x: Tensor) -> Computation:
        """Return this process's block of the gradient that a base sees."""
        whole = None
        if self._tangent is not None and self._x is not None:
            whole = self._tangent.gradient(self._x, None)
        if self._is_replicated:
            return whole
        found = yield from from_owner(self.placement, self.owner, whole, x)
        return found

    def read(self, x: Tensor, delta: Tensor) -> Computation:
        """Set the move from the displacement of a base; return its length."""
        if not self._is_replicated:
            delta = yield from to_owner(self.placement, self.owner, delta)
        if self._tangent is not None and self._x is not None:
            self.move = self._tangent.read(self._x, delta)
        length = yield from self._length(x)
        return length

    def rotate_(self, x: Tensor, *, polish: bool, step: int) -> Computation:
        """Rotate the whole by the move, polish it, and write this process's block to ``x``."""
        angle, new = None, x if self._is_replicated else self._x
        if self._tangent is not None and new is not None and self.move is not None:
            angle = self._tangent.rotate_(new, self.move)
            if polish:
                self._tangent.polish_(new, step=step)
        if not self._is_replicated:
            x.copy_((yield from from_owner(self.placement, self.owner, new, x)))
        return angle

    def next_start(self) -> None:
        """Return None: an owner's sketch has no warm start."""


SharedTangent = InBlocks | WithOwner


def shared_tangent(retraction: Retraction, placement: Placement, owner: int) -> SharedTangent:
    """Return the coordinates for a step of a shared parameter."""
    if retraction.sketch == "tangent" and not retraction.is_whole_for(
        torch.Size(placement.block.shape)
    ):
        return InBlocks(retraction, placement)
    return WithOwner(retraction, placement, owner)
