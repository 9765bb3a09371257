"""Time path conditioning: beside a loop over neurons, on a ResNet-18, and as the model grows.

    OMP_NUM_THREADS=2 python bench/bench_path_condition.py

prints three tables. Milliseconds are the best of a few runs; compare those of one run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

import riemann_unn as ru
from riemann_unn.graph import trace
from riemann_unn.graph.lifting import path_energies
from riemann_unn.linalg.rescaling import EnergyBlock, balance_energies


def mlp(*widths: int) -> nn.Sequential:
    layers = [module for i, o in pairwise(widths) for module in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Block(nn.Module):
    def __init__(self, c: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or c != o:
            short = nn.Conv2d(c, o, 1, stride, bias=False)
            self.downsample = nn.Sequential(short, nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


def resnet18() -> nn.Module:
    layers = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    layers.append(nn.MaxPool2d(3, 2, 1))
    for c, o, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)):
        layers += [Block(c, o, stride), Block(o, o, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def chain(model: nn.Sequential) -> tuple[list[EnergyBlock], int, list[Tensor], list[Tensor]]:
    """The energies of a chain of linear layers: as blocks, and as matrices and bias vectors."""
    view = trace(model)
    energies = path_energies(view)
    weights = [g for name, g in energies.items() if name.endswith("weight")]
    biases = [g for name, g in energies.items() if name.endswith("bias")]
    channels, first, blocks = int(view.free.sum()), 0, []
    for k, (g, b) in enumerate(zip(weights, biases, strict=True)):
        o, i = g.shape
        last = k == len(weights) - 1
        feeds = torch.full((1, o), channels) if last else torch.arange(first, first + o)[None]
        reads = torch.arange(first - i, first)[None] if k else torch.full((1, i), channels)
        blocks.append(EnergyBlock(g[None], feeds, reads))
        blocks.append(EnergyBlock(b[None, :, None], feeds, torch.full((1, 1), channels)))
        first += o
    return blocks, channels, weights, biases


def neuron_by_neuron(weights: list[Tensor], biases: list[Tensor], sweeps: int) -> float:
    """The paper's loop on a chain of layers, each neuron in time of its own weights only."""
    weights, biases = [w.clone() for w in weights], [b.clone() for b in biases]
    n = sum(x.numel() for x in weights + biases)
    total = float(sum(x.sum() for x in weights + biases))
    linear = 0.0
    for _ in range(sweeps):
        for into, bias, out in zip(weights, biases, weights[1:], strict=False):
            slope = out.shape[0] - into.shape[1] - 1
            for h in range(into.shape[0]):
                fed, read = float(into[h].sum() + bias[h]), float(out[:, h].sum())
                rest = total - fed - read
                a, b, c = read * (n - slope), -slope * rest, -fed * (n + slope)
                x = (-b + (b * b - 4 * a * c) ** 0.5) / (2 * a)
                into[h] /= x
                bias[h] /= x
                out[:, h] *= x
                total = rest + read * x + fed / x
                linear += slope * float(torch.tensor(x, dtype=torch.float64).log())
    total = float(sum(x.sum() for x in weights + biases))
    return n * float(torch.tensor(total, dtype=torch.float64).log()) - linear


def best(function: Callable[[], object], runs: int = 5) -> float:
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def condition(model: nn.Module) -> float:
    def once() -> None:
        ru.init.path_condition_(model).undo()

    once()
    return best(once, 3)


def main() -> None:
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("\nten sweeps neuron by neuron, and all neurons of a layer at once (float64)")
    print("widths                   loop (s)  solver (s)  ratio  whole call (s)  ratio  F loop - F")
    for widths in ((784, 128, 64, 10), (784, 512, 512, 10), (784, 1024, 1024, 1024, 10)):
        model = mlp(*widths)
        blocks, channels, weights, biases = chain(model)
        start = time.perf_counter()
        value = neuron_by_neuron(weights, biases, 10)
        loop = time.perf_counter() - start
        found = balance_energies(blocks, channels)
        ours, whole = best(lambda: balance_energies(blocks, channels)), condition(model)  # noqa: B023
        name = "-".join(map(str, widths))
        print(
            f"{name:24} {loop:8.2f}  {ours:10.4f} {loop / ours:6.0f}  {whole:14.4f} "
            f"{loop / whole:6.0f}  {value - found.after:10.2f}"
        )
    model = resnet18()
    count = sum(p.numel() for p in model.parameters())
    print(f"\nResNet-18, {count / 1e6:.1f} million parameters: {condition(model):.2f} s")
    print("\nparameters (millions)  whole call (s)  microseconds per thousand parameters")
    for width in (256, 512, 1024, 2048, 4096):
        model = mlp(64, width, width, 10)
        count = sum(p.numel() for p in model.parameters())
        seconds = condition(model)
        print(f"{count / 1e6:21.2f}  {seconds:14.4f}  {1e9 * seconds / count:36.2f}")


if __name__ == "__main__":
    main()
