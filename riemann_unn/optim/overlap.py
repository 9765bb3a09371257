"""Overlapping parameters: a tagged parameter may not share memory with another or with itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ManifoldError

__all__ = ["refuse_overlaps"]


class _Runs(NamedTuple):
    """A parameter's memory as contiguous runs of ``length`` bytes, by their ascending starts."""

    name: str | None
    starts: Tensor
    length: int


def refuse_overlaps(tagged: Iterable[tuple[str, Tensor]], others: Iterable[Tensor] = ()) -> None:
    """Refuse tagged parameters that overlap themselves, one another, or others that are trained.

    Views of one buffer are fine as long as no entry is in two of them.

    Args:
        tagged: names with parameters.
        others: the parameters without a tag that are stepped with them.

    Raises:
        ManifoldError: naming the parameters.
    """
    untagged = ((None, p) for p in others if p.requires_grad)
    by_device: dict[torch.device, list[_Runs]] = {}
    for name, p in (*tagged, *untagged):
        x = _in_memory(p)
        if x is None:
            continue
        runs = _Runs(name, *_runs(x))
        if name is not None and bool((runs.starts.diff() < runs.length).any()):
            raise ManifoldError(
                f"{name} is expanded or overlaps itself (shape {tuple(x.shape)}, strides "
                f"{x.stride()}), so its entries cannot move apart; give it memory of its own "
                "with p.data = p.data.clone(). Nothing was changed"
            )
        by_device.setdefault(x.device, []).append(runs)
    for some in by_device.values():
        _refuse_overlaps(some)


def _in_memory(p: Tensor) -> Tensor | None:
    """Return the local part of a parameter, or None if it has no memory."""
    with torch.no_grad():
        x: Tensor = p.to_local() if hasattr(p, "to_local") else p
    try:
        has_memory = x.layout is torch.strided and x.numel() > 0 and x.data_ptr() != 0
    except RuntimeError:  # a subclass that keeps its entries elsewhere
        return None
    return x if has_memory and not x.is_meta else None


def _runs(x: Tensor) -> tuple[Tensor, int]:
    """Return the ascending starts of a tensor's contiguous runs, and their length, in bytes."""
    length, starts = 1, torch.zeros(1, dtype=torch.int64)
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if stride == length and len(starts) == 1:
            length *= size
        elif size > 1:
            starts = (starts[:, None] + stride * torch.arange(size)).flatten()
    return starts.sort().values * x.itemsize + x.data_ptr(), length * x.itemsize


def _refuse_overlaps(parts: list[_Runs]) -> None:
    if len(parts) < 2:
        return
    starts, order = torch.cat([runs.starts for runs in parts]).sort()
    counts = torch.tensor([len(runs.starts) for runs in parts])
    owner = torch.arange(len(parts)).repeat_interleave(counts)[order]
    ends = starts + torch.tensor([runs.length for runs in parts])[owner]
    is_tagged = torch.tensor([runs.name is not None for runs in parts])[owner]
    # Find a run that begins before an earlier one has ended, where at least one of both is tagged.
    # Runs of one tagged parameter are known not to overlap.
    for before, now in ((is_tagged, True), (torch.ones_like(is_tagged), is_tagged[1:])):
        end, last = ends.where(before, -1).cummax(0)
        overlaps = ((starts[1:] < end[:-1]) & now).nonzero()
        if len(overlaps):
            i = int(overlaps[0])
            one, two = parts[int(owner[last[i]])], parts[int(owner[i + 1])]
            names = sorted((one.name, two.name), key=lambda name: name is None)
            raise ManifoldError(
                f"{names[0]} shares memory with {names[1] or 'an untagged parameter'}, so a step "
                "of one would move the other; give one of them memory of its own with p.data = "
                "p.data.clone(), or use one parameter object in both places. Nothing was changed"
            )
