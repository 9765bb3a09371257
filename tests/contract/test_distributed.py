"""Two gloo processes under DDP: replicas stay bit-equal, also when their gradients are rank k."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import riemann_unn as ru
from tests.parallel.processes import start
from tests.support import assert_on_manifold, error

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
    ),
]

WORLD = 2
HIDDEN = 16


class Net(nn.Module):
    """A small recurrent net that reports the running sum of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = ru.nn.OrthogonalRNN(2, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 4, 2, generator=generator)
    return x, x.sum(dim=(1, 2)).unsqueeze(-1)


def work(rank: int, folder: str, options: dict[str, Any]) -> None:
    """One process: its own seed, its own data, one replica; it leaves its weights in a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD
    )
    torch.manual_seed(rank)  # other weights and another global generator on every process
    model = Net()
    start = model.rnn.weight_hh_l0.detach().clone()
    ddp = DistributedDataParallel(model)  # sends the weights of process 0 to all
    rank_k = options["rank"]
    if options["power_sgd"]:
        state = powerSGD_hook.PowerSGDState(
            process_group=None,
            matrix_approximation_rank=rank_k,
            start_powerSGD_iter=2,
            min_compression_rate=1,
        )
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    optimizer = ru.optim.ProjUNNT(
        ddp.parameters(),
        lr=options["lr"],
        rank=rank_k,
        base=getattr(torch.optim, options["base"]),
        seed=options["seeds"][rank],
    )
    generator = torch.Generator().manual_seed(100 + rank)
    losses = []
    for _ in range(options["steps"]):
        x, y = batch(generator)
        optimizer.zero_grad()
        loss = (ddp(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    torch.save(
        {
            "start": start,
            "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
            "losses": losses,
            "sent": state.compression_stats() if options["power_sgd"] else None,
        },
        f"{folder}/{rank}.pt",
    )
    dist.barrier()
    dist.destroy_process_group()


def train(folder: Path, **options: Any) -> list[dict[str, Any]]:
    """Train in two processes and return what each one reached."""
    options = {
        "rank": 1, "base": "RMSprop", "lr": 2e-3, "seeds": (0, 0), "power_sgd": False,
        "steps": 500,
    } | options  # fmt: skip
    start(work, (str(folder), options), WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def weights_of(ends: list[dict[str, Any]]) -> list[Tensor]:
    return [end["weights"]["rnn.weight_hh_l0"] for end in ends]


def assert_replicas_agree(ends: list[dict[str, Any]]) -> None:
    one, two = ends
    assert not torch.equal(one["start"], two["start"])  # they began apart
    assert one["losses"] != two["losses"]  # and saw other data
    for name, weight in one["weights"].items():
        assert torch.equal(weight, two["weights"][name]), name
    for end in ends:
        weight = end["weights"]["rnn.weight_hh_l0"]
        assert_on_manifold(weight, ru.Orthogonal())
        assert (weight - one["start"]).norm() > 0.1  # it has been trained
        early, late = sum(end["losses"][:50]) / 50, sum(end["losses"][-50:]) / 50
        assert late < 0.5 * early, (early, late)


def test_replicas_with_other_seeds_and_data_stay_bit_equal(tmp_path: Path) -> None:
    assert_replicas_agree(train(tmp_path))


def test_negative_control_optimizers_with_other_seeds_part(tmp_path: Path) -> None:
    one, two = weights_of(train(tmp_path, seeds=(0, 1), steps=50))
    assert not torch.equal(one, two)
    assert error(one) < 5e-7 and error(two) < 5e-7  # apart, yet each on the manifold


def test_power_sgd_sends_the_rank_that_the_step_needs(tmp_path: Path) -> None:
    ends = train(tmp_path, rank=2, power_sgd=True, steps=300, lr=4e-3)
    _, whole, sent = ends[0]["sent"]
    assert 0 < sent < 0.6 * whole  # the hook did compress
    assert_replicas_agree(ends)
