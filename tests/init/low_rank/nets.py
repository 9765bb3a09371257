"""Small models for the tests of low_rank_, and proof that one is as it was."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.support import gaussian


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.grouped = nn.Conv2d(12, 12, 3, groups=4)
        self.second = nn.Conv2d(12, 16, 3, stride=2, bias=False)
        self.flat = nn.Linear(16 * 2 * 2, 24)
        self.head = nn.Linear(24, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.tanh(self.second(self.grouped(x)))
        return self.head(functional.leaky_relu(self.flat(functional.dropout(x.flatten(1))), 0.2))


def images(n: int = 60) -> Tensor:
    return gaussian(n, 2, 8, 8, dtype=torch.float32)


def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net()
        model(3 * images() + 1)
        return model


def mlp(*widths: int, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*layers[:-1])


def snapshot(model: nn.Module) -> dict[str, object]:
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    return {
        "state": kept,
        "modes": [m.training for m in model.modules()],
        "modules": [id(m) for m in model.modules()],
        "grads": [p.requires_grad for p in model.parameters()],
        "rng": torch.get_rng_state(),
    }


def assert_unchanged(model: nn.Module, before: dict[str, object]) -> None:
    now = snapshot(model)
    for key in ("modes", "modules", "grads"):
        assert now[key] == before[key], key
    assert torch.equal(now["rng"], before["rng"])
    assert now["state"].keys() == before["state"].keys()
    for name, value in before["state"].items():
        assert torch.equal(now["state"][name], value), name
