"""Placements: the block of a tagged parameter's matrices that each process holds."""

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

__all__ = ["Placement", "placement_of"]


@dataclass(frozen=True, eq=False)
class Placement:
    """The block that the local part of a parameter is of its matrices, seen square or wide.

    Args:
        group: the processes that share the parameter.
        block: that of this process.
        is_adjoint: whether the matrices are tall, so that the block is of their adjoints.
        blocks: the block of each process.
        sizes: the number of entries that each process contributes to the whole; of replicas of one
            part only the first contributes.
        is_averaged: whether each process has its own gradient, to be averaged.
        manifold: the matrix view of the local part, which may have fewer blocks.
    """

    group: Group
    block: Block
    is_adjoint: bool
    blocks: tuple[Block, ...]
    sizes: tuple[int, ...]
    is_averaged: bool
    manifold: MatrixManifold


def placement_of(name: str, p: Tensor, manifold: MatrixManifold, group: Group | None) -> Placement:
    """Find the placement of a parameter; a collective call in its group.

    Args:
        name: for messages.
        p: a DTensor, or a plain tensor of which every process of ``group`` has a replica.
        manifold: its matrix view.
        group: of a plain tensor; a DTensor has its own.

    Raises:
        ManifoldError: it is sharded otherwise than by rows, columns or batches of matrices, or
            within several blocks.
    """
    if isinstance(p, DTensor):
        group = _group_of(p.device_mesh)
        index, cut, copies = _dtensor_index(name, p)
    else:
        assert group is not None
        index, cut = tuple(slice(0, size) for size in p.shape), (False,) * p.ndim
        copies = dist.get_world_size(group)
    block, is_adjoint, part = _matrix_block(name, p, manifold, index, cut, copies)
    found: list[Block | None] = [block] * dist.get_world_size(group)
    dist.all_gather_object(found, block, group=group)
    blocks = [one for one in found if one is not None]
    if block is None or len(blocks) < len(found):  # raised on every process
        raise ManifoldError(
            f"{name} of shape {tuple(p.shape)} is sharded such that a process holds no whole "
            f"blocks of {manifold!r}; shard it over a number of processes that divides the blocks, "
            "or along the other dimension"
        )
    seen: set[str] = set()
    sizes = []
    for one in blocks:
        first = repr(one.index) not in seen
        seen.add(repr(one.index))
        sizes.append(prod(part.stop - part.start for part in one.index) if first else 0)
    is_averaged = not isinstance(p, DTensor)
    return Placement(group, block, is_adjoint, tuple(blocks), tuple(sizes), is_averaged, part)


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
) -> tuple[Block | None, bool, MatrixManifold]:
    """Convert the index of a tensor to that of its matrices.

    Returns:
        The block, or None if this part is no block; whether it is of the adjoints; and the manifold
        with the part's matrix view.
    """
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
    # The matrices and columns that one entry of the first two point dimensions gives.
    single = manifold.with_blocks(1, 1)
    probe = single.to_matrices(
        torch.zeros((*[1] * (column + 1), *shape[column + 1 :]), dtype=p.dtype)
    )
    width = probe.shape[-2:].numel()
    rows, columns = index[row], index[column]
    columns = slice(columns.start * width, columns.stop * width)
    sizes, parts, cuts = [], [], []
    each = prod(shape[1:row]) * probe.shape[:-2].numel()
    stack = [(each, slice(0, each), False)]  # the dimensions of the batch
    if row > 0:
        stack = [(shape[0], index[0], cut[0]), *stack]
    for size, part, is_cut, count in zip(
        (shape[row], shape[column] * width),
        (rows, columns),
        (cut[row], cut[column]),
        manifold.blocks,
        strict=True,
    ):
        size //= count
        some = slice(0, count)
        if count > 1 and is_cut and size > 0:  # sharded between blocks, not within them
            if part.start % size or part.stop % size:
                return None, False, manifold
            some = slice(part.start // size, part.stop // size)
        stack.append((count, some, count > 1 and is_cut))
        sizes.append(size)
        parts.append(slice(0, size) if count > 1 else part)
        cuts.append(is_cut and count == 1)
    is_adjoint = sizes[0] > sizes[1]
    if is_adjoint:
        sizes, parts, cuts = sizes[::-1], parts[::-1], cuts[::-1]
    if row > 0 or probe.ndim > 2 or manifold.blocks != (1, 1):
        batch = _flattened(stack)
        if batch is None:
            return None, False, manifold
        sizes, parts, cuts = [batch[0], *sizes], [batch[1], *parts], [batch[2], *cuts]
    below, beside = (max(some.stop - some.start, 1) for _, some, _ in stack[-2:])
    block = Block(tuple(sizes), tuple(parts), tuple(cuts), copies)
    return block, is_adjoint, manifold.with_blocks(below, beside)


def _flattened(stack: list[tuple[int, slice, bool]]) -> tuple[int, slice, bool] | None:
    """Merge dimensions into one: size, part and cut; None if the part is not contiguous."""
    whole, part, is_cut = stack[0]
    for size, some, is_cut_here in stack[1:]:
        if not is_cut_here:
            some = slice(part.start * size, part.stop * size)
        elif whole > 1:
            return None
        whole, part, is_cut = whole * size, some, is_cut or is_cut_here
    return whole, part, is_cut
