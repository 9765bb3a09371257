"""Sharded models as people have them: fully_shard, parallelize_module, hybrid meshes, halves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import riemann_unn as ru
from tests.parallel.processes import once_in_processes

TAGS = {"*.0.weight": ru.Orthogonal(), "*.2.weight": ru.Stiefel()}
STEPS = 8


class Net(nn.Module):
    """Two blocks with an orthogonal and a wide weight each, and a head without a tag."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[block() for _ in range(2)])
        self.head = nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


def block() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(18, 18), nn.Tanh(), nn.Linear(18, 11), nn.Tanh(), nn.Linear(11, 18)
    )


def model(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    net = Net().double()
    for name, p in net.named_parameters():
        if name.endswith(("0.weight", "2.weight")):
            nn.init.orthogonal_(p)
    return net.to(dtype)


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 18, dtype=torch.float64, generator=generator)
    return x.to(dtype), x[:, :3].roll(1, 1).to(dtype)


def shard_all(net: Net, mesh: Any = None, **options: Any) -> Net:
    for one in net.blocks:
        fully_shard(one, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


def parallelize(net: Net) -> Net:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for one in net.blocks:
        parallelize_module(one, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return net


def train(net: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> list[float]:
    x, y = data(dtype)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def whole(p: Tensor) -> Tensor:
    p = p.detach()
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def both(make: Any, options: dict[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Train alone and shared on the same data; every process sees all of it."""
    alone, shared = model(dtype), make(model(dtype))
    ends: dict[str, Any] = {}
    for net in (alone, shared):
        ru.tag_(net, TAGS)
    one = ru.optim.ProjUNNT(alone.named_parameters(), lr=0.02, **options)
    many = ru.optim.ProjUNNT(shared.named_parameters(), lr=0.02, **options)
    ends["losses"] = train(alone, one, dtype), train(shared, many, dtype)
    own = dict(alone.named_parameters())
    ends["parted"] = {
        name: float((whole(p) - own[name].detach()).abs().max())
        for name, p in shared.named_parameters()
    }
    ends["errors"] = {k: float(e) for k, e in ru.orthogonality_error(shared).items()}
    kept = {name: many.state[p].get("master") for name, p in shared.named_parameters()}
    ends["masters"] = {
        name: float(ru.orthogonality_error(master, ru.Stiefel()))
        for name, master in kept.items()
        if master is not None
    }
    return ends


BASES = {
    "SGD": {"rank": 2},
    "Adam": {"rank": 2, "base": torch.optim.Adam},
    "whole": {"rank": None, "base": torch.optim.Adam},
}


def run_models(rank: int, world: int) -> dict[str, Any]:
    ends: dict[str, Any] = {}
    two = init_device_mesh("cpu", (1, world), mesh_dim_names=("replicate", "shard"))
    for name, options in BASES.items():
        ends[f"fully_shard {name}"] = both(shard_all, options)
        ends[f"parallelize {name}"] = both(parallelize, options)
        ends[f"hybrid {name}"] = both(lambda net: shard_all(net, mesh=two), options)
    ends["bf16"] = both(shard_all, BASES["Adam"], torch.bfloat16)
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    ends["mixed"] = both(lambda net: shard_all(net, mp_policy=mixed), BASES["SGD"], torch.float32)
    ends["one of two"] = both(lambda net: (fully_shard(net.blocks[0]), net)[1], BASES["Adam"])
    ends["warm start"] = warm_started()
    ends["monitor"] = monitored()
    return ends


def warm_started() -> dict[str, Any]:
    torch.manual_seed(3)
    net = Net().double()
    plain = copy.deepcopy(net)
    shard_all(net)
    found = {}
    for one in (plain, net):
        ru.tag_(one, TAGS)
        found[one] = ru.init.warm_start_(one, fold_gain=False)
    own = dict(plain.named_parameters())
    return {
        "parted": {
            name: float((whole(p) - own[name].detach()).abs().max())
            for name, p in net.named_parameters()
        },
        "errors": {name: float(e) for name, e in ru.orthogonality_error(net).items()},
        "reports": [report.as_dict() for report in found.values()],
    }


def monitored() -> dict[str, Any]:
    alone, shared = model(), shard_all(model())
    histories = []
    for net in (alone, shared):
        ru.tag_(net, TAGS)
        optimizer = ru.optim.ProjUNNT(net.named_parameters(), lr=0.02, rank=2)
        monitor = ru.Monitor(optimizer)
        train(net, optimizer, torch.float64)
        histories.append(monitor.history)
    return {"histories": histories}


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return once_in_processes(tmp_path_factory, 2, run_models)


@pytest.mark.parametrize("kind", ["fully_shard", "parallelize", "hybrid"])
@pytest.mark.parametrize("base", ["SGD", "Adam", "whole"])
def test_models_train_as_on_one_process(ends, kind, base):
    for end in ends:
        found = end[f"{kind} {base}"]
        assert max(found["parted"].values()) <= 1e-11, found["parted"]
        assert len(found["errors"]) == 4 and max(found["errors"].values()) <= 1e-14
        alone, shared = found["losses"]
        assert shared == pytest.approx(alone, rel=1e-9) and alone[-1] < alone[0]


def test_one_block_may_be_sharded_and_the_other_not(ends):
    for end in ends:
        found = end["one of two"]
        assert max(found["parted"].values()) <= 1e-11
        assert len(found["errors"]) == 4 and max(found["errors"].values()) <= 1e-14


def test_halves_have_sharded_masters(ends):
    for end in ends:
        found = end["bf16"]
        assert len(found["masters"]) == 4 and max(found["masters"].values()) <= 5e-7
        assert max(found["errors"].values()) <= 2e-2
        alone, shared = found["losses"]
        assert shared[-1] < shared[0]
        assert shared == pytest.approx(alone, rel=0.1)


def test_mixed_precision_keeps_single_points(ends):
    for end in ends:
        assert max(end["mixed"]["errors"].values()) <= 5e-7
        _, shared = end["mixed"]["losses"]
        assert shared[-1] < shared[0]


def test_a_warm_start_of_shards_is_that_of_the_whole(ends):
    for end in ends:
        found = end["warm start"]
        assert max(found["parted"].values()) <= 1e-12
        assert max(found["errors"].values()) <= 1e-14
        alone, shared = found["reports"]
        assert alone.keys() == shared.keys()


def test_a_monitor_sees_shards_whole(ends):
    for end in ends:
        alone, shared = end["monitor"]["histories"]
        assert alone.keys() == shared.keys() and len(alone) == 4
        for name in alone:
            assert len(alone[name]) == len(shared[name]) == STEPS
            for one, many in zip(alone[name], shared[name], strict=True):
                assert one.keys() == many.keys()
                for key in one.keys() - {"error"}:
                    assert many[key] == pytest.approx(one[key], rel=1e-6, abs=1e-9), key
