"""Shared parameters: the step of a parameter of which processes hold parts or replicas.

The interface of :class:`.batch.Batch`, but methods that communicate are generators, which
:func:`riemann_unn.parallel.together` runs side by side.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import ManifoldTypeError
from ..linalg.step.blocks import block_correction, block_error, block_whole
from ..linalg.step.polish import newton_schulz_
from ..parallel import (
    Computation,
    as_whole,
    is_sharded,
    local_part,
    scattered,
    sharded_like,
    writes_to,
)
from ..parallel.placement import Placement
from ..retractions import Retraction
from .batch import State, View
from .entries import COORDINATES, MASTER, OWN, START, STEP
from .proxies import Proxy
from .seeds import Seeds, Source
from .shared_tangent import InBlocks, SharedTangent, from_owner, shared_tangent, to_owner
from .starts import stored_start, usable_start
from .states import as_tensor, coordinates_of
from .tagged import TaggedParam

__all__ = ["SharedParam"]


class SharedParam:
    """A tagged parameter that processes share, and the data of its step.

    Args:
        member: the parameter.
        placement: where this process's part lies.
        owner: the rank, in the group, that takes whole steps of it.
    """

    def __init__(self, member: TaggedParam, placement: Placement, owner: int) -> None:
        self.members, self.group = [member], member.group
        self.member, self.placement, self.owner = member, placement, owner
        self.layout: tuple[object, ...] = ()
        self.tangent: SharedTangent | None = None
        self.angle: Tensor | None = None
        self._length = 0.0
        self._correction: tuple[Any, Tensor] | None = None
        self._renewed: Tensor | None = None
        self._shown: Proxy | None = None

    # The steps of a step ---------------------------------------------------

    def reset(self) -> None:
        """Drop the data of a step that was not taken."""
        self._correction = self._renewed = self._shown = None

    def begin(self, state: State) -> bool:
        """Read the current values; return whether the master copy must be made anew."""
        member = self.member
        self._kept = state.get(member.param, {})
        self._step = self._kept.get(STEP, 0)
        is_stale = False
        if member.is_half:
            stored = self._kept.get(MASTER)
            master = local_part(stored) if self._renewed is None and stored is not None else None
            is_stale = self._renewed is None and (
                master is None or not torch.equal(master.to(member.memory.dtype), member.memory)
            )
            member.value = member.memory.float() if master is None else master
            member.value = member.value if self._renewed is None else self._renewed
        self._x = self._block(member.value, self.placement.manifold.to_matrices)
        return is_stale

    def renew_master(self) -> None:
        """Make the single-precision copy anew from the stored values."""
        member = self.member
        whole = member.manifold.projx(as_whole(member.param).float())
        self._renewed = _stored_as(member.memory, scattered(whole, member.param))

    def sketch(self, retraction: Retraction, seeds: Seeds) -> Computation:
        """Find the tangent coordinates of the gradient; nothing is changed."""
        self.tangent = shared_tangent(retraction, self.placement, self.owner)
        shape = self.placement.block.shape
        stored = self._kept.get(START)
        start = None
        # Before the first step it is a placeholder, of a base with an initial state.
        if stored is not None and self._step > 0 and isinstance(self.tangent, InBlocks):
            start = usable_start(stored, self._x, (*shape[:-2], retraction.rank or 1, shape[-1]))
        self._length = yield from self.tangent.sketch(
            self._x,
            self._block(self._gradient()),
            start=start,
            source=Source(seeds, self._x.device, (shape[-1], shape[-2]), self._step),
            step=self._step,
        )

    def correct(self) -> Computation:
        """Compute the polish's correction, beside the sketch; an owner polishes by itself."""
        self._correction = None
        if isinstance(self.tangent, InBlocks):
            self._correction = yield from block_correction(
                self.placement.block, self._x, step=self._step
            )

    def scale(self, scale: float | Tensor) -> None:
        """Set the move to a multiple of the gradient's coordinates, for plain SGD."""
        assert self.tangent is not None
        self.tangent.scale(scale)

    def show(self, kept_whole: tuple[str, ...] | None) -> Computation:
        """Return the proxy that the base sees; None if it sees nothing on this process.

        Args:
            kept_whole: the matrix-shaped state entries of a base that needs whole matrices.
        """
        assert self.tangent is not None
        local = self.member.value
        found = yield from self.tangent.gradient(self._x)
        state = {key: value for key, value in self._kept.items() if key not in OWN}
        self._has_owner = kept_whole is not None and not self.placement.block.is_whole
        self._shown = None
        if not self._has_owner:
            parts = {k: local_part(v) if isinstance(v, Tensor) else v for k, v in state.items()}
            gradient = _stored_as(local, self._tensor(found, local))
            self._shown = Proxy(self.member.param, torch.zeros_like(local), gradient, parts)
            return self._shown
        whole = yield from self._gather(found)
        for key in kept_whole or ():
            if key in state:
                state[key] = yield from self._gather(self._block(local_part(state[key])))
        if whole is not None:
            self._shown = Proxy(self.member.param, torch.zeros_like(whole), whole, state)
        return self._shown

    def read(self, state: State, kept_whole: tuple[str, ...] | None) -> Computation:
        """Set the move from the displacement that the base has written, and save its state."""
        assert self.tangent is not None
        shown, self._shown = self._shown, None
        kept = state[self.member.param]
        if not self._has_owner:
            assert shown is not None
            self._keep(kept, shown.state)
            delta = self._block(shown.zeros)
        else:
            delta = yield from self._scatter(None if shown is None else shown.zeros)
            for key in kept_whole or ():
                part = yield from self._scatter(None if shown is None else shown.state[key])
                self._keep(kept, {key: self._tensor(part, self.member.value).contiguous()})
        self._length = yield from self.tangent.read(self._x, delta)

    def _keep(self, kept: dict[str, Any], found: dict[str, Any]) -> None:
        """Save the base's state, sharded like the parameter where it has the local part's shape."""
        param, local = self.member.param, self.member.value
        new = {}
        for key, value in found.items():
            is_part = isinstance(value, Tensor) and value.shape == local.shape
            old = kept.get(key)
            if not (is_part and isinstance(old, Tensor) and local_part(old).is_set_to(value)):
                new[key] = sharded_like(value, param) if is_part else value
        kept.update(new)  # in one call: bases take an incomplete state for a complete one

    def _gather(self, block: Tensor) -> Computation:
        """Gather the whole tensor at its owner."""
        whole = yield from to_owner(self.placement, self.owner, block)
        if whole is None:
            return None
        shape = self.member.param.shape
        like = torch.empty(shape, dtype=self.member.value.dtype, device="meta")
        view = self.member.manifold.to_matrices(like).shape
        matrices = whole if whole.shape[-2] == whole.shape[-1] else whole.mH
        matrices = matrices.reshape(view)
        return self.member.manifold.from_matrices(matrices, shape).resolve_conj()

    def _scatter(self, whole: Tensor | None) -> Computation:
        """Return this process's block of the owner's tensor."""
        if whole is not None:
            matrices = self.member.manifold.displacement_matrices(whole)
            shape = self.placement.block.shape
            whole = (matrices if shape[-2] == shape[-1] else matrices.mH).reshape(shape)
            whole = whole.resolve_conj()
        part = yield from from_owner(self.placement, self.owner, whole, self._x)
        return part

    def retract_(self, state: State, *, polish: bool) -> Computation:
        """Move the point, and save the state for its next step."""
        assert self.tangent is not None
        member = self.member
        self.angle = None
        if self._length > 0:  # a point with a zero move stays unchanged bit for bit
            x = self._x.clone()  # an interruption leaves the point before or after the step
            if self._correction is not None and polish:
                due, update = self._correction
                x[due].sub_(update if update.ndim == 2 else update * self._moved(update))
            self.angle = yield from self.tangent.rotate_(x, polish=polish, step=self._step)
            if member.is_inexact:
                whole = yield from block_whole(self.placement.block, x)
                tall = whole if whole.shape[-1] == whole.shape[-2] else whole.mH
                newton_schulz_(newton_schulz_(tall))
                x.copy_(whole[self.placement.block.index])
            self._write_back(x)
        self._save_state(state)

    def _moved(self, like: Tensor) -> Tensor:
        """Return 1 for each local matrix that has a move, and 0 for the others."""
        assert self.tangent is not None and self.tangent.move is not None
        moved = (self.tangent.move != 0).flatten(-2).any(dim=-1)
        return moved[self.placement.block.index[0]][:, None, None].to(like.dtype)

    def _write_back(self, x: Tensor) -> None:
        member = self.member
        new = self._tensor(x, member.value)
        if member.is_half:  # in one call
            torch._foreach_copy_([member.value, member.memory], [new, new])
        else:
            member.value.copy_(new)

    def _save_state(self, state: State) -> None:
        assert self.tangent is not None
        member, kept = self.member, state[self.member.param]
        if self._step == 0:
            kept[COORDINATES] = as_tensor(coordinates_of(member.manifold), self._x.device)
        kept[STEP] = self._step + 1
        start = self.tangent.next_start()
        if start is not None:
            kept[START] = stored_start(start.mH, member.param).contiguous()
        if member.is_half and (self._length > 0 or MASTER not in kept):
            kept[MASTER] = sharded_like(member.value, member.param)
        member.version, member.is_inexact = writes_to(member.param), False
        self.reset()
        del self._x, self._kept

    # Properties ------------------------------------------------------------

    @property
    def world(self) -> int:
        """The number of processes that hold a part."""
        return len(self.placement.blocks)

    def has_gradient(self) -> bool:
        """Whether this process has a gradient of it."""
        return self.member.param.grad is not None

    def is_written(self) -> bool:
        """Whether this process's part was written to since the last step."""
        if self.member.has_new_storage():
            self.member.refresh()
        return self.member.version != writes_to(self.member.param)

    def count_flags(self, flags: list[bool]) -> Computation:
        """Return for each flag the number of processes on which it is set."""
        dtype = self.member.value.dtype.to_real()
        (counts,) = yield [torch.tensor(flags, dtype=dtype, device=self.member.value.device)]
        return counts.tolist()

    @property
    def is_finite(self) -> bool:
        """Whether the move is finite, on every process alike."""
        return math.isfinite(self._length)

    def has_nonfinite_gradient(self) -> bool:
        """Whether this process's part of the gradient holds NaN or infinity."""
        grad = self.member.param.grad
        if grad is None:
            return False
        return not bool(torch.isfinite(local_part(grad)).all())

    def overflowing(self) -> list[TaggedParam]:
        """Return the member if its move is not finite."""
        return [] if self.is_finite else self.members

    def report(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Return its entry of :meth:`ManifoldOptimizer.last_step`."""
        entry: dict[str, Tensor] = {}
        if self.angle is not None and isinstance(self.tangent, InBlocks):
            v, z = (
                t.reshape(-1, *t.shape[-2:]) for t in (self.tangent.v, self.tangent.coordinates)
            )
            entry = {"angle": self.angle.amax(), "directions": v, "coordinates": z}
        return [(self.member.param, entry)]

    def error(self) -> Computation:
        """Return the estimated error of the stored point, the worst of a batch."""
        local = self.member.memory
        wide = local.float() if self.member.is_half else local
        x = self._block(wide, self.placement.manifold.to_matrices)
        errors = yield from block_error(self.placement.block, x)
        return float(errors.max()) if errors.numel() else 0.0

    # Tensors as blocks, and back -------------------------------------------

    def _gradient(self) -> Tensor:
        """Return this process's part of the gradient, in the precision in which the point moves."""
        param, grad = self.member.param, self.member.param.grad
        if grad is None:
            return torch.zeros_like(self.member.value)
        if is_sharded(param):
            if not is_sharded(grad):
                raise ManifoldTypeError(
                    f"{self.member.name} is a DTensor but its gradient is a {type(grad).__name__}"
                )
            given: Any = grad
            if given.placements != param.placements:  # type: ignore[attr-defined]
                grad = given.redistribute(placements=param.placements)  # type: ignore[attr-defined]
        local = local_part(grad)
        return local.float() if self.member.is_half else local

    def _block(self, local: Tensor, view: View | None = None) -> Tensor:
        """Return this process's block of the matrices, from the local part of a tensor."""
        matrices = (view or self.placement.manifold.displacement_matrices)(local)
        parts = [part.stop - part.start for part in self.placement.block.index]
        rows, columns = reversed(parts[-2:]) if self.placement.is_adjoint else parts[-2:]
        # A manifold that takes both tall and wide matrices shows the adjoint of a wide local part.
        is_shown_adjoint = matrices.shape[-2:] != (rows, columns)
        self._shape, self._matches = matrices.shape, is_shown_adjoint == self.placement.is_adjoint
        return (matrices if self._matches else matrices.mH).reshape(parts)

    def _tensor(self, x: Tensor, local: Tensor) -> Tensor:
        """Return the local part of the tensor whose block is ``x``."""
        rows = self._shape if self._matches else (*self._shape[:-2], *self._shape[:-3:-1])
        matrices = x.reshape(rows) if self._matches else x.reshape(rows).mH
        return self.placement.manifold.from_matrices(matrices, local.shape)


def _stored_as(like: Tensor, x: Tensor) -> Tensor:
    """Return a copy of ``x`` in the memory order of ``like``, in which states are loaded.

    In another order torch's elementwise loops round differently.
    """
    return torch.empty_like(like, dtype=x.dtype).copy_(x)
