"""Your own sequences from a CSV file: an orthogonal RNN that tells their labels.

    python docs/examples/own_sequences.py [FILE]

One line a sequence: its label, then its values. A file that is not there is made: a tone of 40
steps, then 160 steps of noise. `python -m riemann_unn.demo sequences --data FILE` shows more.
"""

import csv
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import riemann_unn as ru


def make(path: Path) -> None:
    torch.manual_seed(1)
    lines = [",".join(["label", *map(str, range(200))])]
    for label, frequency in [("low", 0.2), ("middle", 0.4), ("high", 0.8)] * 134:
        values = 0.2 * torch.randn(200)
        values[:40] += (frequency * torch.arange(40) + 6 * torch.rand(1)).sin()
        lines.append(",".join([label, *map(str, values.tolist())]))
    path.write_text("\n".join(lines))


def read(path: Path) -> tuple[Tensor, Tensor, list[str]]:
    rows = list(csv.reader(path.read_text().splitlines()))[1:]
    labels = sorted({row[0] for row in rows})
    values = torch.tensor([[float(v) for v in row[1:]] for row in rows])
    # Steps, sequences, features; the number of each sequence's label; the labels.
    return values.T.unsqueeze(-1), torch.tensor([labels.index(row[0]) for row in rows]), labels


def main(path: Path) -> None:
    x, y, labels = read(path)
    rnn = ru.nn.OrthogonalRNN(1, 64)
    head = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, len(labels)))
    groups = ru.param_groups(nn.ModuleList([rnn, head]), lr=3e-3, tagged_lr=1e-4)
    optimizer = ru.optim.ProjUNNT(groups, lr=3e-3, base=torch.optim.RMSprop)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, test = order[len(y) // 5 :], order[: len(y) // 5]
    for epoch in range(10):
        for rows in train[torch.randperm(len(train))].split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(rnn(x[:, rows])[1][-1]), y[rows]).backward()
            optimizer.step()
        schedule.step()
        right = (head(rnn(x[:, test])[1][-1]).argmax(-1) == y[test]).float().mean()
        print(f"epoch {epoch + 1}: {right:.0%} of {len(test)} held-out sequences are right")


if __name__ == "__main__":
    path = Path(*sys.argv[1:] or ["tones.csv"])
    if not path.exists():
        make(path)
    main(path)
