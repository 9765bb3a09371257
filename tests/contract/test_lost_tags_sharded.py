"""Two gloo processes: what shards, flattens or partitions tagged weights is told, by name."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import riemann_unn as ru
from tests.parallel.processes import start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
    ),
]

WORLD = 2
PATTERNS = {"*.weight": ru.Orthogonal()}


def net() -> nn.Sequential:
    """Two blocks with an orthogonal weight each, the same on all ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8)))
    ru.tag_(model, PATTERNS)
    ru.init.warm_start_(model)
    return model


def told(run: Callable[[], object]) -> str:
    """What a call raises, by kind and message, or nothing."""
    try:
        run()
    except ru.ManifoldError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def everybody(model: nn.Module) -> dict[str, str]:
    """What all who can meet the parameters of a model say, and whether any of them moved."""
    params = list(model.parameters())
    kept = [whole(p).clone() for p in params]
    plain = torch.optim.SGD(params, lr=0.1)
    said = {
        "optimizer": told(lambda: ru.optim.ProjUNNT(params, lr=0.1)),
        "named": told(lambda: ru.optim.Cayley(model.named_parameters(), lr=0.1)),
        "listed": told(lambda: ru.tagged_parameters(model)),
        "errors": told(lambda: ru.orthogonality_error(model)),
        "monitor": told(lambda: ru.Monitor(plain)),
    }
    assert all(torch.equal(whole(p), value) for p, value in zip(params, kept, strict=True))
    return said


def whole(p: Tensor) -> Tensor:
    return p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()


def fully_shard(mesh: Any) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model[1], mesh=mesh)
    said: dict[str, Any] = everybody(model)
    ru.tag_(model, PATTERNS)
    said["again"] = [(name, type(p).__name__) for name, p in ru.tagged_parameters(model)]
    said["manifold"] = repr(ru.manifold_of(model[1][0].weight))
    model(torch.ones(2, 8)).sum().backward()
    said["after backward"] = [name for name, _ in ru.tagged_parameters(model)]
    ru.untag_(model)
    said["untagged"] = told(lambda: ru.tagged_parameters(model))
    return said


def gathered(mesh: Any) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model, mesh=mesh)
    ru.tag_(model, PATTERNS)
    said: dict[str, Any] = {"sharded": told(lambda: ru.tagged_parameters(model))}
    with torch.no_grad():
        model(torch.ones(2, 8))  # the outermost stays gathered, for a backward pass
    said["gathered"] = told(lambda: ru.tagged_parameters(model))
    model.reshard()
    said["resharded"] = told(lambda: ru.tagged_parameters(model))
    return said


def parallelize(mesh: Any) -> dict[str, Any]:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = net()
    parallelize_module(model, mesh, {"1.0": ColwiseParallel()})
    said: dict[str, Any] = everybody(model)
    ru.tag_(model, PATTERNS)
    said["again"] = [(name, type(p).__name__) for name, p in ru.tagged_parameters(model)]
    return said


def distribute(mesh: Any) -> dict[str, Any]:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    model = net()
    for placement in (Shard(0), Shard(1), Replicate()):
        value = distribute_tensor(whole(model[1][0].weight), mesh, [placement])
        model[1][0].weight = nn.Parameter(value)
    said: dict[str, Any] = everybody(model)
    ru.tag_(model[1][0].weight, ru.Orthogonal())
    said["again"] = [(name, type(p).__name__) for name, p in ru.tagged_parameters(model)]
    return said


def fsdp1(mesh: Any) -> dict[str, Any]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    said = {}
    for original in (False, True):
        model, early = net(), net()
        optimizer = ru.optim.ProjUNNT(early.parameters(), lr=0.1)
        wrapped, late = (
            FullyShardedDataParallel(m, use_orig_params=original, device_id=torch.device("cpu"))
            for m in (model, early)
        )
        key = "original" if original else "flat"
        said[f"{key}, tagged before"] = told(lambda w=wrapped: ru.optim.ProjUNNT(w.parameters(), 1))
        said[f"{key}, listed"] = told(lambda w=wrapped: ru.orthogonality_error(w))
        said[f"{key}, tagged after"] = told(lambda w=wrapped: ru.tag_(w, PATTERNS))
        if original:
            late(torch.ones(2, 8)).sum().backward()
            said["stepped"] = told(optimizer.step)
    return said


def zero(mesh: Any) -> dict[str, Any]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = net()
    ru.untag_(model[1])
    tagged = [p for _, p in ru.tagged_parameters(model)]
    others = [p for p in model.parameters() if ru.manifold_of(p) is None]
    said: dict[str, Any] = {
        "refused": told(
            lambda: ZeroRedundancyOptimizer(
                model.parameters(), optimizer_class=ru.optim.ProjUNNT, lr=0.1
            )
        )
    }
    # The remedy.
    outside = ru.optim.ProjUNNT(tagged, lr=0.1)
    inside = ZeroRedundancyOptimizer(others, optimizer_class=torch.optim.SGD, lr=0.1)
    model(torch.ones(2, 8)).square().sum().backward()
    for optimizer in (outside, inside):
        optimizer.step()
    said["error"] = max(map(float, ru.orthogonality_error(model).values()))
    return said


CASES = [fully_shard, gathered, parallelize, distribute, fsdp1, zero]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD
    )
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))
    torch.save({case.__name__: case(mesh) for case in CASES}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    start(work, (str(folder),), WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize(
    ("case", "remedy"),
    [
        ("fully_shard", "call riemann_unn.tag_ again after fully_shard"),
        ("parallelize", "call riemann_unn.tag_ again after parallelize_module"),
        ("distribute", r"again after parallelize_module \(or distribute_tensor\)"),
    ],
)
def test_one_of_two_tagged_blocks_that_is_sharded(ranks, case, remedy):
    for said in ranks:
        for who in ("optimizer", "named", "listed", "errors", "monitor"):
            start = (
                r"LostTagError: '1.0.weight' of \w*Linear was tagged Orthogonal\(\) and is now an "
            )
            assert re.match(rf"{start}untagged DTensor; .*{remedy}", said[case][who]), who
        assert said[case]["again"] == [
            ("0.0.weight", "ManifoldParameter"),
            ("1.0.weight", "DTensor"),
        ]


def test_tags_of_sharded_weights(ranks):
    for said in ranks:
        assert said["fully_shard"]["manifold"] == "Orthogonal()"
        assert said["fully_shard"]["after backward"] == ["0.0.weight", "1.0.weight"]
        assert said["fully_shard"]["untagged"] == ""
        assert said["gathered"]["sharded"] == said["gathered"]["resharded"] == ""
        assert "call reshard() on the sharded model" in said["gathered"]["gathered"]


def test_flattened_weights(ranks):
    for said in ranks:
        messages = said["fsdp1"]
        assert len(messages) == 7
        for what, message in messages.items():
            assert "FullyShardedDataParallel (FSDP1) flattens weights" in message, what
            assert "fully_shard (FSDP2)" in message, what
            assert ".0.weight'" in message or "tagged after" in what, what


def test_a_rank_that_is_given_no_tagged_weight(ranks):
    refusals = [said["zero"]["refused"] for said in ranks]
    assert sorted(map(bool, refusals)) == [False, True]
    (message,) = filter(None, refusals)
    assert "no parameter is tagged" in message
    assert "made by ZeroRedundancyOptimizer" in message and "of their own" in message
    assert all(said["zero"]["error"] < 5e-7 for said in ranks)


def test_an_optimizer_of_our_own_is_not_said_to_be_partitioned():
    with pytest.raises(ru.ManifoldError) as caught:
        ru.optim.ProjUNNT(nn.Linear(2, 2).parameters(), lr=0.1)
    assert "ZeroRedundancy" not in str(caught.value)
