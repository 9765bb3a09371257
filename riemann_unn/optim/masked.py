"""Batches whose steps do not read from the device, for accelerators and CUDA graphs.

Whether a gradient is finite and a point on its manifold are flags on the device. Points that may
not move are masked, so that they stay unchanged bit for bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..linalg.step.masked_polish import rows_due
from ..linalg.step.polish import newton_schulz_
from ..manifolds import acceptance_level
from ..retractions import Directions, Retraction
from .batch import Batch, State
from .entries import START, STEP
from .seeds import Seeds
from .starts import stored_start
from .tagged import TaggedParam

__all__ = ["NONFINITE", "OFF", "OVERFLOW", "Faults", "MaskedBatch"]

# The faults of a member, as bits.
NONFINITE, OFF, OVERFLOW = 1, 2, 4


class Faults:
    """The recorded faults of members, as bits on the device.

    ``bits`` is on the device; :meth:`has_arrived` reads the copy on the host.
    """

    def __init__(self, members: list[TaggedParam]) -> None:
        self.members = members
        self.device = members[0].value.device
        self.bits = torch.zeros(len(members), dtype=torch.uint8, device=self.device)
        pinned = self.device.type == "cuda"
        self._arrived = torch.zeros(len(members), dtype=torch.uint8, pin_memory=pinned)
        self._seen = self._arrived.numpy()

    def send_to_host(self) -> None:
        """Copy the bits to the host without waiting."""
        self._arrived.copy_(self.bits, non_blocking=True)

    def has_arrived(self) -> bool:
        """Whether a fault has reached the host; does not wait."""
        return bool(self._seen.any())

    def forget(self) -> None:
        """Clear the bits."""
        self.bits.zero_()
        self._arrived.zero_()


class MaskedBatch(Batch):
    """Tagged parameters that are stepped together without reading their values.

    ``found`` records the faults of each member.
    With ``counts_on_device`` steps are counted in tensors, as a captured graph needs.
    """

    is_masked = True

    def __init__(self, members: list[TaggedParam], *, counts_on_device: bool) -> None:
        super().__init__(members)
        self.device = members[0].value.device
        self._counts_on_device = counts_on_device
        self.found = Faults(members)

    # The steps of a step ---------------------------------------------------

    def sketch_(self, retraction: Retraction, seeds: Seeds, scale: float | Tensor | None) -> None:
        """Find the tangent coordinates of the gradients, and the faults of the members."""
        self._ok: Tensor | None = None
        super().sketch_(retraction, seeds, scale)
        is_thin = isinstance(self.tangent, Directions) and not self.tangent.is_partial(self._x)
        index, correction, estimate = rows_due(self._x, self._step, all_rows=is_thin)
        self._correction = index, correction
        self._is_read = False
        level = acceptance_level(self.members[0].param.dtype)
        # Flags as bytes, which takes fewer operations on the device.
        finite = self._of_members(self._is_finite).view(torch.uint8)
        on = self._of_members(estimate <= level).view(torch.uint8)
        self.wrong = torch.add(finite, on, alpha=OFF) ^ (NONFINITE | OFF)

    def show(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return each parameter with zeros and the Riemannian gradient, zero where masked."""
        assert self.tangent is not None
        if self._ok is not None:
            self.tangent.coordinates = self._masked(self.tangent.coordinates)
        return super().show()

    def mask(self, ok: Tensor, *, recorded: int = NONFINITE | OFF) -> None:
        """Step only the members whose flag is set; the others do not change.

        Args:
            ok: for each member, shape ``(members,)``, or one for all.
            recorded: the faults to record, as bits.
        """
        self._ok = ok.expand(len(self.members))
        self.found.bits.bitwise_or_(
            self.wrong if recorded == NONFINITE | OFF else self.wrong & recorded
        )

    def retract_(self, state: State, *, polish: bool) -> None:
        """Move the points, and save the state for their next step."""
        assert self.tangent is not None
        if self._is_read:  # a move may overflow although the gradient is finite
            finite = self._of_members(self._is_finite)
            late = ~finite if self._ok is None else self._ok > finite
            self.found.bits.bitwise_or_(late.view(torch.uint8) * OVERFLOW)
            self._ok = finite if self._ok is None else self._ok & finite
        elif self._ok is None:
            self._ok = self._of_members(self._is_finite)
        self.found.send_to_host()
        self._move = self._masked(self._move)
        moved = self._moved()
        self._rotate_(moved, polish, is_inexact=any(member.is_inexact for member in self.members))
        self._save_state(state, moved)

    def _rotate_(self, moved: Tensor | None, polish: bool, *, is_inexact: bool) -> None:
        assert self.tangent is not None and moved is not None
        x, flags = self._x, moved[..., None, None]
        own = self._seen is not None
        # A zero move changes no bit, except in whole steps, whose map includes the polish.
        in_place = isinstance(self.tangent, Directions) and not is_inexact
        new = x if own and in_place else x.clone()
        index, correction = self._correction
        if polish and isinstance(self.tangent, Directions):
            correction = torch.where(flags, correction, 0)
            if index is None:
                new.sub_(correction)
            else:
                new.index_add_(-2, index, correction, alpha=-1)
        if new is x:
            self._mask_directions()
        self.angle = self.tangent.rotate_(new, self._move)
        if is_inexact:
            newton_schulz_(newton_schulz_(self._tall(new)))
        if new is not x:
            new = torch.where(flags, new, x)
        self._write_back(new, moved, own)

    # Flags -----------------------------------------------------------------

    def _set_move(self, move: Tensor) -> None:
        self._move = move
        # In double, squares of single precision cannot overflow.
        wide = torch.complex128 if move.is_complex() else torch.float64
        norms = torch.linalg.vector_norm(move, dim=(-2, -1), dtype=wide)
        self._is_finite = norms < math.inf
        self._is_read = True

    @property
    def is_finite(self) -> bool:
        """True: members that are not finite are masked, and their faults recorded."""
        return True

    def unmasked(self) -> list[tuple[TaggedParam, Tensor]]:
        """Return the members with their flags, set where they take the step."""
        assert self._ok is not None
        return list(zip(self.members, self._ok.unbind(0), strict=True))

    def _of_members(self, flags: Tensor) -> Tensor:
        """Return for each member whether the flags of all its matrices are set."""
        count = len(self.members)
        return flags.view(count) if flags.numel() == count else flags.view(count, -1).all(dim=1)

    def _mask_directions(self) -> None:
        """Replace the directions of masked members by finite ones, so that a zero move is exact."""
        assert isinstance(self.tangent, Directions)
        self.tangent.v = self._masked(self.tangent.v, self._x.shape[-1] ** -0.5)
        if self.tangent.xv is not None:
            self.tangent.xv = self._masked(self.tangent.xv)

    def _masked(self, coordinates: Tensor, otherwise: float = 0.0) -> Tensor:
        assert self._ok is not None
        count = len(self.members)
        flags = self._ok.reshape(count, *[1] * coordinates.ndim)
        some = coordinates.reshape(count, -1, *coordinates.shape[-2:])
        masked: Tensor = torch.where(
            flags[..., 0] if some.ndim < flags.ndim else flags, some, otherwise
        )
        return masked.reshape(coordinates.shape)

    # Memory ----------------------------------------------------------------

    def _moved_members(self, moved: Tensor | None) -> list[int]:
        return list(range(len(self.members)))

    def _count(self) -> None:
        """Counts on the device are updated in place; others as in a batch."""
        if not self._counts_on_device:
            super()._count()
            return
        assert self._ok is not None
        for kept, ok in zip(self._kept, self._ok.unbind(0), strict=True):
            count = kept.get(STEP, 0)
            if not isinstance(count, Tensor):
                count = torch.full((), count, dtype=torch.int64, device=self.device)
            kept[STEP] = count.add_(ok)

    def _keep_starts(self, rows: Tensor) -> None:
        """Save the rows that start the next sketches, in the memory of the last ones."""
        batch = self._shape[:-2] if len(self.members) > 1 else self._shape[1:-2]
        rows = stored_start(rows.reshape(*batch, *rows.shape[-2:]), self.members[0].param)
        parts = rows.unbind(0) if len(self.members) > 1 else [rows]
        assert self._ok is not None
        for kept, part, ok in zip(self._kept, parts, self._ok.unbind(0), strict=True):
            old = kept.get(START)
            if old is None or old.shape != part.shape:
                # The rows of a masked step may hold NaN.
                some = torch.where(ok, part, 0)
                kept[START] = some.clone(memory_format=torch.contiguous_format)
            else:
                torch.where(ok, part, old, out=old)
