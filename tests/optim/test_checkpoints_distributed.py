"""torch's distributed checkpoints of replicated weights on two gloo processes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import riemann_unn as ru
from tests.parallel.processes import start
from tests.support import gaussian

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
    ),
]

WORLD = 2
BASES = {"SGD": {}, "Adam": {}, "Adagrad": {}}
Pair = tuple[DistributedDataParallel, Optimizer]


def build(base: str, rank: int | None) -> Pair:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12, bias=False), nn.Tanh(), nn.Linear(12, 12))
    ru.tag_(model, {"[02].weight": ru.Stiefel()})
    ru.init.warm_start_(model)
    kind = getattr(torch.optim, base)
    ddp = DistributedDataParallel(model)
    return ddp, ru.optim.ProjUNNT(ddp.parameters(), lr=1e-2, base=kind, rank=rank)


def run(pair: Pair, steps: range) -> None:
    model, optimizer = pair
    for step in steps:
        seed = 100 * step + dist.get_rank()  # other data on each process
        model(gaussian(16, 8, dtype=torch.float32, seed=seed)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def through_folder(pair: Pair, new: Pair, folder: str, options: StateDictOptions) -> None:
    weights, state = get_state_dict(*pair, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    weights, state = get_state_dict(*new, options=options)
    whole = {"model": weights, "optimizer": state}
    dcp.load(whole, checkpoint_id=folder)
    set_state_dict(
        *new,
        model_state_dict=whole["model"],
        optim_state_dict=whole["optimizer"],
        options=options,
    )


def from_the_first(pair: Pair, new: Pair) -> None:
    """Only process 0 has the state, and sends it to all."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = copy.deepcopy(get_optimizer_state_dict(*pair, options=options))  # torch shares memory
    assert bool(state) == (dist.get_rank() == 0)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(*new, state, options=options)
    new[0].load_state_dict(copy.deepcopy(pair[0].state_dict()))


def weights_of(pair: Pair) -> list[Tensor]:
    return [p.detach().clone() for p in pair[0].parameters()]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD
    )
    ends: dict[str, list[list[Tensor]]] = {}
    for base in BASES:
        for k in (1, None):
            straight = build(base, k)
            run(straight, range(4))
            nested, flat, sent = build(base, k), build(base, k), build(base, k)
            case = f"{base}-{k}"
            through_folder(straight, nested, f"{folder}/{case}-nested", StateDictOptions())
            options = StateDictOptions(flatten_optimizer_state_dict=True)
            through_folder(straight, flat, f"{folder}/{case}-flat", options)
            from_the_first(straight, sent)
            begun = build(base, k)
            begun[0].load_state_dict(copy.deepcopy(straight[0].state_dict()))
            ends[case] = []
            for pair in (straight, nested, flat, sent, begun):
                run(pair, range(4, 8))
                ends[case].append(weights_of(pair))
    torch.save(ends, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_replicas_resume_bit_equal(tmp_path: Path) -> None:
    start(work, (str(tmp_path),), WORLD)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD))
    for case, (straight, nested, flat, sent, begun) in one.items():
        for resumed in (nested, flat, sent, *two[case][:4]):
            assert all(map(torch.equal, straight, resumed)), case
        if case != "SGD-None":  # which keeps nothing that matters
            assert not all(map(torch.equal, straight, begun)), case  # negative control
