"""Places: which block of the matrices of a tagged parameter a process holds, and who the rest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..errors import ManifoldError
from ..linalg.step.blocks import Block
from ..manifolds import MatrixManifold
from .exchange import Group

__all__ = ["Place", "place_of"]


@dataclass(frozen=True, eq=False)
class Place:
    """Where the local part of a parameter lies in its matrices, seen square or wide.

    Args:
        group: the processes that share the parameter.
        block: the part of this one.
        is_turned: whether the matrices are tall, so that the block is of their adjoints.
        blocks: the block of each process.
        sizes: how many numbers each process of the group gives to a whole: of those that hold
            the same part one gives it.
        is_averaged: whether each process has a gradient of its own, the mean of which is meant.
    """

    group: Group
    block: Block
    is_turned: bool
    blocks: tuple[Block, ...]
    sizes: tuple[int, ...]
    is_averaged: bool


def place_of(name: str, p: Tensor, manifold: MatrixManifold, group: Group | None) -> Place:
    """Find where a parameter's local part lies; every process of its group has to ask.

    Args:
        name: for messages.
        p: a DTensor, or a plain tensor of which every process of ``group`` has a replica.
        manifold: says how it is a batch of matrices.
        group: of a plain tensor; a DTensor has its own.

    Raises:
        ManifoldError: it is sharded in a way that cuts no rows, columns or batches of matrices.
    """
    if isinstance(p, DTensor):
        group = _group_of(p.device_mesh)
        index, cut, copies = _dtensor_index(name, p)
    else:
        assert group is not None
        index, cut = tuple(slice(0, size) for size in p.shape), (False,) * p.ndim
        copies = dist.get_world_size(group)
    block, is_turned = _matrix_block(name, p, manifold, index, cut, copies)
    blocks: list[Block] = [block] * dist.get_world_size(group)
    dist.all_gather_object(blocks, block, group=group)
    seen: set[str] = set()
    sizes = []
    for one in blocks:
        first = repr(one.index) not in seen
        seen.add(repr(one.index))
        sizes.append(prod(part.stop - part.start for part in one.index) if first else 0)
    return Place(group, block, is_turned, tuple(blocks), tuple(sizes), not isinstance(p, DTensor))


@lru_cache(maxsize=64)
def _group_of(mesh: DeviceMesh) -> Group:
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size():
        world = dist.group.WORLD
        assert world is not None
        return world
    return mesh._flatten().get_group()


def _dtensor_index(name: str, p: DTensor) -> tuple[tuple[slice, ...], tuple[bool, ...], int]:
    mesh, cut, copies = p.device_mesh, [False] * p.ndim, 1
    for size, placement in zip(mesh.shape, p.placements, strict=True):
        dim = getattr(placement, "dim", None)
        if dim is not None:
            cut[dim % p.ndim] |= size > 1
        elif isinstance(placement, Replicate):
            copies *= size
        else:
            raise ManifoldError(
                f"{name} is placed {placement} on {mesh}; a point is Shard or Replicate, since a "
                "sum of parts has no constraint of its own"
            )
    shape, offset = compute_local_shape_and_global_offset(p.shape, mesh, p.placements)
    if tuple(shape) != tuple(p.to_local().shape):
        raise ManifoldError(
            f"{name} has a local part of shape {tuple(p.to_local().shape)} where its placements "
            f"{p.placements} give {tuple(shape)}; only contiguous shards can be constrained"
        )
    index = tuple(slice(at, at + size) for at, size in zip(offset, shape, strict=True))
    return index, tuple(cut), copies


def _matrix_block(
    name: str,
    p: Tensor,
    manifold: MatrixManifold,
    index: tuple[slice, ...],
    cut: tuple[bool, ...],
    copies: int,
) -> tuple[Block, bool]:
    """Turn the index of a tensor to that of its matrices."""
    shape = p.shape
    row = len(shape) - manifold.point_dims(p)
    column = row + 1
    wrong = [dim for dim in range(len(shape)) if cut[dim] and dim not in (0, row, column)]
    if wrong:
        raise ManifoldError(
            f"{name} of shape {tuple(shape)} is sharded along dimension {wrong[0]}, which cuts "
            f"no rows, columns or batches of the matrices of {manifold!r}; shard it along "
            f"dimension {row} or {column}"
        )
    # One matrix entry: how many matrices and columns each entry of the tensor's own has.
    probe = manifold.to_matrices(
        torch.zeros((*[1] * (column + 1), *shape[column + 1 :]), dtype=p.dtype)
    )
    width = probe.shape[-2:].numel()
    batch = prod(shape[:row]) * probe.shape[:-2].numel()
    rows, columns = index[row], index[column]
    columns = slice(columns.start * width, columns.stop * width)
    sizes, parts, cuts = (
        [shape[row], shape[column] * width],
        [rows, columns],
        [cut[row], cut[column]],
    )
    is_turned = sizes[0] > sizes[1]
    if is_turned:
        sizes, parts, cuts = sizes[::-1], parts[::-1], cuts[::-1]
    if row > 0 or probe.ndim > 2:
        each = batch // shape[0] if row > 0 and shape[0] else batch
        some = slice(index[0].start * each, index[0].stop * each) if row > 0 else slice(0, batch)
        sizes, parts, cuts = [batch, *sizes], [some, *parts], [row > 0 and cut[0], *cuts]
    return Block(tuple(sizes), tuple(parts), tuple(cuts), copies), is_turned
