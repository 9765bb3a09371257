"""Shared parameters: what one process meets, all raise together, and nothing has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Shard,
    distribute_tensor,
    init_device_mesh,
)

import riemann_unn as ru
from tests.parallel.processes import once_in_processes

N = 20


def ready(
    placement: Any = None, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[nn.Parameter, nn.Parameter, Any]:
    """A sharded point and a plain parameter without a tag, after one step."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    start = ru.Orthogonal().random(N, N, dtype=torch.float64, generator=generator)
    start = start.as_subclass(Tensor).to(dtype)
    p = nn.Parameter(distribute_tensor(start, mesh, [placement or Shard(0)]))
    free = nn.Parameter(torch.ones(3, dtype=torch.float64))
    ru.tag_(p, ru.Orthogonal())
    options = {"base": torch.optim.Adam, "lr": 0.1} | options
    optimizer = ru.optim.ProjUNNT([("weight", p), ("free", free)], **options)
    give(p, free)
    optimizer.step()
    give(p, free)
    return p, free, optimizer


def give(p: nn.Parameter, free: nn.Parameter) -> None:
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(N, N, dtype=torch.float64, generator=generator).to(p.dtype)
    p.grad = distribute_tensor(gradient, p.device_mesh, p.placements)
    free.grad = torch.ones_like(free)


def local(x: Tensor) -> Tensor:
    return x.detach().to_local() if isinstance(x, DTensor) else x.detach()


def snapshot(p: Tensor, free: Tensor, optimizer: Any) -> list[Any]:
    kept = [p, free, *(v for s in optimizer.state.values() for v in s.values())]
    return [local(v).clone() if isinstance(v, Tensor) else v for v in kept]


def same(some: list[Any], others: list[Any]) -> bool:
    pairs = zip(some, others, strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def raised(function: Callable[[], object]) -> tuple[str, str]:
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def not_a_number(p: nn.Parameter, free: nn.Parameter) -> None:
    local(p.grad)[0, 3] = torch.nan


def without_gradient(p: nn.Parameter, free: nn.Parameter) -> None:
    p.grad = None


@torch.no_grad()
def written(p: nn.Parameter, free: nn.Parameter) -> None:
    p.to_local()[0] *= 2


@torch.no_grad()
def infinite(p: nn.Parameter, free: nn.Parameter) -> None:
    p.to_local()[0] = torch.inf


ONE_RANK = {
    "not_a_number": not_a_number,
    "without_gradient": without_gradient,
    "written": written,
    "infinite": infinite,
}


def run(rank: int, world: int) -> dict[str, Any]:
    ends: dict[str, Any] = {}
    for name, change in ONE_RANK.items():
        for base in ("SGD", "Adam"):
            p, free, optimizer = ready(base=getattr(torch.optim, base))
            if rank == 1:
                change(p, free)
            before = snapshot(p, free, optimizer)
            error = raised(optimizer.step)
            ends[f"{name} {base}"] = error, same(before, snapshot(p, free, optimizer))
    ends |= mended(rank) | refused(rank)
    for name in ("gradient", "tag"):
        ends[f"own {name}"] = own_trouble(rank, name)
    return ends


def own_trouble(rank: int, what: str) -> Any:
    """One process alone has trouble, with a parameter that is its own."""
    p, free, _ = ready()
    own = nn.Parameter(torch.eye(N, dtype=torch.float64))
    ru.tag_(own, ru.Orthogonal())
    optimizer = ru.optim.ProjUNNT([("weight", p), ("own", own), ("free", free)], lr=0.1)
    own.grad = torch.ones_like(own)
    if rank == 1 and what == "gradient":
        own.grad[0, 0] = torch.nan
    if rank == 1 and what == "tag":
        del own.manifold
    before = snapshot(p, free, optimizer)
    error = raised(optimizer.step)
    return error, same(before, snapshot(p, free, optimizer))


def mended(rank: int) -> dict[str, Any]:
    """What goes on: a point that is projected, and a gradient that is skipped."""
    p, free, optimizer = ready(off_manifold="project")
    if rank == 1:
        written(p, free)
    optimizer.step()
    ends: dict[str, Any] = {"projected": float(ru.orthogonality_error(p))}
    p, free, optimizer = ready(nonfinite="skip")
    before = local(p).clone()
    if rank == 1:
        not_a_number(p, free)
    optimizer.step()
    ends["skipped"] = torch.equal(before, local(p)), float(free.detach()[0])
    p, free, optimizer = ready()
    p.grad = None
    before = local(p).clone()
    optimizer.step()
    ends["no gradient"] = torch.equal(before, local(p)), optimizer.state[p]["retraction_step"]
    p, _, optimizer = ready(lr=1e-3, rank=2)
    p.grad = 0 * p.grad
    optimizer = ru.optim.ProjUNNT([p], lr=0.1, rank=2)
    before = local(p).clone()
    optimizer.step()
    ends["zero gradient"] = torch.equal(before, local(p)), optimizer.state[p]["retraction_step"]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    start = ru.Stiefel().random(3, N, N, dtype=torch.float64, generator=generator)
    stack = nn.Parameter(distribute_tensor(start.as_subclass(Tensor), mesh, [Shard(1)]))
    ru.tag_(stack, ru.Stiefel())
    optimizer = ru.optim.ProjUNNT([stack], lr=0.1, rank=2)
    stack.grad = stack.detach().roll(1, 2)
    local(stack.grad)[1] = 0
    before = local(stack).clone()
    optimizer.step()
    ends["zero in a stack"] = [torch.equal(a, b) for a, b in zip(before, local(stack), strict=True)]
    return ends


def refused(rank: int) -> dict[str, Any]:
    """What no optimizer is made of."""
    ends: dict[str, Any] = {}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def make(p: Tensor, manifold: Any, **options: Any) -> Any:
        p = nn.Parameter(p)
        ru.tag_(p, manifold)
        return ru.optim.ProjUNNT([("weight", p)], lr=0.1, **options)

    eye = torch.eye(N, dtype=torch.float64)
    partial = DTensor.from_local(eye / dist.get_world_size(), mesh, [Partial()])
    ends["partial"] = raised(lambda: make(partial, ru.Orthogonal()))
    kernel = torch.zeros(4, 4, 2, 2, dtype=torch.float64)
    kernel[..., 0, 0] = torch.eye(4, dtype=torch.float64)
    lattice = distribute_tensor(kernel, mesh, [Shard(3)])
    ends["lattice"] = raised(lambda: make(lattice, ru.OrthogonalConv(2)))
    for name, placement, blocks in (("rows", Shard(0), 5), ("columns", Shard(1), (2, 5))):
        sharded = distribute_tensor(torch.eye(N, dtype=torch.float64), mesh, [placement])
        ends[f"blocks, {name}"] = raised(
            lambda sharded=sharded, blocks=blocks: make(sharded, ru.Stiefel(blocks=blocks))
        )
    rows = distribute_tensor(eye, mesh, [Shard(0)])
    ends["adafactor"] = raised(lambda: make(rows, ru.Orthogonal(), base=torch.optim.Adafactor))
    own = type("Own", (torch.optim.Optimizer,), {})
    ends["own"] = raised(lambda: check_own(own, rows))
    off = distribute_tensor(2 * eye, mesh, [Shard(0)])
    ends["off"] = raised(lambda: make(off, ru.Orthogonal()))
    ends["determinant"] = raised(lambda: make(rows, ru.Orthogonal(det=-1)))
    replica = torch.linalg.qr(torch.randn(N, N, dtype=torch.float64) + rank)[0]
    world = dist.group.WORLD
    ends["replicas"] = raised(lambda: make(replica, ru.Orthogonal(), process_group=world))
    return ends


def check_own(own: Any, p: Tensor) -> None:
    class Own(torch.optim.SGD):
        pass

    Own.__module__ = "elsewhere"
    from riemann_unn.optim.base import check_sharded

    check_sharded(own.__new__(own), "weight")


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return once_in_processes(tmp_path_factory, 2, run)


@pytest.mark.parametrize("base", ["SGD", "Adam"])
@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("not_a_number", "NonFiniteError", "the gradient of 'weight' holds NaN or infinity"),
        ("without_gradient", "ManifoldError", "'weight' has a gradient on 1 of the 2 processes"),
        ("written", "OffManifoldError", "off Orthogonal()"),
        ("infinite", "OffManifoldError", "it holds NaN or infinity"),
    ],
)
def test_what_one_process_meets_all_raise(ends, name, base, error, message):
    for (kind, text), unchanged in (end[f"{name} {base}"] for end in ends):
        assert kind == error, text
        assert message in text
        assert unchanged


@pytest.mark.parametrize(
    ("name", "error"), [("own gradient", "NonFiniteError"), ("own tag", "LostTagError")]
)
def test_the_trouble_of_one_stops_the_others(ends, name, error):
    ((kind, text), unchanged), ((own, _), own_unchanged) = (end[name] for end in ends)
    assert own == error
    assert kind == "ManifoldError" and "another process has refused this step" in text
    assert unchanged and own_unchanged


def test_points_are_projected_and_gradients_skipped_together(ends):
    for end in ends:
        assert end["projected"] <= 1e-14
        assert end["skipped"][0] and end["skipped"][1] != 1.0
        assert end["no gradient"] == (True, 1)
        assert end["zero gradient"] == (True, 1)
        assert end["zero in a stack"] == [False, True, False]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("partial", "ManifoldError", "a point is Shard or Replicate"),
        ("lattice", "ManifoldError", "is sharded along dimension 3"),
        ("blocks, rows", "ManifoldError", "holds no whole blocks of Stiefel(blocks=5)"),
        ("blocks, columns", "ManifoldError", "holds no whole blocks of Stiefel(blocks=(2, 5))"),
        ("adafactor", "ManifoldTypeError", "base=Adafactor is not known to move each entry"),
        ("own", "ManifoldTypeError", "set is_elementwise = True"),
        ("off", "OffManifoldError", "off Orthogonal()"),
        ("determinant", "OffManifoldError", "has the other determinant"),
        ("replicas", "ManifoldError", "differs between the processes"),
    ],
)
def test_what_cannot_be_shared_is_refused_everywhere(ends, name, error, message):
    for end in ends:
        kind, text = end[name]
        assert kind == error, text
        assert message in text
