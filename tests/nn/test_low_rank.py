"""LowRankLinear and LowRankConv2d: drop-ins for torch's layers, plain or with tagged factors."""

import copy
import pickle

import pytest
import torch
from torch import nn

import riemann_unn as ru
from tests.support import assert_on_manifold, gaussian, rounding

GEOMETRIES = [
    {},
    {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
    {"padding": "same", "dilation": 2},
    {"padding": "valid", "bias": False},
    {"stride": 2, "padding": (2, 1), "padding_mode": "circular"},
    {"padding": "same", "padding_mode": "reflect"},
    {"stride": (1, 3), "padding": 1, "padding_mode": "replicate"},
]
splits = pytest.mark.parametrize("split", ["channel", "spatial"])
kinds = pytest.mark.parametrize("orthonormal", [False, True])


def near(a, b, factor: float = 64.0) -> bool:
    scale = float(b.detach().abs().max())
    return float((a - b).detach().abs().max()) <= rounding(b.dtype, 8, factor) * scale


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_linear_at_full_rank_is_the_layer(shape, dtype, orthonormal):
    dense = nn.Linear(*shape, dtype=dtype)
    layer = ru.nn.LowRankLinear.from_dense(dense, 99, orthonormal=orthonormal)
    x = gaussian(2, 3, shape[0], dtype=dtype)
    assert layer.rank == 5
    assert near(layer(x), dense(x)) and near(layer.to_dense()(x), dense(x))
    assert near(layer.weight, dense.weight)


@kinds
@splits
@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_convolution_at_full_rank_is_the_layer(options, split, orthonormal):
    dense = nn.Conv2d(3, 4, (3, 2), **options)
    layer = ru.nn.LowRankConv2d.from_dense(dense, 99, split=split, orthonormal=orthonormal)
    x = gaussian(2, 3, 9, 8, dtype=torch.float32)
    assert near(layer(x), dense(x)) and near(layer.to_dense()(x), dense(x))
    assert near(layer(x[0]), dense(x[0]))
    assert repr(layer.to_dense()) == repr(dense)


def test_rank_is_the_nearest():
    dense = nn.Linear(8, 6, dtype=torch.float64)
    s = torch.linalg.svdvals(dense.weight)
    for rank in (1, 3, 5):
        layer = ru.nn.LowRankLinear.from_dense(dense, rank)
        distance = torch.linalg.matrix_norm(layer.weight - dense.weight).item()
        assert distance == pytest.approx(s[rank:].norm().item(), rel=1e-10)


@splits
def test_multiplications_are_those_done(split):
    dense = nn.Conv2d(4, 6, 3, stride=(1, 2))
    layer = ru.nn.LowRankConv2d.from_dense(dense, 2, split=split)
    counted = []

    def count(weight: torch.Tensor, out: torch.Tensor) -> None:
        counted.append(weight[0].numel() * out[0].numel())

    real = torch.nn.functional.conv2d

    def spy(x, weight, *rest):
        out = real(x, weight, *rest)
        count(weight, out)
        return out

    x = torch.zeros(1, 4, 12, 101)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("riemann_unn.nn.low_rank_conv.functional.conv2d", spy)
        out = layer(x)
    positions = out.shape[-1] * out.shape[-2]
    # The spatial split also visits the columns that the last window does not start at.
    assert layer.macs() == pytest.approx(sum(counted) / positions, rel=0.02)
    assert f"MACs={layer.macs()}" in repr(layer)
    assert layer.weight_parameters() == layer.A.numel() + layer.B.numel()
    assert f"parameters={layer.weight_parameters()} of {dense.weight.numel()}" in repr(layer)


@kinds
def test_settings_are_carried_over(orthonormal):
    dense = nn.Linear(6, 5, dtype=torch.bfloat16).eval()
    dense.weight.requires_grad_(False)
    state = torch.get_rng_state()
    layer = ru.nn.LowRankLinear.from_dense(dense, 2, orthonormal=orthonormal)
    assert torch.equal(state, torch.get_rng_state())
    assert layer.A.dtype == torch.bfloat16 and not layer.training
    assert not layer.A.requires_grad and not layer.B.requires_grad and layer.bias.requires_grad
    assert torch.equal(layer.bias, dense.bias)
    back = layer.train().to_dense()
    assert back.training and not back.weight.requires_grad and back.bias.requires_grad


@pytest.mark.parametrize("make", ["linear", "channel", "spatial"])
def test_orthonormal_factors_stay_so(make):
    if make == "linear":
        layer, x = ru.nn.LowRankLinear(8, 6, 3, orthonormal=True), gaussian(20, 8)
    else:
        layer = ru.nn.LowRankConv2d(3, 6, 3, 3, split=make, orthonormal=True)
        x = gaussian(20, 3, 5, 5)
    assert {name for name, _ in ru.tagged_parameters(layer)} == {"A", "B"}
    before = layer.A.detach().clone()
    optimizer = ru.optim.ProjUNNT(layer.parameters(), lr=0.05, rank=2, base=torch.optim.Adam)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (layer(x.float()) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0] and float((layer.A - before).detach().norm()) > 0.1
    for p in (layer.A, layer.B):
        assert_on_manifold(p)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert len(ru.tagged_parameters(twin)) == 2
    layer.load_state_dict({k: v.clone() for k, v in layer.state_dict().items()}, assign=True)
    assert len(ru.tagged_parameters(layer)) == 2


@kinds
def test_random_factors_have_the_variance_of_dense_layers(orthonormal):
    layer = ru.nn.LowRankLinear(300, 200, 10, orthonormal=orthonormal)
    assert float(layer.weight.detach().var()) * 3 * 300 == pytest.approx(1, rel=0.1)
    for split in ("channel", "spatial"):
        conv = ru.nn.LowRankConv2d(40, 60, 3, 12, split=split, orthonormal=orthonormal)
        assert float(conv.weight.detach().var()) * 3 * 360 == pytest.approx(1, rel=0.15)


def test_it_stands_in_where_torch_reads_the_weight():
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = gaussian(2, 5, 16, dtype=torch.float32)
    with torch.no_grad():
        want = block(x)  # the fast path, which takes linear1.weight
        block.linear1 = ru.nn.LowRankLinear.from_dense(block.linear1, 16)
        assert near(block(x), want)


@pytest.mark.parametrize("rank", [0, -1, 6, 1.5, True])
def test_bad_rank(rank):
    with pytest.raises(ValueError, match="must be an integer from 1 to 5"):
        ru.nn.LowRankLinear(7, 5, rank)


def test_bad_arguments():
    with pytest.raises(ValueError, match="'channel' or 'spatial'"):
        ru.nn.LowRankConv2d(3, 4, 3, 2, split="depth")
    with pytest.raises(ValueError, match="groups=2"):
        ru.nn.LowRankConv2d.from_dense(nn.Conv2d(4, 4, 3, groups=2), 2)
    with pytest.raises(ValueError, match="padding_mode"):
        ru.nn.LowRankConv2d(3, 4, 3, 2, padding_mode="none")
    layer = ru.nn.LowRankLinear(7, 5, 2)
    with pytest.raises(ValueError, match="are needed"):
        layer.set_factors_(gaussian(5, 3), gaussian(3, 7))
