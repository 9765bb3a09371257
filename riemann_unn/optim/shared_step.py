"""The part of a step that processes take together: places, checks and sketches of shared points."""

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
from ..parallel.places import place_of
from ..retractions import Retraction
from .batch import State
from .seeds import Seeds
from .shared import SharedPoint
from .tagged import TaggedParam, refuse_gradients, refuse_off_manifold, refuse_overflow

__all__ = ["SharedPoints"]

Answer = Literal["raise", "skip"]


class SharedPoints:
    """The tagged parameters of an optimizer that several processes share.

    Every process calls every method, with the same parameters in the same order.

    Args:
        group: of plain parameters, of which each of its processes has a replica.
    """

    def __init__(self, group: Group | None) -> None:
        self.group = group
        self._points: dict[TaggedParam, SharedPoint] = {}
        self._loads: dict[int, int] = {}

    @property
    def known(self) -> list[SharedPoint]:
        """The points of the last step."""
        return list(self._points.values())

    def of(self, members: Iterable[TaggedParam]) -> list[SharedPoint]:
        """Return the points of members, with the places of those that are new or have moved."""
        found = []
        for member in members:
            point = self._points.get(member)
            if point is None or point.laid_out != layout_of(member.param):
                place = place_of(member.name, member.param, member.manifold, self.group)
                point = SharedPoint(member, place, self._owner(place.group, member.param))
                point.laid_out = layout_of(member.param)
            found.append(point)
        self._points = {point.member: point for point in found}
        return found

    def _owner(self, group: Group, p: Tensor) -> int:
        """Spread whole steps over the processes, each to the one with the least work."""
        ranks = range(dist.get_world_size(group))
        owner = min(ranks, key=lambda rank: self._loads.get(rank, 0))
        self._loads[owner] = self._loads.get(owner, 0) + p.numel()
        return owner

    # Checks -----------------------------------------------------------------

    def admit_(
        self, points: list[SharedPoint], *, off_manifold: Literal["raise", "project"]
    ) -> bool:
        """Check that points are on their manifolds; mend or refuse those that are not.

        Returns:
            Whether any was mended.

        Raises:
            OffManifoldError: naming the parameter and the remedy, on every process.
            ManifoldError: replicas differ between processes.
        """
        if not points:
            return False
        errors = self._run(points, SharedPoint.error)
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
                member.is_rough = True
        for member, reason, is_finite in off:
            if off_manifold == "raise" or not is_finite:
                refuse_off_manifold(member, reason, is_finite=is_finite)
        for member, _, _ in off:
            whole = member.manifold.projx(as_whole(member.param))
            member.memory.copy_(scattered(whole, member.param))
        for point in points:
            point.member.version = writes_to(point.member.param)
        return bool(off)

    def _check_replicas(self, points: list[SharedPoint]) -> None:
        replicas = [point for point in points if point.place.is_averaged]

        def compare(point: SharedPoint) -> Computation:
            values = point.member.memory.contiguous().resolve_conj().view(torch.uint8)
            digest = blake2b(values.cpu().numpy().tobytes(), digest_size=16).digest()
            words = [int.from_bytes(digest[i : i + 4], "big") for i in range(0, 16, 4)]
            mine = torch.tensor(words, dtype=torch.float64, device=values.device)
            (total,) = yield [mine]
            (parted,) = yield [(total != mine * point.world).any().double()[None]]
            return bool(parted)

        parted = self._run(replicas, compare)
        names = [p.member.name for p, is_parted in zip(replicas, parted, strict=True) if is_parted]
        if names:
            raise ManifoldError(
                f"{', '.join(names)} differs between the processes of process_group, and replicas "
                "that begin apart stay apart; call riemann_unn.exclude_from_ddp_ on the model on "
                "every process, which sends the values of the first to all"
            )

    def _run(
        self, points: list[SharedPoint], method: Callable[[SharedPoint], Computation]
    ) -> list[Any]:
        return together((point.place.group, method(point)) for point in points)

    # The step ---------------------------------------------------------------

    def sketch_(
        self,
        points: list[SharedPoint],
        state: State,
        *,
        retraction: Callable[[dict[str, Any]], Retraction],
        seeds: Seeds,
        trouble: Exception | None,
        nonfinite: Answer,
        off_manifold: Literal["raise", "project"],
    ) -> tuple[list[SharedPoint], list[SharedPoint]]:
        """Find the tangent coordinates of all gradients, after the checks; nothing has changed.

        The first sums tell too which processes have a gradient, which were written to and which
        are in trouble, so that all go on or none does.

        Args:
            points: all there are, with a gradient or not.
            state: of the base.
            retraction: of a group.
            seeds: of the sketches.
            trouble: an error of this process's own, which every process is to raise.
            nonfinite: what to do at a gradient with NaN or infinity.
            off_manifold: what to do with a point that was written to.

        Returns:
            Those that take the step, and those that are left out of it.
        """
        for point in points:
            point.forget()
        while True:
            stale = [point.begin(state) for point in points]
            counts = self._sketch_and_tell(points, stale, retraction, seeds, trouble)
            if trouble is not None:
                raise trouble
            if any(count[3] > 0 for count in counts):
                raise ManifoldError(
                    "another process has refused this step, see its own error; nothing was changed"
                )
            given = [self._is_given(*both) for both in zip(points, counts, strict=True)]
            members = [p for p, is_given in zip(points, given, strict=True) if is_given]
            old = [p for p, c in zip(points, counts, strict=True) if c[2] > 0 and p in members]
            written = [p for p, c in zip(points, counts, strict=True) if c[1] > 0 and p in members]
            is_mended = self.admit_(written, off_manifold=off_manifold)
            for point in old:
                point.renew_master()
            if not (is_mended or old):
                break
        wrong = [point for point in members if not point.is_finite]
        skipped = self._nonfinite(wrong, nonfinite) if wrong else []
        return (
            [point for point in members if point not in skipped],
            [point for point in points if point in skipped or point not in members],
        )

    def _sketch_and_tell(
        self,
        points: list[SharedPoint],
        stale: list[bool],
        retraction: Callable[[dict[str, Any]], Retraction],
        seeds: Seeds,
        trouble: Exception | None,
    ) -> list[list[float]]:
        flags = [
            [p.has_gradient(), p.is_written(), is_stale, trouble is not None]
            for p, is_stale in zip(points, stale, strict=True)
        ]
        computations = [
            computation
            for point, flag in zip(points, flags, strict=True)
            for computation in (
                (point.place.group, point.tell(flag)),
                (point.place.group, point.sketch(retraction(point.group), seeds)),
                (point.place.group, point.correct()),
            )
        ]
        return together(computations)[::3]

    def _is_given(self, point: SharedPoint, count: list[float]) -> bool:
        """Tell whether a point has a gradient, which a sharded one has everywhere or nowhere."""
        if 0 < count[0] < point.world and is_sharded(point.member.param):
            raise ManifoldError(
                f"{point.member.name} has a gradient on {count[0]:.0f} of the {point.world} "
                "processes that hold it; run backward, or set .grad to None, on all of them. "
                "Nothing was changed"
            )
        return count[0] > 0

    def _nonfinite(self, points: list[SharedPoint], nonfinite: Answer) -> list[SharedPoint]:
        """Return the points whose gradient is not finite anywhere, or refuse."""

        def ask(point: SharedPoint) -> Computation:
            found = yield from point.tell([point.has_nonfinite_gradient()])
            return found[0] > 0

        bad = [p for p, is_bad in zip(points, self._run(points, ask), strict=True) if is_bad]
        fine = [point for point in points if point not in bad]
        if bad and nonfinite == "raise":
            refuse_gradients(point.member for point in bad)
        if fine:
            refuse_overflow(point.member for point in fine)
        return bad


def layout_of(p: Tensor) -> tuple[object, ...]:
    """Return what a parameter's place depends on."""
    return (p.shape, p.dtype, getattr(p, "device_mesh", None), getattr(p, "placements", None))
