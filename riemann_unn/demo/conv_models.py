"""Networks of circular convolutions, orthogonal or ordinary, and their singular values."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import riemann_unn as ru

from ..linalg import conv_singular_values
from ..nn import CircularConv2d, GroupSort
from .models import Learner

__all__ = [
    "ResNet9",
    "adam",
    "conv2d",
    "conv_layers",
    "lipschitz_bound",
    "lipschitz_net",
    "operator_kernel",
    "projunn",
    "singular_values",
]

_CONVS = (CircularConv2d, nn.Conv2d)


def conv2d(
    in_channels: int, out_channels: int, size: int, *, stride: int, plain: bool
) -> nn.Module:
    """A circular convolution of a signal with ``size`` by ``size`` sites.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        size: Of the signal.
        stride: Of the output.
        plain: An ordinary kernel of 3 by 3 sites with Kaiming's initial values, not an orthogonal
            one as large as the signal.
    """
    if not plain:
        return CircularConv2d(in_channels, out_channels, size, stride)
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, 1, padding_mode="circular")
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


class ScaledReLU(nn.Module):
    """ReLU times the square root of 2, which keeps the mean square of centred features."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation.

        Args:
            input: Any real tensor.
        """
        return math.sqrt(2) * input.relu()


class ResNet9(nn.Module):
    """Eight convolutions, two pairs of them bypassed, and a linear layer.

    The network of the projUNN paper's experiment on images: ``width`` channels on all sites, twice
    as many on a quarter of them and four times as many on a sixteenth, averaged over the quarters
    of the image and multiplied by the root of the number of sites in each, so that features which
    differ from site to site keep their size. Ordinary kernels include the factor for ReLU in their
    initial values; orthogonal ones cannot, so there it is in the activation.

    Args:
        width: Channels of the first layer.
        size: Sites of an image along each side, a multiple of 4.
        plain: Ordinary convolutions in place of orthogonal ones.
        norm: Normalise by BatchNorm after every convolution, as the paper's authors do.
    """

    def __init__(
        self, width: int = 16, *, size: int = 8, plain: bool = False, norm: bool = False
    ) -> None:
        super().__init__()

        def conv(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Module:
            layer = conv2d(in_channels, out_channels, size, stride=stride, plain=plain)
            batch_norm = [nn.BatchNorm2d(out_channels)] if norm else []
            return nn.Sequential(layer, *batch_norm, nn.ReLU() if plain else ScaledReLU())

        w, half, quarter = width, size // 2, size // 4
        self.stem = nn.Sequential(conv(1, w, size), conv(w, 2 * w, size, 2))
        self.first = nn.Sequential(conv(2 * w, 2 * w, half), conv(2 * w, 2 * w, half))
        self.middle = nn.Sequential(conv(2 * w, 4 * w, half, 2), conv(4 * w, 4 * w, quarter))
        self.second = nn.Sequential(conv(4 * w, 4 * w, quarter), conv(4 * w, 4 * w, quarter))
        self.pool, self.root = nn.AdaptiveAvgPool2d(2), quarter / 2
        self.head = nn.Linear(16 * w, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Classify.

        Args:
            images: ``(N, 1, size, size)``.
        """
        x = self.stem(images)
        x = self.middle(x + self.first(x))
        x = x + self.second(x)
        logits: Tensor = self.head(self.root * self.pool(x).flatten(1))
        return logits


def lipschitz_net(width: int = 16, *, plain: bool = False) -> nn.Sequential:
    """A network of 1-Lipschitz layers, or of ordinary ones in their place.

    Args:
        width: Channels of the first layer.
        plain: Ordinary convolutions and an ordinary linear layer.
    """
    sizes = [(1, width, 8, 1), (width, 2 * width, 8, 2), (2 * width, 4 * width, 4, 2)]
    sizes.append((4 * width, 4 * width, 2, 1))
    layers: list[nn.Module] = []
    for in_channels, out_channels, size, stride in sizes:
        layers += [conv2d(in_channels, out_channels, size, stride=stride, plain=plain), GroupSort()]
    head = nn.Linear(16 * width, 10)
    if not plain:
        ru.tag_(head.weight, ru.Stiefel())
        ru.init.warm_start_(head)
    return nn.Sequential(*layers, nn.Flatten(), head)


def _learner(name: str, model: nn.Module, optimizer: torch.optim.Optimizer, epochs: int) -> Learner:
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    return Learner(name, model, optimizer, schedule)


def projunn(name: str, model: nn.Module, *, lr: float, rank: int, epochs: int) -> Learner:
    """A learner that trains by ProjUNN-T on Adam, its learning rate falling along a cosine.

    Args:
        name: For table and picture.
        model: Has tagged parameters.
        lr: First learning rate.
        rank: Of the updates.
        epochs: After which the rate is 0.
    """
    optimizer = ru.optim.ProjUNNT(model.parameters(), lr=lr, rank=rank, base=torch.optim.Adam)
    return _learner(name, model, optimizer, epochs)


def adam(name: str, model: nn.Module, *, lr: float, epochs: int) -> Learner:
    """The same with Adam alone.

    Args:
        name: For table and picture.
        model: Any model.
        lr: First learning rate.
        epochs: After which the rate is 0.
    """
    return _learner(name, model, torch.optim.Adam(model.parameters(), lr=lr), epochs)


def conv_layers(model: nn.Module, images: Tensor) -> list[tuple[nn.Module, tuple[int, ...]]]:
    """Every convolution in a model, in order of use, with the shape of its input.

    Args:
        model: The model.
        images: An input to find the shapes with.
    """
    found: list[tuple[nn.Module, tuple[int, ...]]] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        found.append((module, tuple(inputs[0].shape[1:])))

    hooks = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, _CONVS)]
    with torch.no_grad():
        model(images[:1])
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def operator_kernel(layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The kernel of a layer's whole linear operator, strided ones included, in float64.

    A circular convolution with stride s commutes with shifts by s sites: with the s by s sites of
    each cell as channels it is a plain one, whose kernel is the layer's response to impulses.

    Args:
        layer: A circular convolution of either kind.
        shape: Of its input ``(channels, h, w)``.

    Returns:
        The kernel ``(out, in * s * s, h / s, w / s)``.
    """
    channels, height, width = shape
    zero = next(layer.parameters()).new_zeros((1, *shape))
    nothing = layer(zero)
    down, across = height // nothing.shape[-2], width // nothing.shape[-1]
    impulses = zero.new_zeros(channels, down, across, *shape)
    for c in range(channels):
        for i in range(down):
            for j in range(across):
                impulses[c, i, j, c, i, j] = 1
    response: Tensor = layer(impulses.flatten(0, 2)) - nothing
    return response.transpose(0, 1).double()


def singular_values(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Singular values of every convolution at every frequency, in order of use.

    Args:
        model: The model.
        images: An input to find the shapes with.

    Returns:
        For each layer ``(h, w, min(out, in))``, as :func:`riemann_unn.linalg.conv_singular_values`.
    """
    return [
        conv_singular_values(operator_kernel(layer, shape), ndim=2)
        for layer, shape in conv_layers(model, images)
    ]


def lipschitz_bound(model: nn.Module, images: Tensor) -> float:
    """The product of the measured spectral norms of all layers.

    Args:
        model: Convolutions, linear layers, and 1-Lipschitz activations.
        images: An input to find the shapes with.
    """
    norms = [float(values.max()) for values in singular_values(model, images)]
    heads = [m.weight.detach().double() for m in model.modules() if isinstance(m, nn.Linear)]
    return math.prod(norms) * math.prod(float(torch.linalg.matrix_norm(w, 2)) for w in heads)
