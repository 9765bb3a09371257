"""Layers as affine functions of their weight: adjoints, biases and Gram matrices."""

import pytest
import torch
from torch import nn

import riemann_unn as ru
from riemann_unn.init.calibration import Batch
from riemann_unn.init.warm_start.layers import AffineLayer, NotAffineError
from tests.init.warm_start.nets import seeded
from tests.support import gaussian

# name: (layer, input shape, whether one Gram matrix serves all rows)
LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (7, 5), True),
    "no bias": (lambda: nn.Linear(5, 4, bias=False), (7, 3, 5), True),
    "complex": (lambda: nn.Linear(5, 4, dtype=torch.complex128), (7, 5), True),
    "conv": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (4, 2, 6, 6), True),
    "reflecting": (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="reflect"), (4, 2, 6), True),
    "groups": (lambda: nn.Conv1d(4, 6, 3, groups=2), (3, 4, 8), False),
    "transposed": (lambda: nn.ConvTranspose1d(4, 3, 3), (3, 4, 8), False),
    "circular": (lambda: ru.nn.CircularConv1d(2, 3, 6), (5, 2, 6), True),
    "very wide": (lambda: nn.Linear(40, 1), (50, 40), False),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def affine(name: str) -> tuple[AffineLayer, torch.Tensor]:
    build, shape, _ = LAYERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = build().double() if name != "complex" else build()
    calls = [Batch((gaussian(*shape, dtype=module.weight.dtype, seed=i),), {}) for i in (1, 2)]
    bias = "bias" if module.bias is not None else None
    return AffineLayer(module, "weight", bias, calls), module.weight.detach().clone()


def inner(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.conj() * b).real.sum())


@every_layer
def test_adjoint_and_normal_equations(name):
    layer, weight = affine(name)
    other = gaussian(*weight.shape, dtype=weight.dtype, seed=3)
    outputs = layer(weight)
    residual = [gaussian(*o.shape, dtype=o.dtype, seed=4 + i) for i, o in enumerate(outputs)]
    want = sum(inner(o, r) for o, r in zip(outputs, residual, strict=True))
    assert inner(weight, layer.adjoint(residual)) == pytest.approx(want)
    centred = layer.centred(layer(other))
    want = sum(inner(o, c) for o, c in zip(outputs, centred, strict=True))
    assert inner(weight, layer.normal(other)) == pytest.approx(want)
    bias = layer.bias_of(outputs)
    assert (bias is None) == (layer.bias is None)
    if bias is not None:
        assert float(layer.bias_of(layer.centred(outputs)).abs().max()) < 1e-12


@every_layer
def test_gram_matrix_where_all_rows_are_treated_alike(name):
    layer, weight = affine(name)
    normal = layer.normal_map()
    assert (normal != layer.normal) == LAYERS[name][2]
    for seed in (5, 6):
        u = gaussian(*weight.shape, dtype=weight.dtype, seed=seed)
        assert torch.allclose(normal(u), layer.normal(u), atol=1e-10)


class Weighted(nn.Module):
    def __init__(self, what: str):
        super().__init__()
        self.weight, self.what = nn.Parameter(torch.randn(4, 4)), what

    def forward(self, x):
        value = {"square": self.weight**2, "nothing": 0 * self.weight, "relu": self.weight.relu()}
        return x @ value[self.what].mT


@pytest.mark.parametrize("what", ["square", "nothing", "relu"])
def test_layers_that_are_not_affine_are_noticed(what):
    calls = [Batch((gaussian(6, 4),), {})]
    with pytest.raises(NotAffineError):
        AffineLayer(seeded(Weighted, what), "weight", None, calls)
