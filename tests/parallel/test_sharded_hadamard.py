"""Hadamard matrices in sharded parameters are those of one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

import riemann_unn as ru
from tests.parallel.processes import once_in_processes

CASES = [(ru.Orthogonal(), (12, 12)), (ru.Stiefel(blocks=2), (16, 20)), (ru.Stiefel(), (5, 28))]


def written(rank: int, world: int) -> list[Any]:
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(rank)
    found = []
    for manifold, shape in CASES:
        for dim in (0, 1):
            p = nn.Parameter(distribute_tensor(torch.zeros(shape), mesh, [Shard(dim)]))
            ru.tag_(p, manifold)
            ru.init.hadamard_(p, seed=5)
            found.append(p.detach().full_tensor())
    return found


def test_every_process_writes_its_part(tmp_path_factory):
    whole = [
        ru.init.hadamard_(ru.tag_(nn.Parameter(torch.zeros(shape)), manifold), seed=5).detach()
        for manifold, shape in CASES
        for _ in (0, 1)
    ]
    for found in once_in_processes(tmp_path_factory, 2, written):
        assert all(map(torch.equal, found, whole))
