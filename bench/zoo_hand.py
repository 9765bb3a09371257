"""Networks written by hand for the zoo: what people write that no package's model has."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = self._twice(3, 16), self._twice(16, 32), self._twice(32, 64)
        self.up2, self.up1 = nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)
        self.d, self.e = self._twice(64, 32), self._twice(32, 16)
        self.out = nn.Conv2d(16, 4, 1)

    @staticmethod
    def _twice(c: int, o: int) -> nn.Module:
        def one(i: int) -> list[nn.Module]:
            return [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True)]

        return nn.Sequential(*one(c), *one(o))

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(F.max_pool2d(a, 2))
        c = self.c(F.max_pool2d(b, 2))
        b = self.d(torch.cat([self.up2(c), b], 1))
        return self.out(self.e(torch.cat([self.up1(b), a], 1)))


class Residual(nn.Module):
    """x + f(x): the sum ties all blocks' outputs to one another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 64), nn.Linear(64, 10)
        self.up = nn.ModuleList(nn.Linear(64, 128) for _ in range(4))
        self.down = nn.ModuleList(nn.Linear(128, 64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(F.relu(up(x)))
        return self.last(x)


class Excite(nn.Module):
    """Squeeze and excitation; the gate is a sigmoid of means."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.squeeze, self.excite = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.mix, self.head = nn.Conv2d(32, 32, 3), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.head(F.relu(self.mix(x * gate)).mean((2, 3)))


class Tied(nn.Module):
    """A decoder by the encoder's matrix, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(64, 32) / 6),
            nn.Parameter(torch.randn(64)),
        )
        self.inner, self.out = nn.Linear(64, 64), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(F.linear(x, self.weight, self.bias))
        h = F.relu(self.inner(h))
        return self.out(F.relu(F.linear(h, self.weight.t())))


class Bare(nn.Module):
    """Parameters without layers: ``x @ W``, einsum, ``torch.addmm``, heads in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(32, 48) / 6)
        self.heads = nn.Parameter(torch.randn(4, 48, 16) / 7)
        self.merge = nn.Parameter(torch.randn(4, 16, 40) / 8)
        self.last, self.bias = nn.Parameter(torch.randn(40, 10) / 6), nn.Parameter(torch.randn(10))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x @ self.w)
        x = F.relu(torch.einsum("bc,hcd->bhd", x, self.heads))
        x = F.relu(torch.einsum("bhd,hdo->bo", x, self.merge))
        return torch.addmm(self.bias, x, self.last)


class Masks(nn.Module):
    """ReLU in the other words: where, threshold, masks, clamp, maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(7))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d, e, f, g = self.layers
        x = a(x)
        x = b(torch.where(x > 0, x, 0.1 * x))
        x = c(F.threshold(x, 0, 0))
        x = d(x * (x > 0))
        x = e(x.masked_fill(x < 0, 0.0))
        x = f(torch.clamp_min(x, 0))
        return g(torch.maximum(x, x.new_zeros(())))


class Stochastic(nn.Module):
    """Whole branches are left out at random in training, one draw for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 10)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
                nn.Conv2d(16, 16, 3, padding=1),
            )
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        for block in self.blocks:
            y = block(x)
            if self.training:
                keep = torch.empty(x.shape[0], 1, 1, 1, dtype=x.dtype, device=x.device)
                y = y * keep.bernoulli_(0.8).div_(0.8)
            x = F.relu(x + y)
        return self.last(x.mean((2, 3)))


class SetItem(nn.Module):
    """A part of an activation is written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 48), nn.Linear(48, 48)
        self.c, self.d = nn.Linear(48, 48), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x))))
        y = x.clone()
        y[:, :8] = 0.5 * x[:, 8:16]
        return self.d(F.relu(self.c(y)))


class Skipped(nn.Module):
    """One block is entered only if its input's mean is positive: closed, and nothing else."""

    class Maybe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(x) if float(x.mean()) > 0 else x

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.maybe = nn.Linear(32, 64), nn.Linear(64, 32), self.Maybe()
        self.c, self.d = nn.Linear(32, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maybe(self.b(F.relu(self.a(x))))
        return self.d(F.relu(self.c(x)))


class Stores(nn.Module):
    """Keeps what it computed, and hands out a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.PReLU(64))
        self.head, self.last = nn.Linear(64, 10), None

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.last = self.net(x)
        return {"logits": self.head(self.last), "size": self.last.flatten(1).norm(dim=1)}


def mlp() -> nn.Module:
    pairs = pairwise((32, 64, 64, 64, 10))
    layers = [module for i, o in pairs for module in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def compiled() -> nn.Module:
    return torch.compile(mlp())  # type: ignore[return-value]


def weight_norm() -> nn.Module:
    inner = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
    return nn.Sequential(
        *(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), inner, nn.ReLU()),
        *(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


class Post(nn.Module):
    """A transformer's encoder with ReLU inside, as torch has it."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        for one in self.encoder.layers:
            one.load_state_dict(copy.deepcopy(layer).state_dict())
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


# name: (what makes it, the shape of one example)
HAND: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (32,)),
    "compiled mlp": (compiled, (32,)),
    "UNet": (UNet, (3, 32, 32)),
    "residual mlp": (Residual, (32,)),
    "squeeze-excite": (Excite, (3, 16, 16)),
    "tied weights": (Tied, (32,)),
    "x @ W, einsum": (Bare, (32,)),
    "where, masks": (Masks, (32,)),
    "stochastic depth": (Stochastic, (3, 16, 16)),
    "setitem": (SetItem, (32,)),
    "block on data": (Skipped, (32,)),
    "self.last, dict": (Stores, (32,)),
    "weight_norm": (weight_norm, (32,)),
    "nn.Transformer": (Post, (9, 32)),
}
