"""An orthogonal RNN under DistributedDataParallel: handwritten digits, read pixel by pixel.

Run it with ``torchrun --nproc_per_node 2 ddp.py``.
"""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import riemann_unn as ru

STEPS = 100


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = ru.nn.OrthogonalRNN(1, 128, batch_first=True)  # tags its recurrence itself
        self.head = nn.Linear(128, 10)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def main():
    dist.init_process_group("gloo")  # "nccl", and a device for each process, on GPUs
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Reader()
    ru.exclude_from_ddp_(model)  # before it is wrapped: n² numbers less for DDP to average
    ddp = DistributedDataParallel(model)
    optimizer = ru.optim.ProjUNNT(
        ddp.parameters(),
        lr=1e-3,
        rank=2,
        base=torch.optim.RMSprop,
        process_group=dist.group.WORLD,  # k n numbers, averaged in the step
    )

    digits = load_digits()
    pixels = torch.tensor(digits.data / 16, dtype=torch.float32)[..., None]
    labels = torch.tensor(digits.target)
    mine = torch.Generator().manual_seed(dist.get_rank())  # other images on each process
    for step in range(STEPS + 1):
        batch = torch.randint(len(pixels), (64,), generator=mine)
        loss = F.cross_entropy(ddp(pixels[batch]), labels[batch])
        loss.backward()
        if step % 20 == 0 and dist.get_rank() == 0:
            error = max(ru.orthogonality_error(model).values())
            print(f"step {step}: loss {loss:.3f}, error {error:.1e}")
        optimizer.step()
        optimizer.zero_grad()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
