"""Ctrl-C anywhere in a step of shared parameters: weights, gradients and state stay usable.

In a world of one process: an interruption of one of several leaves the others waiting for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.device_mesh import init_device_mesh
from torch.optim import Optimizer

import riemann_unn as ru
from riemann_unn.optim import proxies, shared, shared_tangent
from riemann_unn.parallel import local_part
from tests.interruptions import PACKAGE, interrupt, lines, sample
from tests.parallel.processes import world_of_one
from tests.support import assert_on_manifold, gaussian, point

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
)

WARM = 3  # steps before the one that is interrupted
Pair = tuple[nn.ParameterList, Optimizer]
ADAM, SGD = torch.optim.Adam, torch.optim.SGD
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {},
    "momentum": {"base": SGD, "momentum": 0.9, "rank": 2},
    "Adam": {"base": ADAM},
    "Adam, whole": {"base": ADAM, "rank": None},
    "Muon": {"base": torch.optim.Muon, "rank": 2},
    "Cayley, whole": {"rank": None, "phi": "cayley"},
}


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with world_of_one(tmp_path_factory.mktemp("world")):
        yield


def placed(x: Tensor, where: object) -> Tensor:
    if where is None:  # a replica
        return x
    return distribute_tensor(x, init_device_mesh("cpu", (1,)), [where])


def trained(options: dict[str, Any], steps: int, *, are_replicas: bool) -> Pair:
    """Weights of all kinds, and one without a tag, on their way, with the next gradients."""
    made = [
        (point(9, 9, dtype=torch.float32, seed=1), Shard(0)),
        (point(9, 5, dtype=torch.float32, seed=2), Shard(1)),
        (point(5, 9, dtype=torch.float32, seed=3), Replicate()),
        (point(10, 10, dtype=torch.float32, seed=4).bfloat16(), Shard(0)),
    ]
    params = [nn.Parameter(placed(x, None if are_replicas else where)) for x, where in made]
    for p in params:
        ru.tag_(p, ru.Stiefel())
    free = nn.Parameter(placed(torch.ones(5, 2), None if are_replicas else Shard(0)))
    net = nn.ParameterList([*params, free])
    group = {"process_group": dist.group.WORLD} if are_replicas else {}
    optimizer = ru.optim.ManifoldOptimizer(net.parameters(), lr=0.1, **options, **group)
    for step in range(steps):
        give_gradients(net, step)
        optimizer.step()
    give_gradients(net, steps)
    return net, optimizer


def give_gradients(net: nn.ParameterList, step: int) -> None:
    for i, p in enumerate(net):
        grad = gaussian(*p.shape, dtype=torch.float32, seed=100 * step + i).to(p.dtype)
        p.grad = placed(grad, p.placements[0] if isinstance(p, DTensor) else None)


def locals_of(net: nn.ParameterList) -> list[Tensor]:
    return [local_part(p).clone() for p in net]


def check_interrupted(
    pair: Pair, before: list[Tensor], after: list[Tensor], at: int, where: str
) -> None:
    """Interrupt a step at a line; check all that it is to leave as it was, and the next steps."""
    net, optimizer = pair
    params = list(net)
    grads = [p.grad for p in params]
    values = [local_part(g).clone() for g in grads]
    memory = [(local_part(p).data_ptr(), p.shape, p.dtype) for p in params]
    assert interrupt(optimizer.step, at, where=where)
    assert torch.is_grad_enabled()
    assert memory == [(local_part(p).data_ptr(), p.shape, p.dtype) for p in params]
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    assert all(torch.equal(local_part(g), v) for g, v in zip(grads, values, strict=True))
    for groups in (optimizer.param_groups, optimizer.base.param_groups):
        held = [p for group in groups for p in group["params"]]
        assert len(held) == len(params)
        assert all(p is q for p, q in zip(params, held, strict=True))
    for state in (optimizer.state, optimizer.base.state):
        assert {id(p) for p in state} <= {id(p) for p in params}, "a stand-in is left"
    for p, old, new in zip(params, before, after, strict=True):
        now = local_part(p)
        assert torch.equal(now, old) or torch.equal(now, new), f"{tuple(p.shape)} is in between"
        master = optimizer.state.get(p, {}).get("master")
        if master is not None:
            assert torch.equal(local_part(master).bfloat16(), now), "a master without its rounding"
    for step in (1, 2):
        give_gradients(net, WARM + step)
        optimizer.step()
    for p, new in zip(params, after, strict=True):
        assert not torch.equal(local_part(p), new)
        if ru.manifold_of(p) is not None:
            kept = local_part(optimizer.state[p].get("master", p))
            assert_on_manifold(kept, ru.Stiefel())


def in_between(
    options: dict[str, Any],
    count: int,
    *,
    are_replicas: bool,
    steps: int = WARM,
    seed: int = 0,
    where: str = PACKAGE,
) -> tuple[int, dict[int, str]]:
    """Interrupt a step at some of its lines; return how many, and what each left in between."""
    net, optimizer = trained(options, steps, are_replicas=are_replicas)
    before = locals_of(net)
    total = lines(optimizer.step, where=where)
    after = locals_of(net)
    found = {}
    chosen = sample(total, count, seed)
    for at in chosen:
        try:
            pair = trained(options, steps, are_replicas=are_replicas)
            check_interrupted(pair, before, after, at, where)
        except Exception as error:  # whatever it is, the step is not as it was
            found[at] = f"{type(error).__name__}: {error}"
    return len(chosen), found


@pytest.mark.parametrize("are_replicas", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_ctrl_c_leaves_a_step_before_or_after(name: str, are_replicas: bool) -> None:
    count, found = in_between(OPTIONS[name], 12, are_replicas=are_replicas)
    assert count == 12 and not found


@pytest.mark.long
@pytest.mark.parametrize("steps", [0, WARM])
@pytest.mark.parametrize("are_replicas", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_ctrl_c_at_many_more_lines(name: str, are_replicas: bool, steps: int) -> None:
    count, found = in_between(OPTIONS[name], 80, are_replicas=are_replicas, steps=steps, seed=1)
    assert count == 80 and not found


@pytest.mark.parametrize("module", [shared, proxies, shared_tangent])
def test_ctrl_c_where_much_is_written(module: Any) -> None:
    """In the files that write weights and state, at a step that begins states."""
    options = {"base": ADAM, "rank": 2}
    count, found = in_between(options, 40, are_replicas=False, steps=0, where=module.__file__)
    assert count == 40 and not found


def test_what_writes_twice_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a stand-in that is put back once is left at the lines of the restoration."""

    def once(work, restore):
        try:
            return work()
        finally:
            restore()

    place = {"are_replicas": False, "where": proxies.__file__}
    monkeypatch.setattr(proxies, "restoring", once)
    _, found = in_between(OPTIONS["Adam"], 60, **place)
    assert found


def test_masters_are_written_with_what_is_stored() -> None:
    """Interrupted between the two, a master would be made anew from its rounding."""

    def begun() -> tuple[nn.Parameter, Optimizer]:
        x = point(10, 10, dtype=torch.float32, seed=4).bfloat16()
        p = ru.tag_(nn.Parameter(placed(x, Shard(0))), ru.Stiefel())
        optimizer = ru.optim.ProjUNNT([p], lr=0.1)
        for seed in (1, 2):
            optimizer.step()
            grad = gaussian(10, 10, dtype=torch.float32, seed=seed).bfloat16()
            p.grad = placed(grad, Shard(0))
        return p, optimizer

    for at in range(lines(begun()[1].step, where=shared.__file__)):
        p, optimizer = begun()
        assert interrupt(optimizer.step, at, where=shared.__file__)
        master = local_part(optimizer.state[p]["master"])
        assert torch.equal(master.bfloat16(), local_part(p))


def test_what_a_step_left_undone_is_forgotten() -> None:
    """A master made for a step that was refused does not outlive new values of its half."""
    x = point(10, 10, dtype=torch.float32, seed=4).bfloat16()
    p = nn.Parameter(placed(x, Shard(0)))
    ru.tag_(p, ru.Stiefel())
    optimizer = ru.optim.ProjUNNT([p], lr=0.1)
    p.grad = torch.full_like(p, torch.nan)
    with pytest.raises(ru.errors.NonFiniteError):
        optimizer.step()
    new = point(10, 10, dtype=torch.float32, seed=5).bfloat16()
    with torch.no_grad():
        p.copy_(placed(new, Shard(0)))
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(local_part(p), new)
    master = local_part(optimizer.state[p]["master"])
    assert float((master - new).abs().max()) < 1e-2
