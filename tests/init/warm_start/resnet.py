"""An untrained residual net of the kind of resnet18, on which gains that are folded do harm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.down = None
        if stride != 1 or into != out:
            self.down = nn.Sequential(
                nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.down is None else self.down(x)))


class ResNet18(nn.Module):
    """Eight blocks of four widths, initialised as torchvision's is."""

    def __init__(self, width: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        layers: list[nn.Module] = []
        into = width
        for i in range(4):
            out = width * 2**i
            layers += [Block(into, out, 1 if i == 0 else 2), Block(out, out, 1)]
            into = out
        self.body, self.fc = nn.Sequential(*layers), nn.Linear(into, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(F.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


def untrained(seed: int = 0) -> ResNet18:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ResNet18()
