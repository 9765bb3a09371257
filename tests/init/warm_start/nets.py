"""Models that the tests of the warm start convert, and the work around them."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import riemann_unn as ru
from tests.support import gaussian


def seeded(build: object, *args: object, seed: int = 0, **kwargs: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build(*args, **kwargs).double()  # type: ignore[operator]


def stack(*widths: int, act: type[nn.Module] = nn.ReLU, bias: bool = True) -> nn.Sequential:
    """Linear layers with an activation between them."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b, bias=bias), act()]
    return nn.Sequential(*layers[:-1])


class Residual(nn.Module):
    """A convolutional net with a skip connection, pooling and dropout."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.a = nn.Conv2d(width, width, 3, padding=1)
        self.b = nn.Conv2d(width, width, 3, padding=1)
        self.c = nn.Conv2d(width, 2 * width, 1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(2 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.b(F.relu(self.a(x))))
        x = self.c(F.max_pool2d(x, 2))
        return self.head(self.drop(F.relu(x)).mean((2, 3)))


class Normalised(nn.Module):
    """A convolutional net with batch normalisation."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv, self.last = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.head(F.relu(self.last(self.conv(x))).mean((2, 3)))


class Recurrent(nn.Module):
    """An nn.RNN with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(3, 6, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Circular(nn.Module):
    """Two circular convolutions, with trained kernels that have left their manifold."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ru.nn.CircularConv2d(1, 4, 6), ru.nn.CircularConv2d(4, 3, 6)
        self.head = nn.Linear(3, 2)
        with torch.no_grad():
            for layer in (self.first, self.second):
                layer.weight.mul_(1.5).add_(0.05 * torch.randn_like(layer.weight))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(F.relu(self.first(x))).relu().mean((2, 3)))


class Branching(nn.Module):
    """A forward that cannot be read: it looks at the data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x.relu() if float(x.detach().sum()) > 0 else x.relu() + 1)


def trained(model: nn.Module, x: Tensor, y: Tensor, *, steps: int = 60, lr: float = 3e-3) -> None:
    """Fit a classifier a little."""
    opt = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()


def times_points(model: nn.Module, *names: str, seed: int = 0) -> dict[str, float]:
    """Set weights to a gain times a random point of their manifold; return the gains."""
    gains = {name: 0.5 + 0.7 * i for i, name in enumerate(names)}
    with torch.no_grad():
        for i, name in enumerate(names):
            p = model.get_parameter(name)
            manifold = ru.manifold_of(p)
            assert manifold is not None
            shape = p.shape
            p.copy_(gains[name] * manifold.projx(gaussian(*shape, dtype=p.dtype, seed=seed + i)))
    return gains


def error_on(new: nn.Module, old: nn.Module, x: Tensor) -> float:
    """Relative distance of two models' outputs, in evaluation mode."""
    modes = new.training, old.training
    new.eval(), old.eval()
    with torch.no_grad():
        a, b = new(x), old(x)
    new.train(modes[0]), old.train(modes[1])
    return float((a - b).norm() / b.norm())


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        assert torch.equal(after[name].nan_to_num(7.0), value.nan_to_num(7.0)), name
