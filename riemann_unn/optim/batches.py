"""Which tagged parameters take a step side by side."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Any

from .batch import NOTHING, Batch, State
from .entries import START, STEP
from .masked import MaskedBatch, Trouble
from .tagged import TaggedParam
from .transformed import TransformedBatch

__all__ = ["Batches"]


# So many batches that were given up are remembered, for what a device has to tell of them.
_FORMER = 64


class Batches:
    """The batches of the last step.

    Args:
        counts_on_device: whether steps are counted on the device, and nothing is read from any.
    """

    def __init__(self, *, counts_on_device: bool) -> None:
        self._counts_on_device = counts_on_device
        self._by_first: dict[TaggedParam, Batch] = {}
        self._former: deque[Trouble] = deque(maxlen=_FORMER)
        # What devices have found wrong, in the batches there are and in former ones.
        self.masked: list[Trouble] = []

    def of(self, members: list[TaggedParam], state: State) -> list[Batch]:
        """Put what can move together together: one kind, as many steps taken; nothing empty."""
        kept = [state.get(member.param, NOTHING) for member in members]
        if len(members) == 1:
            return [self._batch(members, kept)] if members[0].value.numel() > 0 else []
        # Asked one by one, since many keys at once would set the garbage collector to work.
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
            if isinstance(batch, MaskedBatch):  # of which something may be on its way
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
