"""Shared points: a tagged parameter of which several processes hold parts or replicas, in a step.

The interface of :class:`.batch.Batch`, but that what needs other processes is a generator, for
:func:`riemann_unn.parallel.together` to run beside those of other parameters.
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
from ..parallel.places import Place
from ..retractions import Retraction
from .batch import State, View
from .entries import COORDINATES, MASTER, OWN, START, STEP
from .seeds import Seeds, Source
from .shared_tangent import InBlocks, SharedTangent, from_owner, shared_tangent, to_owner
from .stand_ins import StandIn
from .starts import stored_start, usable_start
from .states import as_tensor, coordinates_of
from .tagged import TaggedParam

__all__ = ["SharedPoint"]


class SharedPoint:
    """A tagged parameter that processes share, and what a step learns of it.

    Args:
        member: the parameter.
        place: where this process's part lies.
        owner: the rank, in the group, that takes whole steps of it.
    """

    def __init__(self, member: TaggedParam, place: Place, owner: int) -> None:
        self.members, self.group = [member], member.group
        self.member, self.place, self.owner = member, place, owner
        self.laid_out: tuple[object, ...] = ()
        self.tangent: SharedTangent | None = None
        self.angle: Tensor | None = None
        self._length = 0.0
        self._correction: tuple[Any, Tensor] | None = None
        self._renewed: Tensor | None = None
        self._shown: StandIn | None = None

    # The steps of a step ---------------------------------------------------

    def forget(self) -> None:
        """Forget what a step that was not taken has left."""
        self._correction = self._renewed = self._shown = None

    def begin(self, state: State) -> bool:
        """See the point as it is; return whether its master copy is to be made anew."""
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
        self._x = self._block(member.value, self.place.manifold.to_matrices)
        return is_stale

    def renew_master(self) -> None:
        """Make the copy in single precision anew, of values that it is not the origin of."""
        member = self.member
        whole = member.manifold.projx(as_whole(member.param).float())
        self._renewed = _stored_as(member.memory, scattered(whole, member.param))

    def sketch(self, retraction: Retraction, seeds: Seeds) -> Computation:
        """Find the tangent coordinates of the gradient; nothing is changed."""
        self.tangent = shared_tangent(retraction, self.place, self.owner)
        shape = self.place.block.shape
        stored = self._kept.get(START)
        start = None
        # One from before the first step is a mere entry, of an eager base.
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
        """Find, beside the sketch, what keeps rounding from accumulating; an owner polishes."""
        self._correction = None
        if isinstance(self.tangent, InBlocks):
            self._correction = yield from block_correction(
                self.place.block, self._x, step=self._step
            )

    def scale(self, scale: float | Tensor) -> None:
        """Take a multiple of the gradient's coordinates as the move, for plain SGD."""
        assert self.tangent is not None
        self.tangent.scale(scale)

    def show(self, kept_whole: tuple[str, ...] | None) -> Computation:
        """Return what the base is to see of the parameter; None if it is to see nothing here.

        Args:
            kept_whole: of a base that needs whole matrices, what it keeps of their shape.
        """
        assert self.tangent is not None
        local = self.member.value
        found = yield from self.tangent.gradient(self._x)
        state = {key: value for key, value in self._kept.items() if key not in OWN}
        self._has_owner = kept_whole is not None and not self.place.block.is_whole
        self._shown = None
        if not self._has_owner:
            parts = {k: local_part(v) if isinstance(v, Tensor) else v for k, v in state.items()}
            gradient = _stored_as(local, self._tensor(found, local))
            self._shown = StandIn(self.member.param, torch.zeros_like(local), gradient, parts)
            return self._shown
        whole = yield from self._gather(found)
        for key in kept_whole or ():
            if key in state:
                state[key] = yield from self._gather(self._block(local_part(state[key])))
        if whole is not None:
            self._shown = StandIn(self.member.param, torch.zeros_like(whole), whole, state)
        return self._shown

    def read(self, state: State, kept_whole: tuple[str, ...] | None) -> Computation:
        """Take what the base has written into the zeros as the move, and keep its state."""
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
        """Keep the base's state: what has the local part's shape is sharded like the parameter."""
        param, local = self.member.param, self.member.value
        new = {}
        for key, value in found.items():
            is_part = isinstance(value, Tensor) and value.shape == local.shape
            old = kept.get(key)
            if not (is_part and isinstance(old, Tensor) and local_part(old).is_set_to(value)):
                new[key] = sharded_like(value, param) if is_part else value
        kept.update(new)  # all or nothing: bases take some entries for all of them

    def _gather(self, block: Tensor) -> Computation:
        """Return at the owner the whole tensor of which every process has a block."""
        whole = yield from to_owner(self.place, self.owner, block)
        if whole is None:
            return None
        shape = self.member.param.shape
        like = torch.empty(shape, dtype=self.member.value.dtype, device="meta")
        view = self.member.manifold.to_matrices(like).shape
        matrices = whole if whole.shape[-2] == whole.shape[-1] else whole.mH
        matrices = matrices.reshape(view)
        return self.member.manifold.from_matrices(matrices, shape).resolve_conj()

    def _scatter(self, whole: Tensor | None) -> Computation:
        """Return my block of the tensor that its owner has whole."""
        if whole is not None:
            matrices = self.member.manifold.displacement_matrices(whole)
            shape = self.place.block.shape
            whole = (matrices if shape[-2] == shape[-1] else matrices.mH).reshape(shape)
            whole = whole.resolve_conj()
        part = yield from from_owner(self.place, self.owner, whole, self._x)
        return part

    def retract_(self, state: State, *, polish: bool) -> Computation:
        """Move the point, and note what its next step needs."""
        assert self.tangent is not None
        member = self.member
        self.angle = None
        if self._length > 0:  # what has a zero move stays bit for bit as it is
            x = self._x.clone()  # so that an interruption finds the point before or after
            if self._correction is not None and polish:
                due, update = self._correction
                x[due].sub_(update if update.ndim == 2 else update * self._moved(update))
            self.angle = yield from self.tangent.rotate_(x, polish=polish, step=self._step)
            if member.is_rough:
                whole = yield from block_whole(self.place.block, x)
                tall = whole if whole.shape[-1] == whole.shape[-2] else whole.mH
                newton_schulz_(newton_schulz_(tall))
                x.copy_(whole[self.place.block.index])
            self._write_back(x)
        self._note(state)

    def _moved(self, like: Tensor) -> Tensor:
        """Return 1 for each of my matrices that has a move, and 0 for the others."""
        assert self.tangent is not None and self.tangent.move is not None
        moved = (self.tangent.move != 0).flatten(-2).any(dim=-1)
        return moved[self.place.block.index[0]][:, None, None].to(like.dtype)

    def _write_back(self, x: Tensor) -> None:
        member = self.member
        new = self._tensor(x, member.value)
        if member.is_half:  # in one write
            torch._foreach_copy_([member.value, member.memory], [new, new])
        else:
            member.value.copy_(new)

    def _note(self, state: State) -> None:
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
        member.version, member.is_rough = writes_to(member.param), False
        self.forget()
        del self._x, self._kept

    # What is asked of it ---------------------------------------------------

    @property
    def world(self) -> int:
        """How many processes hold a part."""
        return len(self.place.blocks)

    def has_gradient(self) -> bool:
        """Whether this process has a gradient of it."""
        return self.member.param.grad is not None

    def is_written(self) -> bool:
        """Whether this process's part was written to since the last step."""
        if self.member.has_moved():
            self.member.refresh()
        return self.member.version != writes_to(self.member.param)

    def tell(self, flags: list[bool]) -> Computation:
        """Return how many processes say yes to each of some questions."""
        dtype = self.member.value.dtype.to_real()
        (counts,) = yield [torch.tensor(flags, dtype=dtype, device=self.member.value.device)]
        return counts.tolist()

    @property
    def is_finite(self) -> bool:
        """Whether the move is, the same on every process."""
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
        """Return what :meth:`ManifoldOptimizer.last_step` tells of it."""
        told: dict[str, Tensor] = {}
        if self.angle is not None and isinstance(self.tangent, InBlocks):
            v, z = (
                t.reshape(-1, *t.shape[-2:]) for t in (self.tangent.v, self.tangent.coordinates)
            )
            told = {"angle": self.angle.amax(), "directions": v, "coordinates": z}
        return [(self.member.param, told)]

    def error(self) -> Computation:
        """Return the estimated error of the stored point, the worst of a batch."""
        local = self.member.memory
        wide = local.float() if self.member.is_half else local
        x = self._block(wide, self.place.manifold.to_matrices)
        errors = yield from block_error(self.place.block, x)
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
        """Return my block of the matrices that the local part of a tensor is."""
        matrices = (view or self.place.manifold.displacement_matrices)(local)
        parts = [part.stop - part.start for part in self.place.block.index]
        rows, columns = reversed(parts[-2:]) if self.place.is_turned else parts[-2:]
        # A manifold that takes both tall and wide matrices shows those that are wide here turned.
        is_shown_turned = matrices.shape[-2:] != (rows, columns)
        self._shape, self._is_mine = matrices.shape, is_shown_turned == self.place.is_turned
        return (matrices if self._is_mine else matrices.mH).reshape(parts)

    def _tensor(self, x: Tensor, local: Tensor) -> Tensor:
        """Return the local part of the tensor whose block is ``x``."""
        rows = self._shape if self._is_mine else (*self._shape[:-2], *self._shape[:-3:-1])
        matrices = x.reshape(rows) if self._is_mine else x.reshape(rows).mH
        return self.place.manifold.from_matrices(matrices, local.shape)


def _stored_as(like: Tensor, x: Tensor) -> Tensor:
    """Return a copy of ``x`` in the order of memory of ``like``, in which states are loaded.

    In another one torch's elementwise loops round otherwise.
    """
    return torch.empty_like(like, dtype=x.dtype).copy_(x)
