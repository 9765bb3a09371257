"""Copies and pickles of models and optimizers of shared parameters work, or fail aloud."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_module
from torch.distributed.tensor.device_mesh import init_device_mesh
from torch.optim import Optimizer

import riemann_unn as ru
from riemann_unn.parallel import local_part
from tests.parallel.processes import world_of_one
from tests.support import point

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
)
Pair = tuple[nn.Module, Optimizer]


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with world_of_one(tmp_path_factory.mktemp("world")):
        yield


def build(layout: str) -> Pair:
    model = nn.Linear(9, 9, bias=False)
    with torch.no_grad():
        model.weight.copy_(point(9, 9))
    mesh = init_device_mesh("cpu", (1,))
    if layout == "fully_shard":
        fully_shard(model, mesh=mesh)
    elif layout == "distribute_module":
        distribute_module(model, mesh)
    ru.tag_(model, {"weight": ru.Orthogonal()})
    group = {"process_group": dist.group.WORLD} if layout == "process_group" else {}
    optimizer = ru.optim.ProjUNNT(model.parameters(), lr=0.1, momentum=0.9, **group)
    run((model, optimizer))
    return model, optimizer


def run(pair: Pair) -> None:
    weight = pair[0].weight
    weight.grad = torch.ones_like(weight) + weight.detach()
    pair[1].step()


def pickled(x: Any) -> Any:
    return pickle.loads(pickle.dumps(x))


def saved(x: Any) -> Any:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, pickled, saved]


@pytest.mark.parametrize("copied", COPIES)
def test_copies_of_sharded_models_and_optimizers_go_on_as_they_do(
    copied: Callable[[Any], Any],
) -> None:
    pair = build("distribute_module")
    other = copied(pair)
    weight = other[0].weight
    assert isinstance(weight, DTensor) and ru.manifold_of(weight) == ru.Orthogonal()
    assert weight is other[1].param_groups[0]["params"][0] and weight is not pair[0].weight
    start = local_part(weight).clone()
    run(pair)
    assert torch.equal(local_part(weight), start)
    run(other)
    assert torch.equal(local_part(weight), local_part(pair[0].weight))


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("layout", ["fully_shard", "process_group"])
def test_what_cannot_be_copied_says_so(layout: str, copied: Callable[[Any], Any]) -> None:
    """torch's own refusals: of FSDP's modules, and of a process group."""
    pair = build(layout)
    before = local_part(pair[0].weight).clone()
    words = "FSDP" if layout == "fully_shard" else "ProcessGroup"
    with pytest.raises((AssertionError, pickle.PicklingError, TypeError), match=words):
        copied(pair)
    assert torch.equal(local_part(pair[0].weight), before)
    run(pair)  # it goes on
