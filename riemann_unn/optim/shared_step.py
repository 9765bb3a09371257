"""The joint part of a step of shared parameters: placements, checks and sketches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from hashlib import blake2b
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ManifoldError
from ..manifolds import acceptance_level, rounding_level
from ..parallel import Computation, Group, as_whole, is_sharded, scattered, together, writes_to
from ..parallel.placement import placement_of
from ..retractions import Retraction
from .batch import State
from .seeds import Seeds
from .shared import SharedParam
from .tagged import TaggedParam, refuse_gradients, refuse_off_manifold, refuse_overflow

__all__ = ["SharedParams"]

Answer = Literal["raise", "skip"]


class SharedParams:
    """The tagged parameters of an optimizer that several processes share.

    Every process calls every method, with the same parameters in the same order.

    Args:
        group: of plain parameters, of which each of its processes has a replica.
    """

    def __init__(self, group: Group | None) -> None:
        self.group = group
        self._points: dict[TaggedParam, SharedParam] = {}
        self._loads: dict[int, int] = {}

    @property
    def known(self) -> list[SharedParam]:
        """The parameters of the last step."""
        return list(self._points.values())

    def of(self, members: Iterable[TaggedParam]) -> list[SharedParam]:
        """Return the shared parameters of members, with placements where new or changed."""
        found = []
        for member in members:
            point = self._points.get(member)
            if point is None or point.layout != layout_of(member.param):
                placement = placement_of(member.name, member.param, member.manifold, self.group)
                point = SharedParam(member, placement, self._owner(placement.group, member.param))
                point.layout = layout_of(member.param)
            found.append(point)
        self._points = {point.member: point for point in found}
        return found

    def _owner(self, group: Group, p: Tensor) -> int:
        """Assign whole steps to the process with the least work so far."""
        ranks = range(dist.get_world_size(group))
        owner = min(ranks, key=lambda rank: self._loads.get(rank, 0))
        self._loads[owner] = self._loads.get(owner, 0) + p.numel()
        return owner

    # Checks -----------------------------------------------------------------

    def admit_(
        self, points: list[SharedParam], *, off_manifold: Literal["raise", "project"]
    ) -> bool:
        """Check that points are on their manifolds; project or refuse those that are not.

        Returns:
            Whether any was projected.

        Raises:
            OffManifoldError: naming the parameter and the remedy, on every process.
            ManifoldError: replicas differ between processes.
        """
        if not points:
            return False
        errors = self._run(points, SharedParam.error)
        self._check_replicas(points)
        off = []
        for point, error in zip(points, errors, strict=True):
            member, dtype = point.member, point.member.param.dtype
            if not error <= acceptance_level(dtype):
                off.append((member, f"is {error:.1e} off {member.manifold!r}", error == error))
            elif member.manifold.det is not None and not member.manifold.has_det(
                as_whole(member.param)
            ):
                off.append((member, f"has the other determinant than {member.manifold!r}", True))
            elif error > rounding_level(dtype):
                member.is_inexact = True
        for member, reason, is_finite in off:
            if off_manifold == "raise" or not is_finite:
                refuse_off_manifold(member, reason, is_finite=is_finite)
        for member, _, _ in off:
            whole = member.manifold.projx(as_whole(member.param))
            member.memory.copy_(scattered(whole, member.param))
        for point in points:
            point.member.version = writes_to(point.member.param)
        return bool(off)

    def _check_replicas(self, points: list[SharedParam]) -> None:
        replicas = [point for point in points if point.placement.is_averaged]

        def compare(point: SharedParam) -> Computation:
            values = point.member.memory.contiguous().resolve_conj().view(torch.uint8)
            digest = blake2b(values.cpu().numpy().tobytes(), digest_size=16).digest()
            words = [int.from_bytes(digest[i : i + 4], "big") for i in range(0, 16, 4)]
            mine = torch.tensor(words, dtype=torch.float64, device=values.device)
            (total,) = yield [mine]
            (differ,) = yield [(total != mine * point.world).any().double()[None]]
            return bool(differ)

        differ = self._run(replicas, compare)
        names = [p.member.name for p, differs in zip(replicas, differ, strict=True) if differs]
        if names:
            raise ManifoldError(
                f"{', '.join(names)} differs between the processes of process_group, and replicas "
                "that begin apart stay apart; call riemann_unn.exclude_from_ddp_ on the model on "
                "every process, which sends the values of the first to all"
            )

    def _run(
        self, points: list[SharedParam], method: Callable[[SharedParam], Computation]
    ) -> list[Any]:
        return together((point.placement.group, method(point)) for point in points)

    # The step ---------------------------------------------------------------

    def sketch_(
        self,
        points: list[SharedParam],
        state: State,
        *,
        retraction: Callable[[dict[str, Any]], Retraction],
        seeds: Seeds,
        error: Exception | None,
        nonfinite: Answer,
        off_manifold: Literal["raise", "project"],
    ) -> tuple[list[SharedParam], list[SharedParam]]:
        """Find the tangent coordinates of all gradients, after the checks; nothing has changed.

        The first sums also count the processes that have a gradient, that were written to and that
        have an error, so that all go on or none does.

        Args:
            points: all shared parameters, with a gradient or not.
            state: of the base.
            retraction: of a group.
            seeds: of the sketches.
            error: an error of this process's own, which every process is to raise.
            nonfinite: what to do at a gradient with NaN or infinity.
            off_manifold: what to do with a point that was written to.

        Returns:
            Those that take the step, and those that are left out of it.
        """
        for point in points:
            point.reset()
        while True:
            stale = [point.begin(state) for point in points]
            counts = self._sketch_with_flags(points, stale, retraction, seeds, error)
            if error is not None:
                raise error
            if any(count[3] > 0 for count in counts):
                raise ManifoldError(
                    "another process has refused this step, see its own error; nothing was changed"
                )
            given = [self._check_gradient(*both) for both in zip(points, counts, strict=True)]
            members = [p for p, is_given in zip(points, given, strict=True) if is_given]
            old = [p for p, c in zip(points, counts, strict=True) if c[2] > 0 and p in members]
            written = [p for p, c in zip(points, counts, strict=True) if c[1] > 0 and p in members]
            is_projected = self.admit_(written, off_manifold=off_manifold)
            for point in old:
                point.renew_master()
            if not (is_projected or old):
                break
        nonfinite_moves = [point for point in members if not point.is_finite]
        skipped = self._nonfinite(nonfinite_moves, nonfinite) if nonfinite_moves else []
        return (
            [point for point in members if point not in skipped],
            [point for point in points if point in skipped or point not in members],
        )

    def _sketch_with_flags(
        self,
        points: list[SharedParam],
        stale: list[bool],
        retraction: Callable[[dict[str, Any]], Retraction],
        seeds: Seeds,
        error: Exception | None,
    ) -> list[list[float]]:
        flags = [
            [p.has_gradient(), p.is_written(), is_stale, error is not None]
            for p, is_stale in zip(points, stale, strict=True)
        ]
        computations = [
            computation
            for point, flag in zip(points, flags, strict=True)
            for computation in (
                (point.placement.group, point.count_flags(flag)),
                (point.placement.group, point.sketch(retraction(point.group), seeds)),
                (point.placement.group, point.correct()),
            )
        ]
        return together(computations)[::3]

    def _check_gradient(self, point: SharedParam, count: list[float]) -> bool:
        """Tell whether a point has a gradient, which a sharded one has everywhere or nowhere."""
        if 0 < count[0] < point.world and is_sharded(point.member.param):
            raise ManifoldError(
                f"{point.member.name} has a gradient on {count[0]:.0f} of the {point.world} "
                "processes that hold it; run backward, or set .grad to None, on all of them. "
                "Nothing was changed"
            )
        return count[0] > 0

    def _nonfinite(self, points: list[SharedParam], nonfinite: Answer) -> list[SharedParam]:
        """Return the points whose gradient is not finite anywhere, or refuse."""

        def count_nonfinite(point: SharedParam) -> Computation:
            found = yield from point.count_flags([point.has_nonfinite_gradient()])
            return found[0] > 0

        bad = [
            p
            for p, is_bad in zip(points, self._run(points, count_nonfinite), strict=True)
            if is_bad
        ]
        fine = [point for point in points if point not in bad]
        if bad and nonfinite == "raise":
            refuse_gradients(point.member for point in bad)
        if fine:
            refuse_overflow(point.member for point in fine)
        return bad


def layout_of(p: Tensor) -> tuple[object, ...]:
    """Return the properties that a parameter's placement depends on."""
    return (p.shape, p.dtype, getattr(p, "device_mesh", None), getattr(p, "placements", None))
