"""Data parallel at k n: the step from averaged sketches is the step from the averaged gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import riemann_unn as ru
from riemann_unn.parallel import bytes_sent
from tests.parallel.processes import once_in_processes

STEPS, N = 8, 24
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"rank": 2},
    "momentum": {"rank": 2, "momentum": 0.9},
    "Adam": {"rank": 2, "base": torch.optim.Adam},
    "Muon": {"rank": 2, "base": torch.optim.Muon},
    "whole": {"rank": None, "base": torch.optim.Adam},
    "lsi": {"rank": 2, "sketch": "lsi"},
    "column": {"rank": 2, "sketch": "column"},
}


class Net(nn.Module):
    """An orthogonal, a tall and a convolution weight, in which not every sample takes part."""

    def __init__(self, seed: int, only_matrices: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.square = nn.Linear(N, N, bias=not only_matrices)
        self.tall = nn.Linear(N - 7, N, bias=False)
        self.only_matrices = only_matrices
        if not only_matrices:
            self.kernel = ru.nn.CircularConv1d(3, 3, 8)
        self.head = nn.Linear(N, 2, bias=not only_matrices)
        self.double()
        for p in (self.square.weight, self.tall.weight):
            nn.init.orthogonal_(p)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.square(x) + self.tall(x[:, 7:]))
        if not self.only_matrices:
            h = self.kernel(h.view(-1, 3, 8)).flatten(1)
        return self.head(h)


TAGS = {"square.weight": ru.Orthogonal(), "tall.weight": ru.Stiefel()}


def data(rank: int, world: int, step: int) -> tuple[Tensor, Tensor]:
    """This process's share of the samples of a step; all of them for rank -1."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, N, dtype=torch.float64, generator=generator)
    y = x[:, :2].roll(1, 1)
    share = slice(None) if rank < 0 else slice(rank * 8 // world, (rank + 1) * 8 // world)
    return x[share], y[share]


def train(net: nn.Module, optimizer: Any, rank: int, world: int, steps: int = STEPS) -> None:
    for step in range(steps):
        x, y = data(rank, world, step)
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()


def compare(name: str, rank: int, world: int) -> dict[str, Any]:
    options, only = OPTIONS[name], name == "Muon"
    alone, net = Net(0, only), Net(0, only)
    start = {key: p.detach().clone() for key, p in alone.named_parameters()}
    for one in (alone, net):
        ru.tag_(one, TAGS)
    names = ru.exclude_from_ddp_(net)
    ddp = DistributedDataParallel(net)
    one = ru.optim.ProjUNNT(alone.named_parameters(), lr=0.05, **options)
    many = ru.optim.ProjUNNT(
        net.named_parameters(), lr=0.05, process_group=dist.group.WORLD, **options
    )
    train(alone, one, -1, world)
    before = bytes_sent()
    train(ddp, many, rank, world)
    own = dict(alone.named_parameters())
    moved = {key: float((own[key].detach() - start[key]).norm()) for key in own}
    parted = {
        key: float((p.detach() - own[key].detach()).norm()) / moved[key]
        for key, p in net.named_parameters()
    }
    return {
        "names": names,
        "moved": moved,
        "parted": parted,
        "errors": {key: float(e) for key, e in ru.orthogonality_error(net).items()},
        "weights": {key: p.detach().clone() for key, p in net.named_parameters()},
        "sent": (bytes_sent() - before) / STEPS,
    }


def unused(rank: int) -> dict[str, Any]:
    """A parameter that only the first process uses, and one that none does."""
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Linear(N, N, bias=False), nn.Linear(N, N, bias=False)]).double()
    for layer in net:
        nn.init.orthogonal_(layer.weight)
    ru.tag_(net, {"*.weight": ru.Orthogonal()})
    optimizer = ru.optim.ProjUNNT(net.parameters(), lr=0.1, process_group=dist.group.WORLD)
    start = [layer.weight.detach().clone() for layer in net]
    if rank == 0:
        net[0](torch.ones(1, N, dtype=torch.float64)).pow(3).sum().backward()
    optimizer.step()
    return {
        "moved": [float((la.weight.detach() - s).norm()) for la, s in zip(net, start, strict=True)],
        "weight": net[0].weight.detach().clone(),
        "steps": [optimizer.state[la.weight].get("retraction_step", 0) for la in net],
    }


def broadcast(rank: int) -> dict[str, Any]:
    """Replicas that begin apart are sent the values of the first, or are refused."""
    net = Net(rank, True)
    ru.tag_(net, TAGS)
    ends: dict[str, Any] = {}
    try:
        ru.optim.ProjUNNT(net.parameters(), lr=0.1, process_group=dist.group.WORLD)
    except ru.ManifoldError as error:
        ends["refused"] = str(error)
    ru.exclude_from_ddp_(net)
    ru.optim.ProjUNNT(net.parameters(), lr=0.1, process_group=dist.group.WORLD)
    ends["square"] = net.square.weight.detach().clone()
    return ends


def run(rank: int, world: int) -> dict[str, Any]:
    ends: dict[str, Any] = {name: compare(name, rank, world) for name in OPTIONS}
    ends["unused"], ends["broadcast"] = unused(rank), broadcast(rank)
    return ends


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return once_in_processes(tmp_path_factory, 2, run)


@pytest.mark.parametrize("name", OPTIONS)
def test_averaged_sketches_step_as_the_averaged_gradient(ends, name):
    for end in ends:
        found = end[name]
        assert {"square.weight", "tall.weight"} <= set(found["names"])
        assert ("kernel.weight" in found["names"]) == (name != "Muon")
        assert all(moved > 1e-3 for moved in found["moved"].values())
        assert max(found["parted"].values()) <= 1e-11, found["parted"]
        assert max(found["errors"].values()) <= 1e-14
    one, two = (end[name]["weights"] for end in ends)
    for key in one:
        assert torch.equal(one[key], two[key]), key  # bit for bit


def test_parameters_that_some_do_not_use_move_alike(ends):
    one, two = (end["unused"] for end in ends)
    assert one["moved"][0] > 1e-3 and one["moved"][1] == 0
    assert torch.equal(one["weight"], two["weight"])
    assert one["steps"] == two["steps"] == [1, 0]


def test_replicas_that_begin_apart_are_refused_and_can_be_made_alike(ends):
    one, two = (end["broadcast"] for end in ends)
    for end in (one, two):
        assert "call riemann_unn.exclude_from_ddp_" in end["refused"]
    assert torch.equal(one["square"], two["square"])


def test_what_cannot_be_excluded_is_refused():
    with pytest.raises(ru.ManifoldTypeError, match=r"torch\.nn\.Module is needed"):
        ru.exclude_from_ddp_(torch.ones(2))
    net = nn.Linear(2, 2)
    with pytest.raises(ru.ManifoldError, match="no process group is initialised"):
        ru.exclude_from_ddp_(net)
