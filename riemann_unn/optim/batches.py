"""The grouping of tagged parameters into batches that step together."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Any

from .batch import NOTHING, Batch, State
from .entries import START, STEP
from .masked import Faults, MaskedBatch
from .tagged import TaggedParam
from .transformed import TransformedBatch

__all__ = ["Batches"]


# Number of former batches whose faults on a device may still have to be raised.
_FORMER = 64


class Batches:
    """The batches of the last step.

    Args:
        counts_on_device: whether steps are counted on the device, and nothing is read from any.
    """

    def __init__(self, *, counts_on_device: bool) -> None:
        self._counts_on_device = counts_on_device
        self._by_first: dict[TaggedParam, Batch] = {}
        self._former: deque[Faults] = deque(maxlen=_FORMER)
        # Faults recorded on devices, of current and former batches.
        self.masked: list[Faults] = []

    def of(self, members: list[TaggedParam], state: State) -> list[Batch]:
        """Group members by batch key, number of steps and state; empty parameters are left out."""
        kept = [state.get(member.param, NOTHING) for member in members]
        if len(members) == 1:
            return [self._batch(members, kept)] if members[0].value.numel() > 0 else []
        # Compared one by one, since many tuples at once would trigger the garbage collector.
        if (
            len({member.batch_key for member in members}) == 1
            and (self._counts_on_device or len({known.get(STEP, 0) for known in kept}) == 1)
            and len({START in known for known in kept}) == 1
        ):
            return [self._batch(members, kept)] if members[0].value.numel() > 0 else []
        alike: dict[Hashable, tuple[list[TaggedParam], list[dict[str, Any]]]] = {}
        for member, known in zip(members, kept, strict=True):
            count = None if self._counts_on_device else known.get(STEP, 0)
            key = (member.batch_key, count, START in known)
            some, kept_of_some = alike.setdefault(key, ([], []))
            some.append(member)
            kept_of_some.append(known)
        return [self._batch(*both) for both in alike.values() if both[0][0].value.numel() > 0]

    def _batch(self, members: list[TaggedParam], kept: list[dict[str, Any]]) -> Batch:
        batch = self._by_first.get(members[0])
        if batch is None or batch.members != members:
            if isinstance(batch, MaskedBatch):  # its faults may not have arrived yet
                self._former.append(batch.found)
            batch = self._by_first[members[0]] = self._new(members)
            batches = self._by_first.values()
            found = [one.found for one in batches if isinstance(one, MaskedBatch)]
            self.masked = [*found, *self._former]
        batch._kept = kept
        return batch

    def _new(self, members: list[TaggedParam]) -> Batch:
        if self._counts_on_device or not members[0].value.is_cpu:
            return MaskedBatch(members, counts_on_device=self._counts_on_device)
        return (Batch if members[0].manifold.views_memory else TransformedBatch)(members)
