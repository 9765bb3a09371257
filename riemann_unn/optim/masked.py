"""Batches whose steps read nothing: on accelerators, and where a step is to be captured.

Whether a gradient is finite and a point on its manifold are flags on the device. What is not to
move is masked, so that it stays bit for bit as it is.
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

__all__ = ["NONFINITE", "OFF", "OVERFLOW", "MaskedBatch", "Trouble"]

# What can be wrong with a member, in bits.
NONFINITE, OFF, OVERFLOW = 1, 2, 4


class Trouble:
    """What was found wrong with members, in bits, until it is asked for.

    ``trouble`` is on the device, and ``has_told`` looks at what the last copy has brought from it.
    """

    def __init__(self, members: list[TaggedParam]) -> None:
        self.members = members
        self.device = members[0].value.device
        self.trouble = torch.zeros(len(members), dtype=torch.uint8, device=self.device)
        pinned = self.device.type == "cuda"
        self._told = torch.zeros(len(members), dtype=torch.uint8, pin_memory=pinned)
        self._seen = self._told.numpy()

    def tell(self) -> None:
        """Send the host what was found, without waiting for it."""
        self._told.copy_(self.trouble, non_blocking=True)

    def has_told(self) -> bool:
        """Whether something wrong has reached the host; it is not waited for."""
        return bool(self._seen.any())

    def forget(self) -> None:
        """Forget what was wrong."""
        self.trouble.zero_()
        self._told.zero_()


class MaskedBatch(Batch):
    """Tagged parameters that move together without a look at their values.

    ``found`` collects what was found wrong with each member.
    With ``counts_on_device`` the steps taken are counted in tensors, which a captured graph can.
    """

    is_masked = True

    def __init__(self, members: list[TaggedParam], *, counts_on_device: bool) -> None:
        super().__init__(members)
        self.device = members[0].value.device
        self._counts_on_device = counts_on_device
        self.found = Trouble(members)

    # The steps of a step ---------------------------------------------------

    def sketch_(self, retraction: Retraction, seeds: Seeds, scale: float | Tensor | None) -> None:
        """Find the tangent coordinates of the gradients, and what is wrong with them."""
        self._ok: Tensor | None = None
        super().sketch_(retraction, seeds, scale)
        is_thin = isinstance(self.tangent, Directions) and not self.tangent.is_partial(self._x)
        index, correction, estimate = rows_due(self._x, self._step, all_rows=is_thin)
        self._correction = index, correction
        self._is_read = False
        level = acceptance_level(self.members[0].param.dtype)
        # Bytes of flags, since each operation on a device has its price.
        finite = self._of_members(self._is_finite).view(torch.uint8)
        on = self._of_members(estimate <= level).view(torch.uint8)
        self.wrong = torch.add(finite, on, alpha=OFF) ^ (NONFINITE | OFF)

    def show(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return each parameter with zeros and the Riemannian gradient, zero where masked."""
        assert self.tangent is not None
        if self._ok is not None:
            self.tangent.coordinates = self._masked(self.tangent.coordinates)
        return super().show()

    def allow(self, ok: Tensor, *, told: int = NONFINITE | OFF) -> None:
        """Take only the members whose flag is set; the others stay as they are.

        Args:
            ok: for each member, shape ``(members,)``, or one for all.
            told: bits of what is wrong that are to be told of later.
        """
        self._ok = ok.expand(len(self.members))
        self.found.trouble.bitwise_or_(self.wrong if told == NONFINITE | OFF else self.wrong & told)

    def retract_(self, state: State, *, polish: bool) -> None:
        """Move the points, and note what their next step needs."""
        assert self.tangent is not None
        if self._is_read:  # a move may overflow although the gradient is finite
            finite = self._of_members(self._is_finite)
            late = ~finite if self._ok is None else self._ok > finite
            self.found.trouble.bitwise_or_(late.view(torch.uint8) * OVERFLOW)
            self._ok = finite if self._ok is None else self._ok & finite
        elif self._ok is None:
            self._ok = self._of_members(self._is_finite)
        self.found.tell()
        self._move = self._masked(self._move)
        moved = self._moved()
        self._turn_(moved, polish, is_rough=any(member.is_rough for member in self.members))
        self._note(state, moved)

    def _turn_(self, moved: Tensor | None, polish: bool, *, is_rough: bool) -> None:
        assert self.tangent is not None and moved is not None
        x, flags = self._x, moved[..., None, None]
        own = self._seen is not None
        # Moves of zero change no bit but in whole steps, whose map and polish are one.
        in_place = isinstance(self.tangent, Directions) and not is_rough
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
        if is_rough:
            newton_schulz_(newton_schulz_(self._tall(new)))
        if new is not x:
            new = torch.where(flags, new, x)
        self._write_back(new, moved, own)

    # Flags -----------------------------------------------------------------

    def _take(self, move: Tensor) -> None:
        self._move = move
        # Squares of single precision stay inside the exponent range of double.
        wide = torch.complex128 if move.is_complex() else torch.float64
        norms = torch.linalg.vector_norm(move, dim=(-2, -1), dtype=wide)
        self._is_finite = norms < math.inf
        self._is_read = True

    @property
    def is_finite(self) -> bool:
        """True: what is not is masked, and told of later."""
        return True

    def allowed(self) -> list[tuple[TaggedParam, Tensor]]:
        """Return the members with the flags of those that take the step."""
        assert self._ok is not None
        return list(zip(self.members, self._ok.unbind(0), strict=True))

    def _of_members(self, flags: Tensor) -> Tensor:
        """Return for each member whether the flags of all its matrices are set."""
        count = len(self.members)
        return flags.view(count) if flags.numel() == count else flags.view(count, -1).all(dim=1)

    def _mask_directions(self) -> None:
        """Take directions in which there are numbers, where a move of zero leaves points as is."""
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
        """Leave the counts, which are on the device; begin those that are not."""
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
        """Note the rows that start the next sketches, where the last ones were."""
        batch = self._shape[:-2] if len(self.members) > 1 else self._shape[1:-2]
        rows = stored_start(rows.reshape(*batch, *rows.shape[-2:]), self.members[0].param)
        parts = rows.unbind(0) if len(self.members) > 1 else [rows]
        assert self._ok is not None
        for kept, part, ok in zip(self._kept, parts, self._ok.unbind(0), strict=True):
            old = kept.get(START)
            if old is None or old.shape != part.shape:
                # Of a step that is not taken there may be no number in them.
                some = torch.where(ok, part, 0)
                kept[START] = some.clone(memory_format=torch.contiguous_format)
            else:
                torch.where(ok, part, old, out=old)
