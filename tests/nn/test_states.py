"""``OrthogonalRNN``: the states of ``nn.RNN``, parametrized weights, and exported programs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import riemann_unn as ru
from tests.support import gaussian


def plain(**options: object) -> nn.RNN:
    torch.manual_seed(0)
    return nn.RNN(3, 5, num_layers=2, **options)


def orthogonal(nonlinearity: str = "tanh", **options: object) -> ru.nn.OrthogonalRNN:
    return ru.nn.OrthogonalRNN(3, 5, 2, nonlinearity, **options)


X = gaussian(7, 2, 3, dtype=torch.float32)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_of_torchs_layer_gives_its_outputs(nonlinearity, assign):
    source, layer = plain(nonlinearity=nonlinearity), orthogonal(nonlinearity)
    state = source.state_dict()
    before = copy.deepcopy(state)
    with pytest.warns(UserWarning, match=r"weight_hh_l0 is .* weight_hh_l1 .*warm_start_"):
        layer.load_state_dict(state, assign=assign)
    assert state.keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in state.items())
    for ours, theirs in zip(layer(X), source(X), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not torch.equal(layer.bias_ih_l0, source.bias_ih_l0)  # the negative control
    ru.init.warm_start_(layer)
    ru.optim.ProjUNNT(layer.parameters(), lr=0.1)


@pytest.mark.parametrize("is_state", [False, True])
def test_it_is_a_source_of_a_warm_start(is_state):
    source, layer = nn.ModuleDict({"rnn": plain()}), nn.ModuleDict({"rnn": orthogonal()})
    ru.init.warm_start_(layer, source=source.state_dict() if is_state else source)
    nearest = ru.Orthogonal().projx(source["rnn"].weight_hh_l1.detach())
    torch.testing.assert_close(layer["rnn"].weight_hh_l1.detach(), nearest)
    biases = source["rnn"].bias_ih_l0 + source["rnn"].bias_hh_l0
    assert torch.equal(layer["rnn"].bias_ih_l0, biases)


def test_it_is_taken_inside_of_a_model_and_orthogonal_weights_give_no_warning():
    source = plain()
    for layer in (0, 1):
        nn.init.orthogonal_(getattr(source, f"weight_hh_l{layer}"))
    model = nn.ModuleDict({"rnn": orthogonal()})
    model.load_state_dict(nn.ModuleDict({"rnn": source}).state_dict())
    torch.testing.assert_close(model["rnn"](X)[0], source(X)[0])


def test_a_second_bias_is_one_only_beside_a_first():
    layer = orthogonal()
    state = layer.state_dict() | {"bias_hh_l0": torch.ones(5)}
    del state["bias_ih_l0"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"bias_ih_l0"(.|\n)*"bias_hh_l0"'):
        layer.load_state_dict(state)


def test_a_layer_without_bias_takes_none():
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"bias_hh_l0"'):
        orthogonal(bias=False).load_state_dict(plain().state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key.*"bias_ih_l0"'):
        orthogonal().load_state_dict(plain(bias=False).state_dict())
    source, layer = plain(bias=False), orthogonal(bias=False)
    layer.load_state_dict(source.state_dict())
    torch.testing.assert_close(layer(X)[0], source(X)[0])


@pytest.mark.filterwarnings("ignore:weight_hh_l0 is:UserWarning")
def test_thresholds_that_torchs_layer_has_not_are_told():
    state = plain().state_dict()
    with (
        pytest.warns(UserWarning, match="has no modReLU"),
        pytest.raises(RuntimeError, match=r'Missing key.*"activations.0.bias"'),
    ):
        orthogonal("modrelu").load_state_dict(state)
    layer = orthogonal("modrelu")
    thresholds = layer.activations[0].bias.detach().clone()
    with pytest.warns(UserWarning, match="has no modReLU"):
        layer.load_state_dict(state, strict=False)
    assert torch.equal(layer.activations[0].bias, thresholds)


@pytest.mark.parametrize("other", [nn.LSTM(3, 5), nn.RNN(3, 5, bidirectional=True)])
@pytest.mark.filterwarnings("ignore:weight_hh_l0 is:UserWarning")
def test_other_layers_states_are_refused(other):
    with pytest.raises(RuntimeError, match=r"size mismatch|Unexpected key"):
        ru.nn.OrthogonalRNN(3, 5, 1, "tanh").load_state_dict(other.state_dict())


def test_parametrized_weights():
    torch.manual_seed(1)
    layer = orthogonal()
    before = layer(X)[0].detach()
    parametrizations.weight_norm(layer, "weight_ih_l0")
    torch.testing.assert_close(layer(X)[0], before)
    parametrizations.orthogonal(layer, "weight_hh_l1")
    layer(X)[0].sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert "3, 5, num_layers=2" in repr(layer)
    old = copy.deepcopy(layer)
    layer.reset_parameters()
    assert not torch.allclose(layer.weight_ih_l0, old.weight_ih_l0)
    assert not torch.allclose(layer.weight_hh_l1, old.weight_hh_l1)
    assert float(layer.weight_ih_l0.detach().abs().max()) <= 5**-0.5 + 1e-6
    layer.load_state_dict(old.state_dict())
    torch.testing.assert_close(layer(X)[0], old(X)[0])


@pytest.mark.parametrize(
    "options",
    [
        {"nonlinearity": "modrelu"},
        {"nonlinearity": "tanh", "batch_first": True},
        {"nonlinearity": "identity", "dtype": torch.complex64},
    ],
    ids=str,
)
def test_export_with_a_dynamic_batch(options):
    layer = orthogonal(**options).eval()
    dim = 0 if options.get("batch_first") else 1
    batch = torch.export.Dim("batch", min=2)

    def sequence(count: int) -> torch.Tensor:
        return gaussian(7, count, 3, dtype=torch.float32).transpose(dim, 1)

    given = (sequence(3).contiguous(),)
    program = torch.export.export(layer, given, dynamic_shapes=({dim: batch},))
    for count in (2, 9):
        x = sequence(count).contiguous()
        for got, want in zip(program.module()(x), layer(x), strict=True):
            torch.testing.assert_close(got, want)
