"""Random networks with scales of many orders of magnitude, all numbers in logarithms.

A network is a list of layers, each from a space of channels to another, so that sums, shared
weights and groups are as easy as chains. Its energies come from one walk to the outputs and one
back; nothing overflows before they are handed to the solver.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from riemann_unn.linalg.rescaling import EnergyBlock

KINDS = ("chain", "residual", "shared", "grouped", "skip")
INPUT, OUTPUT = -1, -2
TEN = 2 * math.log(10)  # a factor of ten of a weight, in the logarithm of its square


@dataclass
class Layer:
    """Logarithms of squared weights and biases, from one space to another."""

    source: int
    target: int
    weight: Tensor
    bias: Tensor | None


@dataclass
class Network:
    kind: str
    layers: list[Layer]  # in the order in which they run; the same object twice shares its weights
    sizes: list[int]  # channels of each hidden space

    @property
    def channels(self) -> int:
        return sum(self.sizes)

    def place(self, space: int, count: int) -> Tensor:
        """The numbers of the channels of a space; the fixed one for inputs and outputs."""
        if space < 0:
            return torch.full((count,), self.channels)
        return sum(self.sizes[:space]) + torch.arange(count)

    def rescale(self, z: Tensor) -> None:
        """Multiply what feeds a channel by exp(z / 2), and divide what reads it."""
        z = torch.cat([z, z.new_zeros(1)])
        for layer in {id(x): x for x in self.layers}.values():
            into = z[self.place(layer.target, len(layer.weight))]
            of = z[self.place(layer.source, layer.weight.shape[1])]
            layer.weight = layer.weight + into.unsqueeze(1) - of
            layer.bias = None if layer.bias is None else layer.bias + into


def network(seed: int, *, decades: float = 20.0, widest: int = 10) -> Network:
    """A random network; layers or channels are scaled by up to ten to the ``decades``."""
    draw, g = random.Random(seed), torch.Generator().manual_seed(seed)
    kind = draw.choice(KINDS)
    by_layer = draw.random() < 0.7
    by_channel = draw.random() < 0.7 or not by_layer
    keeps_function = draw.random() < 0.4  # scales that rescaling alone would take back
    sizes: list[int] = []

    def space() -> int:
        half = draw.randint(1, widest // 2)
        sizes.append(2 * half if kind == "grouped" else draw.randint(1, widest))
        return len(sizes) - 1

    def scales(count: int) -> Tensor:
        s = torch.zeros(count, dtype=torch.float64)
        if by_layer:
            s += draw.uniform(-decades, decades)
        if by_channel:
            s += decades * (2 * torch.rand(count, generator=g, dtype=torch.float64) - 1)
        return TEN * s.clamp(-decades, decades)

    def normal(*shape: int) -> Tensor:
        return 2 * torch.randn(*shape, generator=g, dtype=torch.float64).abs().log()

    def layer(source: int, target: int, inputs: int, outputs: int, *, groups: int = 1) -> Layer:
        weight = normal(outputs, inputs)
        if groups == 2:
            weight[: outputs // 2, inputs // 2 :] = weight[
                outputs // 2 :, : inputs // 2
            ] = -math.inf
        bias = normal(outputs) if draw.random() < 0.8 else None
        if not keeps_function:
            s = scales(outputs)
            weight = weight + s.unsqueeze(1)
            if bias is not None and draw.random() < 0.6:
                bias = bias + s
        return Layer(source, target, weight, bias)

    here = space()
    layers = [layer(INPUT, here, draw.randint(1, widest), sizes[here])]
    for _ in range(draw.randint(0, 5)):
        there = space()
        groups = 2 if kind == "grouped" else 1
        one = layer(here, there, sizes[here], sizes[there], groups=groups)
        layers.append(one)
        if kind in ("residual", "shared"):
            two = layer(there, here, sizes[there], sizes[here])
            layers += [two] if kind == "residual" else [two, one, two]
            continue
        if kind == "skip" and here > 0:
            layers.append(layer(here - 1, there, sizes[here - 1], sizes[there]))
        here = there
    layers.append(layer(here, OUTPUT, sizes[here], draw.randint(1, widest)))
    net = Network(kind, layers, sizes)
    if keeps_function:
        net.rescale(torch.cat([scales(n) for n in sizes]))
    return net


def path_energies(net: Network) -> list[tuple[Layer, Tensor, Tensor | None]]:
    """By layer, logarithms of the energies of its weights and biases."""
    inputs = net.layers[0].weight.shape[1]
    values = {INPUT: torch.zeros(inputs, dtype=torch.float64)}
    sources = []
    for x in net.layers:
        sources.append(values[x.source])
        result = (x.weight + values[x.source]).logsumexp(1)
        result = result if x.bias is None else torch.logaddexp(result, x.bias)
        known = values.get(x.target)
        values[x.target] = result if known is None else torch.logaddexp(known, result)
    adjoint = {OUTPUT: torch.zeros(len(net.layers[-1].weight), dtype=torch.float64)}
    found: dict[int, tuple[Layer, Tensor, Tensor]] = {}
    for x, source in zip(reversed(net.layers), reversed(sources), strict=True):
        above = adjoint[x.target]
        weight = (above.unsqueeze(1) + source).where(x.weight > -math.inf, -math.inf)
        if id(x) in found:
            _, other, bias = found[id(x)]
            found[id(x)] = (x, torch.logaddexp(other, weight), torch.logaddexp(bias, above))
        else:
            found[id(x)] = (x, weight, above)
        below = (x.weight + above.unsqueeze(1)).logsumexp(0)
        known = adjoint.get(x.source)
        adjoint[x.source] = below if known is None else torch.logaddexp(known, below)
    return [(x, w, None if x.bias is None else b) for x, w, b in found.values()]


def squares(net: Network) -> list[tuple[Layer, Tensor, Tensor | None]]:
    return [(x, x.weight, x.bias) for x in {id(x): x for x in net.layers}.values()]


def blocks(
    net: Network, logs: list[tuple[Layer, Tensor, Tensor | None]]
) -> tuple[list[EnergyBlock], float]:
    """Energies divided by the largest, as blocks, and the logarithm of the largest."""
    peak = max(float(t.max()) for _, *parts in logs for t in parts if t is not None)
    found = []
    for x, weight, bias in logs:
        outputs, inputs = weight.shape
        feeds, reads = net.place(x.target, outputs), net.place(x.source, inputs)
        energy = (weight - peak).exp()
        if net.kind == "grouped" and x.source >= 0 and x.target >= 0:
            o, i = outputs // 2, inputs // 2
            energy = torch.stack([energy[:o, :i], energy[o:, i:]])
            found.append(EnergyBlock(energy, feeds.reshape(2, o), reads.reshape(2, i)))
        else:
            found.append(EnergyBlock(energy[None], feeds[None], reads[None]))
        if bias is not None:
            constant = torch.full((1, 1), net.channels)
            found.append(EnergyBlock((bias - peak).exp()[None, :, None], feeds[None], constant))
    return found, peak
