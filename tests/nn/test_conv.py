"""Circular convolution layers."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import riemann_unn as ru
from riemann_unn.nn import (
    CircularConv1d,
    CircularConv2d,
    CircularConv3d,
    ConvRNN,
    GroupSort,
    PhaseSigmoid,
    certified_radius,
)
from tests.support import assert_on_manifold, gaussian

LAYERS = {1: (CircularConv1d, (12,)), 2: (CircularConv2d, (8, 6)), 3: (CircularConv3d, (4, 2, 6))}
over_layers = pytest.mark.parametrize("ndim", LAYERS)
over_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def correlate(x, weight):
    """The layer by torch's own convolution: padded around the torus, kernel turned around."""
    ndim = x.ndim - 2
    dims = tuple(range(2, x.ndim))
    turned = torch.roll(weight.flip(dims), (-1,) * ndim, dims)  # centre last, at n - 1
    turned = torch.roll(turned, (1,) * ndim, dims)
    pads = [p for n in reversed(x.shape[2:]) for p in (n - 1, 0)]
    conv = (functional.conv1d, functional.conv2d, functional.conv3d)[ndim - 1]
    return conv(functional.pad(x, pads, mode="circular"), turned)


@over_layers
@over_dtypes
def test_layer_is_a_circular_convolution(ndim, dtype):
    cls, size = LAYERS[ndim]
    layer, x = cls(2, 3, size, dtype=dtype), gaussian(5, 2, *size, dtype=dtype)
    nn.init.normal_(layer.bias)
    expected = correlate(x, layer.weight) + layer.bias.reshape(-1, *(1,) * ndim)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x[1]), layer(x)[1])
    assert layer.weight.shape == (3, 2, *size)
    kind = ru.UnitaryConv if dtype.is_complex else ru.OrthogonalConv
    assert ru.manifold_of(layer.weight) == kind(ndim)


@over_layers
@over_dtypes
@pytest.mark.parametrize("init", ["local", "haar", "identity"])
def test_norms_are_kept_or_never_grow(ndim, dtype, init):
    cls, size = LAYERS[ndim]
    for out in (1, 3, 4, 9):
        layer, x = cls(4, out, size, init=init, dtype=dtype), gaussian(4, *size, dtype=dtype)
        assert_on_manifold(layer.weight)
        ratio = float((layer(x).norm() / x.norm()).detach().real)
        assert ratio == pytest.approx(1.0, abs=1e-12) if out >= 4 else ratio < 1


@over_layers
@over_dtypes
def test_space_to_depth_is_an_isometry_and_subsampling_is_not(ndim, dtype):
    cls, size = LAYERS[ndim]
    x = gaussian(5, 2, *size, dtype=dtype)
    exact = cls(2, 2 * 2**ndim, size, 2, dtype=dtype)
    assert exact(x).shape == (5, 2 * 2**ndim, *(n // 2 for n in size))
    torch.testing.assert_close(exact(x).norm(), x.norm())
    assert exact.weight.shape == (2 * 2**ndim, 2 * 2**ndim, *(n // 2 for n in size))
    torch.testing.assert_close(exact(x[3]), exact(x)[3])
    lossy = cls(2, 2, size, 2, downsample="subsample", dtype=dtype)
    assert lossy(x).shape == (5, 2, *(n // 2 for n in size))
    assert lossy(x).norm() < 0.9 * x.norm()
    plain = cls(2, 2, size, dtype=dtype)
    plain.weight.data.copy_(lossy.weight)
    whole = plain(x)
    picked = whole[(slice(None), slice(None), *(slice(None, None, 2),) * ndim)]
    torch.testing.assert_close(lossy(x), picked)


def test_space_to_depth_is_torchs_pixel_unshuffle():
    layer, x = CircularConv2d(3, 12, (8, 6), 2, init="identity", bias=False), gaussian(2, 3, 8, 6)
    expected = functional.pixel_unshuffle(x.float(), 2)
    torch.testing.assert_close(layer(x.float()), expected)
    mixed = CircularConv2d(1, 6, (8, 6), (2, 3), bias=False)
    assert mixed(x[:, :1].float()).shape == (2, 6, 4, 2)
    torch.testing.assert_close(mixed(x[:, :1].float()).norm(), x[:, :1].float().norm())


def test_local_kernels_are_near_their_centre_and_haar_ones_anywhere():
    local = ru.linalg.conv_decay(CircularConv2d(4, 4, 16).weight).mass_outside
    haar = ru.linalg.conv_decay(CircularConv2d(4, 4, 16, init="haar").weight).mass_outside
    assert local[3] < 0.25 < 0.6 < haar[3]


def test_layer_trains_survives_copies_and_states():
    layer = nn.Sequential(CircularConv2d(2, 4, 6), nn.ReLU(), CircularConv2d(4, 4, 6, 2))
    other = copy.deepcopy(layer)
    optimizer = ru.optim.ProjUNNT(layer.parameters(), lr=0.05)
    before = layer[0].weight.detach().clone()
    for step in range(10):
        optimizer.zero_grad()
        layer(gaussian(3, 2, 6, 6, seed=step).float()).sum().backward()
        optimizer.step()
    assert not torch.equal(layer[0].weight, before)
    assert_on_manifold(layer[0].weight)
    other.load_state_dict(layer.state_dict(), assign=True)
    assert ru.manifold_of(other[0].weight) == ru.OrthogonalConv(2)
    x = gaussian(1, 2, 6, 6).float()
    assert torch.equal(layer(x), other(x))


def test_kernels_of_few_channels_are_exact_after_every_step():
    for seed in range(12):
        torch.manual_seed(seed)
        layer = nn.Sequential(CircularConv2d(2, 4, 6), nn.ReLU(), CircularConv2d(4, 4, 6, 2))
        optimizer = ru.optim.ProjUNNT(layer.parameters(), lr=0.05)
        for step in range(10):
            optimizer.zero_grad()
            layer(gaussian(3, 2, 6, 6, seed=step).float()).sum().backward()
            optimizer.step()
            assert_on_manifold(layer[0].weight)
            assert_on_manifold(layer[2].weight)


def test_real_signals_enter_complex_layers_and_halves_stay_half():
    complex_layer = CircularConv1d(2, 2, 6, dtype=torch.complex64)
    assert complex_layer(gaussian(3, 2, 6).float()).dtype == torch.complex64
    half = CircularConv1d(2, 2, 6, dtype=torch.bfloat16)
    assert half(gaussian(3, 2, 6).bfloat16()).dtype == torch.bfloat16


def test_printing():
    assert str(CircularConv2d(3, 4, 8)) == "CircularConv2d(3, 4, size=(8, 8))"
    layer = CircularConv2d(3, 4, (8, 4), 2, bias=False, init="haar", dtype=torch.complex64)
    assert "stride=(2, 2), downsample='space_to_depth', bias=False" in str(layer)
    assert "init='haar', dtype=torch.complex64" in str(layer)
    rnn = ConvRNN(1, 2, 8, "phase_sigmoid", bias=False, batch_first=True, init="identity")
    assert "nonlinearity='phase_sigmoid', bias=False, batch_first=True, init='identity'" in str(rnn)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CircularConv2d(2, 2, 8, padding_mode="zeros"), "Stiefel"),
        (lambda: CircularConv2d(2, 2, 8, 3), "must divide"),
        (lambda: CircularConv2d(2, 2, (8, 8, 8)), "or 2 of them"),
        (lambda: CircularConv2d(2, 2, 0), "positive integer"),
        (lambda: CircularConv2d(0, 2, 8), "in_channels"),
        (lambda: CircularConv2d(2, 0, 8), "out_channels"),
        (lambda: CircularConv2d(2, 2, 8, downsample="pool"), "downsample"),
        (lambda: CircularConv2d(2, 2, 8, init="zeros"), "init"),
        (lambda: CircularConv2d(2, 2, 8, dtype=torch.int32), "floating or complex"),
        (lambda: CircularConv2d(2, 2, 3)(torch.zeros(1, 2, 8, 8)), "as large as the signal"),
        (lambda: CircularConv2d(2, 2, 8)(torch.zeros(1, 3, 8, 8)), "as large as the signal"),
        (lambda: CircularConv2d(2, 2, 8)(torch.zeros(8, 8)), "as large as the signal"),
        (
            lambda: CircularConv2d(2, 2, 4)(torch.zeros(2, 4, 4, dtype=torch.complex64)),
            "complex dtype",
        ),
        (lambda: ConvRNN(1, 2, ()), "at least one dimension"),
        (lambda: ConvRNN(1, 2, 8, "tanh"), "nonlinearity"),
        (lambda: ConvRNN(1, 2, 8, init="x"), "init"),
        (lambda: ConvRNN(0, 2, 8), "in_channels"),
        (lambda: ConvRNN(1, 2, 8)(torch.zeros(3, 1, 7)), "takes input"),
        (lambda: ConvRNN(1, 2, 8)(torch.zeros(0, 5, 1, 8)), "no steps"),
        (lambda: ConvRNN(1, 2, 8)(torch.zeros(3, 5, 1, 8), torch.zeros(4, 2, 8)), "hx must"),
        (lambda: ConvRNN(1, 2, 8).evolve(torch.zeros(2, 8), steps=0), "steps"),
        (lambda: ConvRNN(1, 2, 8).evolve(torch.zeros(2, 8) * 1j, steps=1), "complex dtype"),
        (lambda: PhaseSigmoid(0), "gain"),
        (lambda: GroupSort(0), "group_size"),
        (lambda: GroupSort(2)(torch.zeros(1, 3)), "do not divide"),
        (lambda: certified_radius(torch.zeros(3, 1)), "two classes"),
        (lambda: certified_radius(torch.zeros(3, 2), lipschitz=0), "lipschitz"),
    ],
)
def test_what_cannot_be_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
