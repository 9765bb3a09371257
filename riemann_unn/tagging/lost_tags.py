"""Detection of lost tags: an optimizer's tagged parameters are compared with the last ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..errors import LostTagError
from .attribute import is_constrained
from .causes import swapped
from .memory import on_untagging, refuse_replaced

__all__ = ["KnownTags"]

Group = dict[str, Any]


class KnownTags:
    """The tagged parameters of an optimizer's groups at the last update.

    A parameter may leave the groups, or lose its tag by :func:`riemann_unn.untag_`, which makes
    these records stale. Any other loss of a tag is an error.
    """

    def __init__(self) -> None:
        self.is_stale = False
        self._tagged: list[tuple[str, Tensor, Group]] = []
        self._params: list[Tensor] = []
        self._groups: list[Group] = []
        on_untagging(self)

    def forget(self, p: Tensor) -> None:
        """Drop a parameter that was untagged on purpose."""
        kept = [entry for entry in self._tagged if entry[1] is not p]
        self.is_stale = self.is_stale or len(kept) < len(self._tagged)
        self._tagged = kept

    def update(self, groups: list[Group], tagged: Iterable[tuple[str, Tensor, Group]]) -> None:
        """Record the tagged parameters, and refuse those that have lost their tag.

        Args:
            groups: the groups of the optimizer.
            tagged: name, parameter and group of each tagged one.

        Raises:
            LostTagError: naming the parameter; the record is not changed.
        """
        tagged = list(tagged)
        still = {id(p) for _, p, _ in tagged}
        params = [p for group in groups for p in group["params"]]
        missing = [entry for entry in self._tagged if id(entry[1]) not in still]
        self._refuse_untagged(missing, {id(p) for p in params})
        self._refuse_replacements(missing, groups, still)
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

    def _refuse_replacements(
        self, missing: list[tuple[str, Tensor, Group]], groups: list[Group], tagged: set[int]
    ) -> None:
        """Refuse an untagged parameter that was put in the group of a missing tagged one."""
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
