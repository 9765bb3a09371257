"""The step of parameters that are neither sharded nor replicated: checks, sketches, base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, device
from torch.optim import Optimizer

from ..retractions import Retraction
from .base import is_plain_sgd, plain_scale
from .batch import Batch
from .batches import Batches
from .conditional import step_where
from .deferred import check_capturing, faulty_members, mask_on_device, raise_faults
from .masked import NONFINITE, OFF, MaskedBatch
from .seeds import Seeds
from .tagged import TaggedParam, TaggedParams, admit_, refuse_gradients, refuse_overflow

__all__ = ["LocalStep"]


class LocalStep:
    """The checks and sketches of this process's own tagged parameters.

    Args:
        base: the base optimizer.
        tagged: its tagged parameters.
        seeds: of the sketches.
        retraction_of: of a group.
        capturable: whether nothing is to be read from a device.
        nonfinite: see :class:`ManifoldOptimizer`.
        off_manifold: likewise.
    """

    def __init__(
        self,
        base: Optimizer,
        tagged: TaggedParams,
        seeds: Seeds,
        retraction_of: Callable[[dict[str, Any]], Retraction],
        *,
        capturable: bool,
        nonfinite: Literal["raise", "skip"],
        off_manifold: Literal["raise", "project"],
    ) -> None:
        self._base, self._tagged, self._seeds = base, tagged, seeds
        self._retraction_of, self._capturable = retraction_of, capturable
        self._nonfinite, self._off_manifold = nonfinite, off_manifold
        self._batches = Batches(counts_on_device=capturable)
        # For devices that are not read, a flag whether the step is taken.
        self._taken: dict[device, Tensor] = {}

    def synchronize(self) -> None:
        """Wait for the devices, and raise the faults that they have recorded."""
        raise_faults(self._batches.masked)

    def raise_arrived(self) -> None:
        """Raise the faults that have reached the host, without waiting for others."""
        for batch in self._batches.masked:
            if batch.has_arrived():
                self.synchronize()

    def sketch_(self) -> tuple[list[Batch], list[TaggedParam]]:
        """Find the tangent coordinates of all gradients, after the checks; nothing has changed.

        Returns:
            The batches that take the step, and the parameters left out of it.
        """
        self._taken = {}
        groups, written = self._tagged.with_gradients()
        batches: list[Batch] = []
        for members in groups:
            batches += self._batches.of(members, self._base.state)
        return self._sketch(batches, written)

    def _sketch(
        self, batches: list[Batch], written: list[TaggedParam]
    ) -> tuple[list[Batch], list[TaggedParam]]:
        # A sketch shows whether its gradient is finite, unless its factorisation fails on NaN. The
        # gradient is checked first where a point is to be projected.
        skipped: list[TaggedParam] = []
        if written or not all(map(self._shows_nonfinite, batches)):
            projects = bool(written) and self._off_manifold == "project"
            shows = self._shows_nonfinite
            unchecked = [
                b for b in batches if projects or (written and not b.is_masked) or not shows(b)
            ]
            skipped = self._nonfinite_in(unchecked)
            batches = self._without(skipped, batches)
            admit_([m for m in written if m not in skipped], off_manifold=self._off_manifold)
        is_fine = True
        for batch in batches:
            group = batch.group
            batch.sketch_(self._retraction_of(group), self._seeds, plain_scale(self._base, group))
            is_fine = is_fine and batch.is_finite and not batch.is_masked
        bad = [] if is_fine else self._rejected(batches)
        if not bad:
            return batches, skipped
        batches, later = self._sketch(self._without(bad, batches), [])
        return batches, skipped + bad + later

    def _rejected(self, batches: list[Batch]) -> list[TaggedParam]:
        """Raise for faults, or return the members to skip; masked batches are read once."""
        wrong = [batch for batch in batches if not batch.is_finite]
        masked = [batch for batch in batches if isinstance(batch, MaskedBatch)]
        bad = self._nonfinite_in(wrong)
        if wrong and not bad:
            refuse_overflow(member for batch in wrong for member in batch.overflowing())
        if not masked:
            return bad
        check_capturing(masked, capturable=self._capturable)
        if self._capturable:
            self._taken = mask_on_device(masked, nonfinite=self._nonfinite)
            return bad
        codes = faulty_members(masked)
        admit_([m for m, code in codes if code & OFF], off_manifold=self._off_manifold)
        late = [member for member, code in codes if code & NONFINITE]
        if late and self._nonfinite == "raise":
            refuse_gradients(late)
        return bad + late

    def _shows_nonfinite(self, batch: Batch) -> bool:
        return batch.is_masked or self._retraction_of(batch.group).shows_nonfinite

    def _nonfinite_in(self, batches: list[Batch]) -> list[TaggedParam]:
        bad = [member for batch in batches for member in batch.nonfinite_gradients()]
        if bad and self._nonfinite == "raise":
            refuse_gradients(bad)
        return bad

    def _without(self, bad: list[TaggedParam], batches: list[Batch]) -> list[Batch]:
        if not bad:
            return batches
        kept = [[m for m in batch.members if m not in bad] for batch in batches]
        state = self._base.state
        return [batch for some in kept if some for batch in self._batches.of(some, state)]

    def shown(self, batches: list[Batch]) -> list[Batch]:
        """Return the batches that the base has to see: all but those of plain SGD."""
        return [batch for batch in batches if not is_plain_sgd(self._base, batch.group)]

    def step_base_(self, step: Callable[[], None], shown: list[Batch]) -> None:
        """Step the base; on devices that are not read its writes are kept or undone by flag."""
        if not self._taken:
            step()
            return
        others = [
            (p, self._taken[p.device])
            for p in self._tagged.others
            if p.grad is not None and p.device in self._taken
        ]
        seen = [
            (member.param, ok)
            for batch in shown
            if isinstance(batch, MaskedBatch)
            for member, ok in batch.unmasked()
        ]
        step_where(self._base, step, others, [*others, *seen])
