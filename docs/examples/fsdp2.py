"""Orthogonal weights under FSDP2: handwritten digits, read by a deep network of sharded layers.

Run it with ``torchrun --nproc_per_node 2 fsdp2.py``. Given a folder, it continues from the
checkpoint there, with any number of processes, and saves one at the end.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import riemann_unn as ru

NAMES = ("model_state_dict", "optim_state_dict")


def main(folder=None):
    dist.init_process_group("gloo")  # "nccl", and a device for each process, on GPUs
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the same weights on every process
    layers = (nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU()) for _ in range(8))
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    for part in (*model, model):
        fully_shard(part)
    # After fully_shard, which replaces parameters by new ones without tags.
    ru.tag_(model, {"*.0.weight": ru.Orthogonal()})
    ru.init.warm_start_(model)
    options = {"lr": 3e-3, "rank": 4, "base": torch.optim.Adam, "max_angle": 0.1}
    optimizer = ru.optim.ProjUNNT(model.parameters(), **options)
    if folder and Path(folder, ".metadata").exists():
        states = dict(zip(NAMES, get_state_dict(model, optimizer), strict=True))
        dcp.load(states, checkpoint_id=folder)
        set_state_dict(model, optimizer, **states)

    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    mine = torch.Generator().manual_seed(dist.get_rank())  # other images on each process
    for step in range(101):
        batch = torch.randint(len(images), (64,), generator=mine)
        loss = nn.functional.cross_entropy(model(images[batch].float() / 16), labels[batch])
        loss.backward()
        if step % 20 == 0:
            error = max(ru.orthogonality_error(model).values())  # called on every process
            if dist.get_rank() == 0:
                print(f"step {step}: loss {loss:.3f}, error {error:.1e}")
        optimizer.step()
        optimizer.zero_grad()
    if folder:
        states = dict(zip(NAMES, get_state_dict(model, optimizer), strict=True))
        dcp.save(states, checkpoint_id=folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
