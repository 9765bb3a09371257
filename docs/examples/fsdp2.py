"""Orthogonal weights under FSDP2: handwritten digits, read row by row by a small transformer.

Run it with ``torchrun --nproc_per_node 2 fsdp2.py``. Given the name of a folder, it goes on from
what is saved there, by whatever number of processes, and saves there at the end.
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
from torch.nn import functional as F

import riemann_unn as ru

WIDTH, STEPS = 64, 100


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU())

    def forward(self, x):
        y = self.norm(x)
        x = x + F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))
        return x + self.mlp(x)


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.place = nn.Parameter(torch.randn(8, WIDTH))
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x):
        return self.head(self.blocks(self.embed(x) + self.place).mean(dim=1))


def save(model, optimizer, folder):
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def load(model, optimizer, folder):
    weights, state = get_state_dict(model, optimizer)
    loaded = {"model": weights, "optimizer": state}
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
    )


def main(folder=None):
    dist.init_process_group("gloo")  # "nccl", and a device for each process, on GPUs
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the same weights on every process
    model = Reader()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    # After fully_shard, which puts new parameters without tags in the place of the old.
    ru.tag_(model, {"*.q.weight": ru.Orthogonal(), "*.k.weight": ru.Orthogonal()})
    ru.init.warm_start_(model)
    optimizer = ru.optim.ProjUNNT(
        model.parameters(), lr=3e-3, rank=4, base=torch.optim.Adam, max_angle=0.1
    )

    if folder is not None and Path(folder, ".metadata").exists():
        load(model, optimizer, folder)

    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    mine = torch.Generator().manual_seed(dist.get_rank())  # other images on each process
    for step in range(STEPS + 1):
        batch = torch.randint(len(images), (64,), generator=mine)
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        if step % 20 == 0:
            errors = ru.orthogonality_error(model)  # every process has to ask
            if dist.get_rank() == 0:
                print(f"step {step}: loss {loss:.3f}, error {max(errors.values()):.1e}")
        optimizer.step()
        optimizer.zero_grad()
    if folder is not None:
        save(model, optimizer, folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
