"""Networks to trace and rescale, each with an input; what is closed in them is said beside."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import riemann_unn as ru
from tests.support import generator


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 9), nn.LeakyReLU(0.1), nn.Linear(9, 3)
    )


def gelu() -> nn.Module:
    """Closed at the GELU."""
    return nn.Sequential(
        *(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 9), nn.GELU()),
        *(nn.Linear(9, 7), nn.ReLU(True), nn.Linear(7, 3)),
    )


class VGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(True), nn.AvgPool2d(2)),
        )
        self.classifier = nn.Sequential(
            *(nn.Dropout(), nn.Linear(12 * 7 * 7, 20), nn.ReLU(True), nn.Dropout()),
            nn.Linear(20, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(x.view(x.size(0), -1))


class Residual(nn.Module):
    def __init__(self, c: int, o: int, stride: int, norm: type[nn.Module]) -> None:
        super().__init__()
        bias = norm is nn.Identity
        self.conv1, self.norm1 = nn.Conv2d(c, o, 3, stride, 1, bias=bias), norm(o)
        self.conv2, self.norm2 = nn.Conv2d(o, o, 3, 1, 1, bias=bias), norm(o)
        self.short = nn.Identity()
        if c != o:
            self.short = nn.Sequential(nn.Conv2d(c, o, 1, stride, bias=False), norm(o))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.short(x)
        return self.relu(y)


def resnet(norm: type[nn.Module]) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(Residual(8, 8, 1, norm), Residual(8, 16, 2, norm), Residual(16, 16, 1, norm)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)),
    )


def separable() -> nn.Module:
    def block(c: int, o: int, stride: int) -> list[nn.Module]:
        deep = nn.Conv2d(c, c, 3, stride, 1, groups=c, bias=False)
        wide = nn.Conv2d(c, o, 1, bias=False)
        return [deep, nn.BatchNorm2d(c), nn.ReLU(), wide, nn.BatchNorm2d(o), nn.ReLU()]

    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU()),
        *(nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding="same", groups=4)),
        *(nn.ReLU(), *block(12, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
    )


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 10, 3, padding=1)
        self.bottom = nn.Conv2d(10, 10, 3, padding=2, dilation=2)
        self.up = nn.ConvTranspose2d(10, 6, 2, 2)
        self.join, self.out = nn.Conv2d(12, 8, 3, padding=1), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.down1(x))
        b = torch.relu(self.down2(F.max_pool2d(a, 2)))
        b = b + F.relu(self.bottom(b))
        c = self.up(b)
        missing = a.size(3) - c.size(3)
        c = torch.cat([a, F.pad(c, [0, missing, 0, missing])], dim=1)
        c = F.interpolate(F.relu(self.join(c)), scale_factor=2, mode="bilinear")
        return self.out(F.avg_pool2d(c, 2))


class Shared(nn.Module):
    """One layer called twice, one weight in two layers; the gate closes what feeds it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(5, 7), nn.Linear(7, 7)
        self.left, self.right = nn.Linear(7, 3), nn.Linear(7, 3)
        self.right.weight = self.left.weight
        self.weight, self.prelu = nn.Parameter(torch.randn(7, 7)), nn.PReLU(7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = self.twice(x).clamp(min=0) + 0.5 * self.twice(x).relu() - x
        x = self.prelu(F.linear(x, self.weight))
        return torch.sigmoid(self.left(x)) * self.right(F.dropout(x, 0.5, self.training))


class Shuffle(nn.Module):
    """Chunks, a channel shuffle by reshaping, a mean over the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.c, self.out = nn.Conv2d(8, 8, 1, groups=2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.a(x).relu().chunk(2, dim=1)
        x = torch.cat((u, self.b(v).relu_()), 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
        return self.out(F.leaky_relu(self.c(x)).mean([2, 3]))


class Excite(nn.Module):
    """Squeeze and excitation after group normalisation, then a maximum over rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)
        self.squeeze, self.excite = nn.Linear(8, 4), nn.Linear(4, 8)
        self.mix, self.out = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        gate = self.excite(F.relu(self.squeeze(x.mean((-2, -1))))).sigmoid()
        x = F.relu(self.mix(x * gate[:, :, None, None]))
        return self.out(x.max(dim=2)[0].unsqueeze(-1))


class Sequence1d(nn.Module):
    """One-dimensional layers, indexing, padding, stacking; a layer that is defined but not used."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(3, 8, 3, padding=1, padding_mode="reflect")
        self.b, self.weight = (
            nn.ConvTranspose1d(8, 6, 2, groups=2),
            nn.Parameter(torch.randn(8, 3, 1)),
        )
        self.norm, self.gamma = nn.BatchNorm1d(6), nn.Parameter(torch.randn(6, 1))
        self.instance, self.up = nn.InstanceNorm1d(6, affine=True), nn.Upsample(scale_factor=2)
        self.pad, self.t, self.out = nn.ReflectionPad1d(1), nn.Linear(6, 6), nn.Linear(6, 2)
        self.register_buffer("order", torch.tensor([3, 1, 0, 2, 5, 4]))
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.max(F.relu(self.a(x)), F.conv1d(x, self.weight).relu())
        y = F.relu(self.norm(self.b(y))) * self.gamma
        y = F.pad(y[:, self.order], (0, 0, 1, 1))[:, 1:-1]
        y = F.relu(self.instance(F.adaptive_avg_pool1d(self.pad(self.up(y)), 4)))
        y = F.relu(self.t(y.transpose(1, 2))).amax(dim=1)
        return self.out(torch.stack([y, y], 0).sum(0).abs())


class Recurrent(nn.Module):
    """Closed at the recurrence, whose matrix is tagged."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = ru.nn.OrthogonalRNN(3, 16)
        self.head = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][-1])


class Tokens(nn.Module):
    """Embedding and layer normalisation, with a tied output layer: only the inner layer is free."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 6), nn.LayerNorm(6)
        self.up, self.down, self.out = nn.Linear(6, 24), nn.Linear(24, 6), nn.Linear(6, 11)
        self.out.weight = self.embed.weight

    def forward(self, i: Tensor) -> Tensor:
        x = self.embed(i)
        return self.out(x + self.down(F.relu(self.up(self.norm(x)))))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(3))


# name: (model, input, number of channels that can be scaled)
ZOO = {
    "mlp": (mlp, lambda: normal(4, 6), 21),
    "gelu": (gelu, lambda: normal(4, 6), 15),
    "vgg": (VGG, lambda: normal(2, 3, 28, 28), 40),
    "resnet": (lambda: resnet(nn.Identity), lambda: normal(4, 3, 16, 16), 8 + 8 + 16 + 16 + 16),
    "resnet-bn": (lambda: resnet(nn.BatchNorm2d), lambda: normal(4, 3, 16, 16), 8 + 8 + 16 * 3),
    "separable": (separable, lambda: normal(4, 3, 16, 16), 8 + 8 + 12 + 12 + 12 + 16),
    "unet": (UNet, lambda: normal(2, 1, 10, 10), 6 + 10 + 6 + 8),
    "shared": (Shared, lambda: normal(4, 5), 14),
    "shuffle": (Shuffle, lambda: normal(2, 3, 6, 6), 8 + 4 + 8),
    "excite": (Excite, lambda: normal(2, 3, 8, 8), 8 + 4 + 8),
    "sequence": (Sequence1d, lambda: normal(4, 3, 9), 8 + 6 + 6 + 6),
    "recurrent": (Recurrent, lambda: normal(5, 2, 3), 12),
    "tokens": (Tokens, lambda: torch.arange(10).reshape(2, 5), 6 + 24),
}


def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A model with weights and buffers that are all nonzero, and its input."""
    make, draw, _ = ZOO[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = make().to(dtype)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._NormBase) and module.affine:
                    module.weight.uniform_(0.5, 2)
                    module.bias.normal_()
                    if module.running_var is not None:
                        module.running_var.uniform_(0.5, 2)
                        module.running_mean.normal_()
    x = draw()
    return model, x.to(dtype) if x.is_floating_point() else x


def output(model: nn.Module, x: Tensor, *, training: bool) -> Tensor:
    """The output of a copy, so that buffers and mode stay; dropout draws the same every time."""
    import copy

    model = copy.deepcopy(model).train(training)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(2)
        return model(x)
