"""Known tags: the tagged parameters an optimizer had when last seen, so that a lost one shows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..errors import LostTagError
from .attribute import is_constrained
from .causes import swapped
from .memory import refuse_replaced, tell_of_untagging

__all__ = ["KnownTags"]

Group = dict[str, Any]


class KnownTags:
    """The tagged parameters of an optimizer's groups, as they were last seen.

    Whoever is told of a change looks again. A parameter may leave the groups, or lose its tag by
    :func:`riemann_unn.untag_`, of which all that know it are told; by accident it may not.
    """

    def __init__(self) -> None:
        self.is_stale = False
        self._tagged: list[tuple[str, Tensor, Group]] = []
        self._params: list[Tensor] = []
        self._groups: list[Group] = []
        tell_of_untagging(self)

    def forget(self, p: Tensor) -> None:
        """Take note that a parameter was untagged on purpose."""
        kept = [entry for entry in self._tagged if entry[1] is not p]
        self.is_stale = self.is_stale or len(kept) < len(self._tagged)
        self._tagged = kept

    def look(self, groups: list[Group], tagged: Iterable[tuple[str, Tensor, Group]]) -> None:
        """See which parameters are tagged now, and refuse it if one has lost its tag.

        Args:
            groups: the groups of the optimizer.
            tagged: name, parameter and group of each tagged one.

        Raises:
            LostTagError: naming the parameter; what was known before is still known.
        """
        tagged = list(tagged)
        still = {id(p) for _, p, _ in tagged}
        params = [p for group in groups for p in group["params"]]
        missing = [entry for entry in self._tagged if id(entry[1]) not in still]
        self._refuse_untagged(missing, {id(p) for p in params})
        self._refuse_newcomers(missing, groups, still)
        refuse_replaced(p for p in params if id(p) not in still)
        self._tagged, self._params, self._groups = tagged, params, list(groups)
        self.is_stale = False

    def _refuse_untagged(self, missing: list[tuple[str, Tensor, Group]], params: set[int]) -> None:
        for name, p, _ in missing:
            if id(p) in params and not is_constrained(p):
                raise LostTagError(
                    f"{name} has lost its tag since the optimizer last saw it, and would be "
                    f"trained unconstrained; {swapped()}. Where it is to be free, call "
                    "riemann_unn.untag_. Nothing was changed"
                )

    def _refuse_newcomers(
        self, missing: list[tuple[str, Tensor, Group]], groups: list[Group], tagged: set[int]
    ) -> None:
        """Refuse an untagged parameter that has come as a tagged one has gone."""
        seen = {id(p) for p in self._params} | tagged
        for name, _, group in missing:
            here = next((g for g in groups if g is group), None)
            if here is None:  # its group was left out, or another dict was put in its place
                index = next(i for i, g in enumerate(self._groups) if g is group)
                put = groups[index] if index < len(groups) else None
                here = None if any(put is g for g in self._groups) else put
            if here is not None and any(id(p) not in seen for p in here["params"]):
                raise LostTagError(
                    f"{name} is no longer in param_groups, and an untagged parameter was put in "
                    "its group, which would be trained unconstrained; call riemann_unn.tag_ on the "
                    "new parameter, or riemann_unn.untag_ on the old one before. Nothing was "
                    "changed"
                )
