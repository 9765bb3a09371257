"""Orthogonal weights under FSDP2: handwritten digits, read row by row by a small transformer.

Run it with ``torchrun --nproc_per_node 2 fsdp2.py``.
"""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
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


def main():
    dist.init_process_group("gloo")  # "nccl", and a device for each process, on GPUs
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the same weights on every process
    model = Reader()
    for block in model.blocks:
        nn.init.orthogonal_(block.q.weight)
        nn.init.orthogonal_(block.k.weight)

    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    ru.tag_(model, {"*.q.weight": ru.Orthogonal(), "*.k.weight": ru.Orthogonal()})  # after it
    optimizer = ru.optim.ProjUNNT(
        model.parameters(), lr=3e-3, rank=4, base=torch.optim.Adam, max_angle=0.1
    )

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
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
