"""Sharded tensors (DTensors): local parts and whole tensors."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "as_whole",
    "is_sharded",
    "local_part",
    "placed_like",
    "scattered",
    "sharded_like",
    "writes_to",
]


def _dtensor() -> Any:
    # There is no DTensor before this is imported, and importing it takes long.
    return sys.modules.get("torch.distributed.tensor")


def is_sharded(x: object) -> bool:
    """Tell whether a tensor is a DTensor."""
    module = _dtensor()
    return module is not None and isinstance(x, module.DTensor)


@torch.no_grad()
def local_part(x: Any) -> Tensor:
    """Return this process's part of a tensor, detached: all of a plain one."""
    found: Tensor = x.to_local() if is_sharded(x) else x.detach()
    return found


@torch.no_grad()
def writes_to(x: Any) -> int:
    """Return the version counter of a tensor; of a sharded one with that of its local part."""
    count: int = x._version
    return count + int(x.to_local()._version) if is_sharded(x) else count


def as_whole(x: Any) -> Tensor:
    """Return the whole tensor, detached; of a sharded one a collective call."""
    found: Tensor = x.detach().full_tensor() if is_sharded(x) else x.detach()
    return found


def sharded_like(local: Tensor, p: Any) -> Tensor:
    """Return the tensor placed like ``p`` of which this process holds ``local``."""
    if not is_sharded(p):
        return local
    found: Tensor = _dtensor().DTensor.from_local(
        local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )
    return found


def scattered(whole: Tensor, p: Any) -> Tensor:
    """Return this process's part of a tensor that every process has whole, placed like ``p``."""
    if not is_sharded(p):
        return whole
    module = _dtensor()
    found: Tensor = module.distribute_tensor(
        whole, p.device_mesh, p.placements, src_data_rank=None
    ).to_local()
    return found


def placed_like(value: Any, p: Any) -> Tensor:
    """Return a tensor of the shape of ``p`` placed like ``p``, by a collective call.

    Args:
        value: sharded in any way, or plain and the same on every process.
        p: a parameter.
    """
    if not is_sharded(p):
        return as_whole(value) if is_sharded(value) else value
    if is_sharded(value) and value.device_mesh == p.device_mesh:
        found: Tensor = value.redistribute(placements=p.placements)
        return found
    return sharded_like(scattered(as_whole(value), p).clone(), p)
