"""Batches: tagged parameters of one batch key take a step as one batch of matrices."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, MutableMapping, Sequence
from itertools import repeat
from operator import is_, setitem
from typing import Any

import torch
from torch import Tensor

from ..interruption import each
from ..linalg.factor import column_norms
from ..linalg.step.polish import newton_schulz_
from ..retractions import Directions, LargestAngle, Retraction, Tangent
from .entries import COORDINATES, MASTER, START, STEP
from .seeds import Seeds, Source
from .starts import stored_start, usable_start
from .states import as_tensor, coordinates_of
from .tagged import TaggedParam, gradients_of

__all__ = ["NOTHING", "Batch", "State"]

State = MutableMapping[Tensor, dict[str, Any]]
View = Callable[[Tensor], Tensor]
NOTHING: dict[str, Any] = {}


class Batch:
    """Tagged parameters that are stepped together, and the data of their step.

    A step calls :meth:`sketch_`, for bases other than plain SGD :meth:`show` and :meth:`read_`,
    then :meth:`retract_`. Points are seen as square or wide matrices ``(..., p, n)``, ``p <= n``.
    A batch is kept between steps together with its buffers: making a view for each of many small
    parameters takes longer than moving them.
    """

    # Whether faults are recorded on the device, without reading from it.
    is_masked = False

    def __init__(self, members: list[TaggedParam]) -> None:
        self.members = members
        self.group = members[0].group
        self.tangent: Tangent | None = None
        self.angle: LargestAngle | None = None
        self._manifold = members[0].manifold
        self._together = len(members) > 1 and self._manifold.takes_batches
        # Buffers for all members stacked, and each member's part.
        self._buffers: dict[str, tuple[Tensor, list[Tensor]]] = {}
        self._starts: tuple[Tensor, Sequence[Tensor]] | None = None
        self._shape = torch.Size()
        self._kept: list[dict[str, Any]] = []
        # The value of a single member, and its view as matrices.
        self._seen: tuple[Tensor, Tensor] | None = None
        self._source: Source | None = None
        # The buffer for displacements, if it holds zeros.
        self._clear: Tensor | None = None

    # The steps of a step ---------------------------------------------------

    def sketch_(self, retraction: Retraction, seeds: Seeds, scale: float | Tensor | None) -> None:
        """Find the tangent coordinates of the gradients; nothing is changed.

        The move of plain SGD is ``scale`` times them; with None it is :meth:`read_` from the base.
        """
        members = self.members
        self._step = self._kept[0].get(STEP, 0)
        grads = gradients_of(members)
        if members[0].is_half:
            for member, kept in zip(members, self._kept, strict=True):
                member.value = _master(member, kept)
            grads = [None if grad is None else grad.float() for grad in grads]
        values = [member.value for member in members]
        self._x, g = self._as_matrices(values, grads, retraction)
        self.tangent = retraction.tangent(
            self._x,
            g,
            start=self._start(retraction.rank),
            source=self._source_of(seeds, g),
            step=self._step,
            is_cached=self._is_cached,
        )
        coordinates = self.tangent.coordinates
        self._set_move(coordinates if scale is None else self.tangent.scaled(scale))

    def show(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return each parameter with zeros to displace and the Riemannian gradient to show."""
        assert self.tangent is not None
        values = [member.value for member in self.members]
        zeros, zero_parts = self._buffer("zeros", values[0])
        if self._clear is not zeros:
            zeros.zero_()
        self._clear = None
        gradients, parts = self._buffer("gradients", values[0])
        here = None
        if self._manifold.views_memory:
            here = self._matrices(self._manifold.displacement_matrices, parts, view_of=gradients)
            here = here if _shares(here, gradients) and not here.is_conj() else None
        found = self.tangent.gradient(self._x, here)
        if here is None:
            self._scatter(found, gradients, parts)
        params = [member.param for member in self.members]
        return list(zip(params, zero_parts, parts, strict=True))

    def read_(self) -> None:
        """Set the move from the displacement that the base has written into the zeros."""
        assert self.tangent is not None
        zeros, parts = self._buffers["zeros"]
        view = self._manifold.displacement_matrices
        delta = self._matrices(view, parts, view_of=zeros)
        is_view = _shares(delta, zeros)
        self._set_move(self.tangent.read(self._x, delta, clear=is_view))
        self._clear = zeros if is_view else None

    def retract_(self, state: State, *, polish: bool) -> None:
        """Move the points, and save the state for their next step."""
        # A point with a zero move stays unchanged bit for bit.
        moved = None if self._shortest > 0 else self._moved()
        self.angle = None
        if moved is None or (self._longest > 0 and bool(moved.any())):
            if moved is not None and bool(moved.all()):
                moved = None
            self._rotate_(
                moved, polish, is_inexact=any(member.is_inexact for member in self.members)
            )
        self._save_state(state, moved)

    def _source_of(self, seeds: Seeds, g: Tensor) -> Source:
        source = self._source
        if source is None or source.seeds is not seeds:
            shape = tuple(self._tall(g).shape[-2:])
            source = self._source = Source(seeds, g.device, shape, self._step)
        source.step = self._step
        return source

    @property
    def _is_cached(self) -> bool | None:
        """Whether all matrices of a point fit in cache; None to decide for each matrix."""
        return None

    def _as_matrices(
        self, values: list[Tensor], grads: list[Any], retraction: Retraction
    ) -> tuple[Tensor, Tensor]:
        """Return all points and gradients as matrices."""
        if self._seen is not None and values[0] is self._seen[0]:
            x = self._seen[1]  # a view of the same memory
        else:
            buffer = self._buffer("values", values[0])[0] if self._together else None
            x = self._matrices(self._manifold.to_matrices, values, buffer)
            is_own = len(values) == 1 and _shares(x, values[0])
            self._seen = (values[0], x) if is_own else None
        return x, self._matrices(self._manifold.displacement_matrices, grads)

    def _rotate_(self, moved: Tensor | None, polish: bool, *, is_inexact: bool) -> None:
        """Rotate the points by the move and write back those that have moved."""
        assert self.tangent is not None
        x = self._x
        own = self._seen is not None
        new = x if self._can_write_in_place(moved, own, polish, is_inexact) else x.clone()
        self.angle = self.tangent.rotate_(new, self._move)
        if polish:
            self.tangent.polish_(new, step=self._step)
            if is_inexact:
                newton_schulz_(newton_schulz_(self._tall(new)))
        if moved is not None:
            new = torch.where(moved[..., None, None], new, x)
        self._write_back(new, moved, own)

    # The move --------------------------------------------------------------

    def _set_move(self, move: Tensor) -> None:
        """Set the move, and compute its norm, which is not finite where the move is not."""
        if move.ndim == 2:
            assert self.tangent is not None
            self._move, self._longest = self.tangent.measured(move)
            self._shortest = self._longest
        else:
            self._move = move
            norms = torch.linalg.vector_norm(column_norms(move), dim=(-2, -1))
            self._shortest, self._longest = torch.stack(norms.aminmax()).tolist()

    @property
    def is_finite(self) -> bool:
        """Whether the move is finite; to be checked before anything changes."""
        return math.isfinite(self._longest) or bool(torch.isfinite(self._move).all())

    def nonfinite_gradients(self) -> list[TaggedParam]:
        """Return the members whose gradient holds NaN or infinity."""
        bad = []
        for member in self.members:
            grad = member.param.grad
            # The sum of a finite tensor can overflow, so False may be wrong, True never is.
            fine = grad is None or cmath.isfinite(grad.sum().item())
            if grad is not None and not fine and not bool(torch.isfinite(grad).all()):
                bad.append(member)
        return bad

    def overflowing(self) -> list[TaggedParam]:
        """Return the members whose move is not finite."""
        fine = torch.isfinite(self._move).reshape(len(self.members), -1).all(dim=1).tolist()
        return [member for member, is_fine in zip(self.members, fine, strict=True) if not is_fine]

    def report(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Return for each member its entry of :meth:`ManifoldOptimizer.last_step`."""
        count = len(self.members)
        if self.angle is None or not isinstance(self.tangent, Directions):
            return [(member.param, {}) for member in self.members]
        v, z = (
            t.reshape(count, -1, *t.shape[-2:]) for t in (self.tangent.v, self.tangent.coordinates)
        )
        angle = self.angle().reshape(count, -1).amax(dim=1)
        return [
            (member.param, {"angle": angle[i], "directions": v[i], "coordinates": z[i]})
            for i, member in enumerate(self.members)
        ]

    # Members as matrices, and back -----------------------------------------

    def _tall(self, x: Tensor) -> Tensor:
        """Take the adjoint of wide matrices, or undo it; square ones stay."""
        return x if x.shape[-1] == x.shape[-2] else x.mH

    def _matrices(
        self,
        view: View,
        tensors: list[Any],
        buffer: Tensor | None = None,
        *,
        view_of: Tensor | None = None,
    ) -> Tensor:
        """Return all members' matrices, with at most one batch dimension.

        Args:
            view: the manifold's view of one tensor, or of several side by side.
            tensors: one for each member.
            buffer: where to stack them.
            view_of: the memory in which they are stacked already.
        """
        if len(tensors) == 1:
            matrices = view(tensors[0])
            self._shape = torch.Size((1, *matrices.shape))
        elif self._together:
            together = torch.stack(tensors, out=buffer) if view_of is None else view_of
            matrices = view(together)
            self._shape = matrices.shape
        else:
            matrices = torch.stack([view(tensor) for tensor in tensors])
            self._shape = matrices.shape
        flat = matrices if matrices.ndim <= 3 else matrices.reshape(-1, *matrices.shape[-2:])
        return self._tall(flat)

    def _buffer(self, name: str, like: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return memory for all members, kept between steps: new pages cost more than clearing."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer[0].shape[1:] != like.shape or not _can_hold(buffer[0], like):
            whole = like.new_empty((len(self.members), *like.shape))
            buffer = self._buffers[name] = whole, list(whole.unbind(0))
        return buffer

    def _scatter(self, x: Tensor, whole: Tensor, parts: list[Tensor]) -> None:
        """Write matrices to a buffer for all members, of which ``parts`` are the members' views."""
        matrices, back = self._tall(x).reshape(self._shape), self._manifold.from_matrices
        if self._together:
            whole.copy_(back(matrices, whole.shape))
        else:
            for part, one in zip(parts, matrices.unbind(0), strict=True):
                part.copy_(back(one, part.shape))

    def _can_write_in_place(
        self, moved: Tensor | None, own: bool, polish: bool, is_inexact: bool
    ) -> bool:
        """Whether points may be changed in place: an interruption leaves all or none of the step.

        Args:
            moved: which have a move; None for all.
            own: whether they lie in a parameter's own memory.
            polish: whether they are polished.
            is_inexact: whether errors above rounding are corrected.
        """
        assert self.tangent is not None
        if moved is not None or not own:
            return moved is None
        polishes = polish and (is_inexact or self.tangent.polishes_at(self._x, step=self._step))
        return not polishes and not self.members[0].is_half

    def _write_back(self, x: Tensor, moved: Tensor | None, own: bool) -> None:
        """Write points back to the members that have moved."""
        is_half, values = self.members[0].is_half, [member.value for member in self.members]
        if own and not is_half:
            if x is not self._x:
                self._x.copy_(x)
            return
        whole, parts = self._buffer("values", values[0])
        if not _shares(x, whole):
            if moved is not None:
                torch.stack(values, out=whole)
                old = whole.clone()
            self._scatter(x, whole, parts)
            if moved is not None:  # the view and its inverse round
                whole.copy_(torch.where(self._flags(moved, whole), whole, old))
        self._commit(parts, moved)

    def _commit(self, parts: list[Tensor], moved: Tensor | None) -> None:
        """Write each member its part, in one call."""
        values = [member.value for member in self.members]
        if self.members[0].is_half:  # together with the stored values, in one call
            halves = self._moved_members(moved)
            values = [*values, *(self.members[i].memory for i in halves)]
            parts = [*parts, *(parts[i] for i in halves)]
        torch._foreach_copy_(values, parts)

    def _moved_members(self, moved: Tensor | None) -> list[int]:
        """Return the indices of the members that have a move."""
        if moved is None:
            return list(range(len(self.members)))
        return moved.reshape(len(self.members), -1).any(dim=1).nonzero()[:, 0].tolist()

    def _moved(self) -> Tensor:
        """Return for each matrix whether its point has a move."""
        moved = (self._move != 0).flatten(-2).any(dim=-1)
        flags = moved.reshape(self._shape[:-2])
        if flags.ndim > self._batch_dims:  # one matrix for each frequency of a kernel
            whole = flags.flatten(self._batch_dims).any(dim=-1)
            moved = whole[(..., *[None] * (flags.ndim - self._batch_dims))].expand(flags.shape)
        return moved.reshape(self._move.shape[:-2])

    def _flags(self, moved: Tensor, whole: Tensor) -> Tensor:
        """Return the mask of points that have moved, for ``whole``."""
        flags = moved.reshape(self._shape[:-2])
        while flags.ndim > self._batch_dims:
            flags = flags[..., 0]
        return flags.reshape(*flags.shape, *[1] * (whole.ndim - self._batch_dims))

    @property
    def _batch_dims(self) -> int:
        """The number of dimensions of the members' stack and of their batches."""
        value = self.members[0].value
        return 1 + value.ndim - self._manifold.point_dims(value)

    # The state of each member -----------------------------------------------

    def _save_state(self, state: State, moved: Tensor | None) -> None:
        assert self.tangent is not None
        if any(kept is NOTHING for kept in self._kept):
            self._kept = [state[member.param] for member in self.members]
        if COORDINATES not in self._kept[0]:
            name = as_tensor(coordinates_of(self._manifold), self._x.device)
            each(setitem, self._kept, repeat(COORDINATES), repeat(name, len(self._kept)))
        self._count()
        start = self.tangent.next_start()
        if start is not None:
            self._keep_starts(start.mH)
        if self.members[0].is_half:
            movers = self._moved_members(moved)
            for i, kept in enumerate(self._kept):
                if i in movers or MASTER not in kept:  # torch's checkpoints need a first step
                    kept[MASTER] = self.members[i].value
        for member in self.members:
            member.version, member.is_inexact = member.memory._version, False
        if self.angle is None:  # a whole tangent takes as much memory as the points
            self.tangent = None
        del self._x, self._move

    def _count(self) -> None:
        if len(self._kept) == 1:
            self._kept[0][STEP] = self._step + 1
        else:
            each(setitem, self._kept, repeat(STEP), repeat(self._step + 1))

    def _start(self, rank: int | None) -> Tensor | None:
        """Return the rows that start the sketches, from the members' states."""
        is_first = not isinstance(self._step, Tensor) and self._step == 0
        if is_first or START not in self._kept[0]:
            self._starts = None  # the state has been replaced
            return None
        rows: list[Tensor] = [kept[START] for kept in self._kept]
        if len(rows) == 1:
            whole = rows[0]
        elif self._starts is not None and _are_same(rows, self._starts[1]):
            whole = self._starts[0]
        else:
            self._starts = None
            if len({row.shape for row in rows}) > 1:
                return None
            whole = torch.stack(rows)
        x = self._x
        shape = (*x.shape[:-2], rank or 1, x.shape[-1])
        if whole.dtype is x.dtype and whole.shape == shape and whole.device == x.device:
            return whole
        return usable_start(whole, x, shape)

    def _keep_starts(self, rows: Tensor) -> None:
        """Save the rows that start the next sketches in the members' states."""
        if rows.ndim == 2 and not rows.is_complex():
            self._kept[0][START] = rows.contiguous()
            return
        if rows.ndim > 2:
            batch = self._shape[:-2] if len(self._kept) > 1 else self._shape[1:-2]
            rows = rows.reshape(*batch, *rows.shape[-2:])
        rows = stored_start(rows, self.members[0].param)
        if len(self._kept) == 1:
            self._kept[0][START] = rows.contiguous()
            return
        if self._starts is not None:
            whole = self._starts[0]
            if whole.shape == rows.shape and _can_hold(whole, rows):
                whole.copy_(rows)
                return
        whole = rows.clone(memory_format=torch.contiguous_format)
        self._starts = whole, whole.unbind(0)
        each(setitem, self._kept, repeat(START), self._starts[1])


def _master(member: TaggedParam, kept: dict[str, Any]) -> Tensor:
    """Return the single-precision master copy of a parameter that is stored in half."""
    master: Tensor | None = kept.get(MASTER)
    if master is not None and (
        master is member.value or torch.equal(master.to(member.param.dtype), member.param)
    ):
        return master
    # There is none yet, or the parameter was written to.
    single = member.manifold.projx(member.param.detach().float())
    # In the parameter's memory order, which torch's checkpoints use between processes.
    return torch.empty_like(member.memory, dtype=torch.float32).copy_(single)


def _shares(some: Tensor, other: Tensor) -> bool:
    return some.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _can_hold(x: Tensor, other: Tensor) -> bool:
    return x.dtype is other.dtype and x.device == other.device


def _are_same(some: Sequence[Any], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))
