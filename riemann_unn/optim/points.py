"""Points: the tagged parameters of an optimizer, their names, and the checks they must pass."""

from __future__ import annotations

import cmath
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import groupby, repeat
from operator import attrgetter, is_
from typing import Any

import geoopt
import torch
from torch import Tensor

from ..errors import ManifoldError, ManifoldTypeError
from ..manifolds import MatrixManifold, Stiefel
from ..tagging import manifold_of

__all__ = [
    "Members",
    "Point",
    "Roster",
    "as_groups",
    "check_duplicates",
    "check_kind",
    "full_precision",
    "nonfinite",
    "without",
]


# What points must have in common to move together: group, manifold, shape, dtype and device, and
# being small; a large one is alone with its number.
Kind = tuple[int, MatrixManifold, torch.Size, torch.dtype, int, torch.device]
# Matrices up to this size are cheaper to move together than one by one.
_STACK_UP_TO = 128 * 128
# With many points the interpreter's own loops take longer than what is asked of each.
_PARAM, _GRAD, _LAYOUT = attrgetter("param"), attrgetter("grad"), attrgetter("layout")
_DTYPE = attrgetter("dtype")
_MEMORY, _VERSION, _COUNT = attrgetter("memory"), attrgetter("version"), attrgetter("_version")


@dataclass(eq=False, slots=True)
class Point:
    """A tagged parameter in its group, under the name that messages give it.

    ``memory`` is the parameter's, as it was last seen, and ``value`` is what moves:
    the same, or the master copy in single precision of a parameter that is stored
    in half. ``version`` counts the writes to it when it was last found on its
    manifold, and points of one ``kind``, numbered in ``kinds``, can move together.
    """

    name: str
    param: Tensor
    group: dict[str, Any]
    tag: object
    manifold: MatrixManifold
    kinds: dict[Kind, int]
    memory: Tensor = field(init=False)
    value: Tensor = field(init=False)
    version: int | None = field(init=False)
    kind: int = field(init=False)
    is_half: bool = field(init=False)

    def __post_init__(self) -> None:
        self.meet()

    def meet(self) -> None:
        """See the parameter's memory as it is now; nothing is known of its values."""
        # A plain tensor: torch asks of each parameter in a list whether it overrides functions.
        self.memory = self.value = value = self.param.detach()
        self.version = None
        reason = self.manifold.why_not(value.shape, value.dtype)
        is_small = reason is None and _is_small(self.matrices(value))
        alone = 0 if is_small else id(self)
        kind = (id(self.group), self.manifold, value.shape, value.dtype, alone, value.device)
        self.kind = self.kinds.setdefault(kind, len(self.kinds))
        # Stored too coarsely to be a point itself.
        self.is_half = value.dtype in (torch.float16, torch.bfloat16)

    def matrices(self, x: Tensor) -> Tensor:
        """Return the manifold's matrix view of a tensor of the parameter's shape."""
        return self.manifold.to_matrices(x)


def _are_where_they_were(params: list[Tensor], memories: list[Tensor]) -> bool:
    """Clear parameters that are what they were, in one quick look; it never accuses."""
    try:
        same = all(map(Tensor.is_set_to, params, memories))
    except NotImplementedError:  # it is not on every device
        return False
    return same and all(map(is_, map(_DTYPE, params), map(_DTYPE, memories)))


def _meet_where_they_are(points: list[Point]) -> None:
    for point in points:
        now, then = point.param, point.memory
        if (now.data_ptr(), now.shape, now.stride(), now.dtype) != (
            then.data_ptr(),
            then.shape,
            then.stride(),
            then.dtype,
        ):
            point.meet()


def _refuse_sparse(points: list[Point], grads: list[Tensor]) -> None:
    for point, grad in zip(points, grads, strict=True):
        if grad.layout is not torch.strided:
            raise ManifoldTypeError(
                f"{point.name} has a sparse gradient, and a manifold step is dense; "
                "use sparse=False in its module. Nothing was changed"
            )


def _is_small(matrices: Tensor) -> bool:
    return matrices.shape[-2:].numel() <= _STACK_UP_TO


@dataclass(eq=False)
class Members:
    """Points of one group that have a gradient, and their gradients."""

    points: list[Point]
    grads: list[Tensor]

    def without(self, bad: list[Point]) -> Members:
        """Leave points out."""
        kept = [pair for pair in zip(self.points, self.grads, strict=True) if pair[0] not in bad]
        return Members([point for point, _ in kept], [grad for _, grad in kept])


class Roster:
    """The points of some groups, kept between steps for as long as nobody changes them."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self._groups = groups
        self._seen: list[tuple[Tensor, object, dict[str, Any]]] = []
        self._points: list[Point] = []
        self._by_group: list[list[Point]] = []
        self._others: list[Tensor] = []
        self._kinds: dict[Kind, int] = {}

    def with_gradients(self) -> tuple[list[Members], list[Point]]:
        """Return the points that have a gradient, and those that were written to since they moved.

        Raises:
            ManifoldTypeError: a gradient is sparse, or see :meth:`points`.
            ManifoldError: a parameter has become one that its manifold does not take.
        """
        groups: list[Members] = []
        written: list[Point] = []
        self.points()
        for points in self._by_group:
            params = list(map(_PARAM, points))
            grads = list(map(_GRAD, params))
            if any(map(is_, grads, repeat(None))):
                points = [
                    point for point, grad in zip(points, grads, strict=True) if grad is not None
                ]
                params = list(map(_PARAM, points))
                grads = [grad for grad in grads if grad is not None]
            if not points:
                continue
            if set(map(_LAYOUT, grads)) != {torch.strided}:
                _refuse_sparse(points, grads)
            if not _are_where_they_were(params, list(map(_MEMORY, points))):
                _meet_where_they_are(points)
            counts = list(map(_COUNT, params))
            if counts != list(map(_VERSION, points)):
                for point, count in zip(points, counts, strict=True):
                    if point.version != count:
                        if point.memory._version != count:
                            point.meet()  # after torch.utils.swap_tensors they count apart
                        check_kind(point)
                        written.append(point)
            groups.append(Members(points, grads))
        return groups, written

    def points(self) -> list[Point]:
        """Return the tagged parameters in their order.

        Raises:
            ManifoldTypeError: a parameter is on a manifold this package does not
                know, so that it would be trained as if it were on none.
        """
        if not self._is_current():
            known = {(id(point.param), id(point.group)): point for point in self._points}
            found = []
            for point in _tagged(self._groups, self._kinds):
                old = known.get((id(point.param), id(point.group)))
                found.append(point if old is None or old.tag is not point.tag else old)
            self._points, tagged = found, {id(point.param) for point in found}
            by_group = groupby(found, key=lambda point: id(point.group))
            self._by_group = [list(points) for _, points in by_group]
            self._others = [
                p for group in self._groups for p in group["params"] if id(p) not in tagged
            ]
            self._seen = [
                (p, getattr(p, "manifold", None), group)
                for group in self._groups
                for p in group["params"]
            ]
        return self._points

    @property
    def device_types(self) -> set[str]:
        """The types of the devices that points are, or once were, on."""
        return {kind[-1].type for kind in self._kinds}

    @property
    def others(self) -> list[Tensor]:
        """The parameters without a tag when the points were last asked for."""
        return self._others

    def _is_current(self) -> bool:
        seen = iter(self._seen)
        for group in self._groups:
            for p in group["params"]:
                was, tag, owner = next(seen, (None, None, None))
                if was is not p or owner is not group or tag is not getattr(p, "manifold", None):
                    return False
        return next(seen, None) is None


def _tagged(groups: list[dict[str, Any]], kinds: dict[Kind, int]) -> Iterator[Point]:
    for index, group in enumerate(groups):
        names = group.get("param_names")
        for i, p in enumerate(group["params"]):
            tag = getattr(p, "manifold", None)
            manifold = manifold_of(p) or _same_as(tag)
            if manifold is not None:
                given = names[i] if names else getattr(p, "tagged_as", None)
                where = f"param_groups[{index}]['params'][{i}] of shape {tuple(p.shape)}"
                name = where if given is None else repr(given)
                yield Point(name, p, group, tag, manifold, kinds)
            elif isinstance(tag, geoopt.Manifold) and not isinstance(tag, geoopt.Euclidean):
                raise ManifoldTypeError(
                    f"a parameter of shape {tuple(p.shape)} is on {tag!r}, which is not a "
                    "manifold of this package, so it would be trained unconstrained; tag it with "
                    "riemann_unn.tag_"
                )


def _same_as(manifold: object) -> MatrixManifold | None:
    """Return ours for geoopt's Stiefel manifolds: they ask the same of a point."""
    return Stiefel() if isinstance(manifold, geoopt.Stiefel) else None


def as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Return groups with their parameters in lists; the caller's dicts are left as they are."""
    if isinstance(params, Tensor):
        raise ManifoldTypeError(
            "params must be an iterable of parameters or groups, not one tensor"
        )
    items = list(params)
    if not items:
        raise ManifoldError("the optimizer got an empty parameter list")
    groups = [dict(g) for g in items] if isinstance(items[0], dict) else [{"params": items}]
    for group in groups:
        given = group["params"]
        if not isinstance(given, set):  # torch refuses sets with a message of its own
            group["params"] = [given] if isinstance(given, Tensor) else list(given)
    return groups


def check_duplicates(params: Iterable[Any]) -> None:
    """Refuse a list of parameters, or of names with parameters, that holds one twice.

    Raises:
        ManifoldError: naming the parameter.
    """
    seen: set[int] = set()
    for i, item in enumerate(params):
        p = item[1] if isinstance(item, tuple) else item
        if id(p) in seen:
            name = repr(item[0]) if isinstance(item, tuple) else f"number {i}"
            raise ManifoldError(
                f"parameter {name} is given twice and would be moved twice a step; give it once"
            )
        seen.add(id(p))


def check_kind(point: Point) -> None:
    """Refuse a parameter whose shape or dtype its manifold does not take.

    Raises:
        ManifoldError: naming the parameter.
    """
    reason = point.manifold.why_not(point.param.shape, point.param.dtype)
    if reason is not None:
        raise ManifoldError(f"{point.name} is tagged {point.manifold!r} but {reason}")


def nonfinite(points: list[Point], tensors: list[Tensor]) -> list[Point]:
    """Return the points whose tensor holds NaN or infinity, after one quick look at all."""
    pairs = [(point, t) for point, t in zip(points, tensors, strict=True) if t.numel() > 0]
    if not pairs:
        return []
    # The sum of a finite tensor can overflow, so it only clears, never accuses.
    alike: dict[int, list[Tensor]] = {}
    for point, t in pairs:
        alike.setdefault(point.kind, []).append(t)
    sums = []
    for some in alike.values():
        together = len(some) > 1 and len({(t.shape, t.dtype) for t in some}) == 1
        sums += [torch.stack(some).sum()] if together else [t.sum() for t in some]
    if len(sums) > 4 and len({(t.device, t.dtype) for t in sums}) == 1:
        sums = [torch.stack(sums).sum()]
    if all(cmath.isfinite(t.item()) for t in sums):
        return []
    return [point for point, t in pairs if not bool(torch.isfinite(t).all())]


def without(bad: list[Point], groups: list[Members]) -> list[Members]:
    """Leave points out, and groups that have no others."""
    return [kept for kept in (members.without(bad) for members in groups) if kept.points]


def full_precision(device_types: Iterable[str]) -> AbstractContextManager[object]:
    """Switch autocast off on some types of devices."""
    active = [device for device in device_types if torch.is_autocast_enabled(device)]
    if not active:
        return nullcontext()
    stack = ExitStack()
    for device in active:
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack
