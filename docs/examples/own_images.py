"""Your own images, a folder for each class: a classifier of orthogonal convolutions.

    python docs/examples/own_images.py [FOLDER]

A folder that is not there is made: stripes in three directions. Needs Pillow.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import riemann_unn as ru

SIZE = 16  # pictures are scaled to SIZE by SIZE


def make(folder: Path) -> None:
    x, y = torch.arange(32.0), torch.arange(32.0)[:, None]
    for label, a, b in [("flat", 0.0, 1.0), ("steep", 1.0, 0.0), ("slanted", 0.7, 0.7)]:
        (folder / label).mkdir(parents=True)
        for i in range(80):
            stripes = (0.8 * (a * x + b * y) + 6.3 * torch.rand(1)).sin()[..., None] * torch.rand(3)
            pixels = (128 + 80 * stripes + 30 * torch.randn(32, 32, 3)).clamp(0, 255)
            Image.fromarray(pixels.byte().numpy()).save(folder / label / f"{i}.png")


def read(folder: Path) -> tuple[Tensor, Tensor, list[str]]:
    labels = sorted(p.name for p in folder.iterdir() if p.is_dir())
    files = sorted(folder.glob("*/*"))
    pictures = [Image.open(file).convert("RGB").resize((SIZE, SIZE)) for file in files]
    pixels = torch.tensor(np.stack([np.asarray(p) for p in pictures])) / 255 - 0.5
    return pixels.movedim(-1, 1), torch.tensor([labels.index(f.parent.name) for f in files]), labels


def main(folder: Path) -> None:
    x, y, labels = read(folder)
    first = ru.nn.CircularConv2d(3, 12, SIZE, stride=2), ru.nn.GroupSort(2)
    second = ru.nn.CircularConv2d(12, 48, SIZE // 2, stride=2), ru.nn.GroupSort(2)
    model = nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(3 * SIZE**2, len(labels)))
    optimizer = ru.optim.ProjUNNT(model.parameters(), lr=1e-3, rank=4, base=torch.optim.Adam)
    test, train = torch.randperm(len(y)).split([len(y) // 5, len(y) - len(y) // 5])
    for epoch in range(5):
        for rows in train[torch.randperm(len(train))].split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        right = (model(x[test]).argmax(-1) == y[test]).float().mean()
        print(f"epoch {epoch + 1}: {right:.0%} of {len(test)} held-out pictures are right")


if __name__ == "__main__":
    torch.manual_seed(0)
    path = Path(*sys.argv[1:] or ["stripes"])
    if not path.exists():
        make(path)
    main(path)
