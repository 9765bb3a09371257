"""Communication: many computations side by side, with one collective per round.

A computation is a generator. It yields a request to the other processes and is sent the answer: a
list of tensors for their sums, :class:`ToOwner` or :class:`FromOwner`. All processes of a group run
the same computations in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Computation", "FromOwner", "Group", "ToOwner", "bytes_sent", "together"]

if TYPE_CHECKING:
    Group = dist.ProcessGroup
else:  # for builds of torch without distributed
    Group = object
Computation = Generator[Any, Any, Any]


@dataclass(eq=False)
class ToOwner:
    """A request: every process sends a part to the owner.

    Args:
        owner: the rank, in the group, of the process that gets them.
        part: of this process.
        sizes: the number of entries that each process sends.
    """

    owner: int
    part: Tensor
    sizes: list[int]


@dataclass(eq=False)
class FromOwner:
    """A request: the owner sends a part to every process.

    Args:
        owner: the rank, in the group, of the process that sends them.
        parts: one for each process; ``None`` on all but the owner.
        like: a tensor of the shape, dtype and device of this process's part.
    """

    owner: int
    parts: list[Tensor] | None
    like: Tensor


_sent = 0


def bytes_sent() -> int:
    """Return the number of bytes that this process has sent by collectives so far."""
    return _sent


def together(computations: Iterable[tuple[Group, Computation]]) -> list[Any]:
    """Run computations to their ends, round by round, and return their results.

    Args:
        computations: each with the group of the processes that take part in it.
    """
    running = list(computations)
    results: list[Any] = [None] * len(running)
    answers: list[Any] = [None] * len(running)
    waiting = set(range(len(running)))
    while waiting:
        requests_by_kind: dict[Hashable, list[tuple[int, Any]]] = {}
        for i in sorted(waiting):
            group, computation = running[i]
            try:
                request = computation.send(answers[i])
            except StopIteration as end:
                results[i] = end.value
                waiting.discard(i)
                continue
            like = request[0] if isinstance(request, list) else _like(request)
            key = (id(group), type(request), like.dtype.to_real(), like.device)
            requests_by_kind.setdefault(key, []).append((i, request))
        for requests in requests_by_kind.values():
            group, answer = running[requests[0][0]][0], _ANSWERS[type(requests[0][1])]
            found = answer(group, [request for _, request in requests])
            for (i, _), one in zip(requests, found, strict=True):
                answers[i] = one
    return results


def _like(request: ToOwner | FromOwner) -> Tensor:
    return request.part if isinstance(request, ToOwner) else request.like


def _flat(x: Tensor) -> Tensor:
    """Return a tensor's entries as a real vector."""
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return x.reshape(-1)


def _shaped(flat: Tensor, like: Tensor) -> Tensor:
    if like.is_complex():
        flat = torch.view_as_complex(flat.view(-1, 2))
    return flat.view(like.shape)


def _as_stored(x: Tensor) -> tuple[Tensor, bool]:
    """Return a tensor in its memory order, and whether it is transposed, as thin factors are."""
    is_transposed = x.ndim > 1 and not x.is_contiguous()
    return x.mT if is_transposed else x, is_transposed


def _sums(group: Group, requests: list[list[Tensor]]) -> list[list[Tensor]]:
    stored = [_as_stored(x) for request in requests for x in request]
    flats = [_flat(x) for x, _ in stored]
    bucket = torch.cat(flats)
    _count(bucket)
    dist.all_reduce(bucket, group=group)
    parts = iter(bucket.split([flat.numel() for flat in flats]))
    whole = iter(
        [_restored(_shaped(next(parts), x), is_transposed) for x, is_transposed in stored],
    )
    return [[next(whole) for _ in request] for request in requests]


def _restored(x: Tensor, is_transposed: bool) -> Tensor:
    return x.mT if is_transposed else x


def _to_owners(group: Group, requests: list[ToOwner]) -> list[list[Tensor] | None]:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    mine = [[r.part for r in requests if r.owner == to] for to in range(world)]
    owned = [r for r in requests if r.owner == rank]
    sizes = [[r.sizes[source] for r in owned] for source in range(world)]
    got = _all_to_all(group, mine, sizes, requests[0].part)
    parts = [dict(zip(map(id, owned), some, strict=True)) for some in got]
    return [[some[id(r)] for some in parts] if r.owner == rank else None for r in requests]


def _from_owners(group: Group, requests: list[FromOwner]) -> list[Tensor]:
    world = dist.get_world_size(group)
    given = [[r.parts[to] for r in requests if r.parts is not None] for to in range(world)]
    awaited = [[r for r in requests if r.owner == source] for source in range(world)]
    sizes = [[r.like.numel() for r in some] for some in awaited]
    got = _all_to_all(group, given, sizes, requests[0].like)
    found = {
        id(r): part.view(r.like.shape)
        for some, parts in zip(awaited, got, strict=True)
        for r, part in zip(some, parts, strict=True)
    }
    return [found[id(r)] for r in requests]


def _all_to_all(
    group: Group, given: list[list[Tensor]], sizes: list[list[int]], like: Tensor
) -> list[list[Tensor]]:
    """Send each process its tensors and receive flat tensors of the given sizes from each."""
    width = 2 if like.is_complex() else 1
    flats = [[_flat(x) for x in some] for some in given]
    empty = like.new_empty(0, dtype=like.dtype.to_real())
    send = torch.cat([empty, *(x for some in flats for x in some)])
    receive = send.new_empty(width * sum(map(sum, sizes)))
    _count(send)
    dist.all_to_all_single(
        receive,
        send,
        [width * sum(some) for some in sizes],
        [sum(x.numel() for x in some) for some in flats],
        group=group,
    )
    parts = iter(receive.split([width * size for some in sizes for size in some]))
    if like.is_complex():
        return [[torch.view_as_complex(next(parts).view(-1, 2)) for _ in some] for some in sizes]
    return [[next(parts) for _ in some] for some in sizes]


def _count(x: Tensor) -> None:
    global _sent
    _sent += x.numel() * x.element_size()


_ANSWERS: dict[type, Callable[..., list[Any]]] = {
    list: _sums,
    ToOwner: _to_owners,
    FromOwner: _from_owners,
}
