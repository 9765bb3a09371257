"""Which layers low_rank_ replaces and by what, the activations it finds, and loading the result."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import riemann_unn as ru
from riemann_unn.init.calibration import batches_of, split
from riemann_unn.init.low_rank.rows import gather
from riemann_unn.init.low_rank.targets import target_of
from tests.support import gaussian, generator


class Conv1D(nn.Module):
    """As transformers' own, which GPT-2 is made of."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.ones(nf))
        nn.init.normal_(self.weight, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.shape[:-1], self.weight.shape[1])


Conv1D.__module__ = "transformers.pytorch_utils"

LAYERS = {
    "linear": (lambda: nn.Linear(12, 10), (7, 12)),
    "Conv1D": (lambda: Conv1D(10, 12), (3, 7, 12)),
    "conv1d": (lambda: nn.Conv1d(6, 10, 3, 2, padding=1, dilation=2), (9, 6, 15)),
    "conv2d": (lambda: nn.Conv2d(4, 10, (3, 1), padding="same", bias=False), (9, 4, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(3, 9, 2, padding_mode="replicate", padding=1), (9, 3, 4, 3, 5)),
    "transposed1d": (lambda: nn.ConvTranspose1d(6, 10, 4, 2, 1), (9, 6, 8)),
    "transposed2d": (
        lambda: nn.ConvTranspose2d(4, 10, 3, 2, 1, output_padding=1, dilation=1),
        (9, 4, 5, 6),
    ),
    "dilated": (lambda: nn.ConvTranspose2d(4, 9, 3, 1, 0, dilation=2, bias=False), (9, 4, 5, 6)),
    "cropped": (lambda: nn.ConvTranspose2d(4, 9, 2, 3, 1), (9, 4, 4, 3)),
    "transposed3d": (lambda: nn.ConvTranspose3d(3, 8, 2, (2, 1, 2)), (9, 3, 3, 3, 2)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def made(name, dtype=torch.float32):
    make, shape = LAYERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(make()).to(dtype), gaussian(*shape, dtype=dtype)


@every_layer
def test_at_full_rank_the_output_is_the_same(name):
    model, x = made(name)
    want = model(x).detach()
    for orthonormal in (False, True):
        thin = copy.deepcopy(model)
        report = ru.init.low_rank_(
            thin, rank=1.0, only_if_smaller=False, inputs=x, orthonormal=orthonormal
        )
        assert list(report) == ["0"] and not isinstance(thin[0], type(model[0]))
        assert float((thin(x).detach() - want).norm() / want.norm()) <= 1e-5


@every_layer
def test_rows_times_the_matrix_is_what_the_layer_computes(name):
    """The slow oracle of patches: all of them, in any order, give all outputs."""
    model, x = made(name, torch.float64)
    target = target_of(model[0])
    assert target is not None
    rows = gather(model, {"0": target}, split(batches_of([x, x], model)))["0"].fit
    found = rows @ target.matrix().mT
    if target.bias is not None:
        found = found + target.bias.detach()
    out = model(x).detach()
    channel_last = out.movedim(1, -1) if out.ndim > 2 and name != "Conv1D" else out
    assert torch.allclose(found, channel_last.reshape(found.shape), rtol=0, atol=1e-12)


@every_layer
def test_calibrated_is_better_than_spectral(name):
    model, x = made(name)
    mixed = x @ gaussian(x.shape[-1], x.shape[-1], dtype=torch.float32)
    offset = 1 + torch.arange(x.shape[1]).reshape(-1, *(1,) * (x.ndim - 2)) if x.ndim > 2 else 1
    mixed = mixed + offset
    errors = {}
    for method in ("spectral", "linear"):
        thin = copy.deepcopy(model)
        report = ru.init.low_rank_(thin, rank=2, method=method, calibration=mixed)
        assert report["0"].rank == 2
        errors[method] = float((thin(mixed) - model(mixed)).detach().norm())
    assert errors["linear"] < 0.97 * errors["spectral"]


@every_layer
def test_a_converted_model_is_saved_and_loaded_in_two_lines(name, tmp_path):
    model, x = made(name)
    for options in ({}, {"orthonormal": True}, {"split": "spatial"}):
        thin = copy.deepcopy(model)
        ru.init.low_rank_(thin, rank=2, inputs=x, **options)
        torch.save(thin.state_dict(), tmp_path / "thin.pt")
        state = torch.load(tmp_path / "thin.pt", weights_only=True)
        fresh, _ = made(name)
        assert ru.init.low_rank_like_(fresh, state) == ["0"]
        fresh.load_state_dict(state)
        assert torch.equal(fresh(x), thin(x))
        tagged = [p for p in fresh.parameters() if ru.manifold_of(p) is not None]
        assert len(tagged) == (2 if "orthonormal" in options else 0)


def test_a_state_that_does_not_fit_changes_nothing():
    state = made("linear")[0].state_dict()
    thin, x = made("conv1d")
    ru.init.low_rank_(thin, rank=2, inputs=x)
    for model, given, error, message in (
        (made("linear")[0], state, ValueError, "holds no low-rank factors"),
        (made("linear")[0], [1], TypeError, "got a list"),
        (made("linear")[0], thin.state_dict(), ValueError, "do not fit its Linear"),
        (nn.Sequential(), thin.state_dict(), ValueError, "does not have"),
    ):
        before = list(model.modules())
        with pytest.raises(error, match=message):
            ru.init.low_rank_like_(model, given)
        assert before == list(model.modules())


class Between(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 20), nn.BatchNorm1d(20), nn.Linear(20, 3)
        self.slope, self.between = nn.Parameter(torch.tensor([0.3])), between

    def forward(self, x):
        return self.b(self.between(self, self.a(x)))


def new_gelu(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))


ACTIVATIONS = {
    "relu": (lambda m, x: F.relu(F.dropout(x, 0.5, m.training)), "relu"),
    "threshold": (lambda m, x: F.threshold(x, 0, 0), "relu"),
    "where": (lambda m, x: torch.where(x > 0, x, 0.2 * x), "leaky_relu(0.2)"),
    "mask": (lambda m, x: x * (x > 0), "relu"),
    "prelu": (lambda m, x: F.prelu(x, m.slope), "leaky_relu(0.3)"),
    "silu written out": (lambda m, x: x * torch.sigmoid(x), "silu"),
    "gelu of GPT-2": (lambda m, x: new_gelu(x), "gelu"),
    "gelu by erf": (lambda m, x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), "gelu"),
    "tanh gelu": (lambda m, x: F.gelu(x, approximate="tanh"), "gelu"),
    "elu": (lambda m, x: F.elu(x, alpha=0.5), "elu"),
    "own": (lambda m, x: x / (1 + x.abs()) + x.tanh(), "pointwise"),
    "normalised": (lambda m, x: F.relu(m.norm(x)), "relu"),
    "function": (
        lambda m, x: F.relu(F.batch_norm(x, m.norm.running_mean, m.norm.running_var)),
        "relu",
    ),
    "gate": (lambda m, x: F.silu(x) * x.mean(1, keepdim=True), "identity"),
    "sum": (lambda m, x: x + x.mean(1, keepdim=True), "identity"),
    "softmax": (lambda m, x: torch.softmax(x, -1), "identity"),
    "scaled": (lambda m, x: 2 * x, "identity"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_activation_that_follows_is_found(name):
    between, activation = ACTIVATIONS[name]
    model = Between(between)
    report = ru.init.low_rank_(model, rank=2, layers="a", refine=0)
    assert report["a"].activation == activation
    normalised = name in ("normalised", "function")
    assert bool(report["a"].notes) == (activation == "identity" or normalised)


def test_an_activation_that_is_written_out_is_fitted_as_one_that_is_not():
    found = []
    for between in (lambda m, x: x * torch.sigmoid(x), lambda m, x: F.silu(x)):
        torch.manual_seed(2)
        model = Between(between)
        x = gaussian(300, 6, dtype=torch.float32)
        ru.init.low_rank_(model, rank=2, layers="a", calibration=x)
        found.append(model.a.weight)
    assert torch.allclose(*found, atol=1e-5)


def test_a_residual_sum_ends_it_and_says_so():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return F.relu(x + self.b(F.relu(self.a(x))))

    report = ru.init.low_rank_(Residual(), rank=1)
    assert [r.activation for r in report.values()] == ["relu", "identity"]
    assert "an addition follows it" in report["b"].notes[0]


def test_inputs_that_cannot_be_guessed_are_given():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(5, 8)

        def forward(self, x, y):
            return F.relu(self.a(x)) + F.gelu(self.b(y))

    x, y = (torch.randn(4, n, generator=generator()) for n in (6, 5))
    with pytest.raises(ValueError, match=r"activation after 'a' is unknown.*pass example inputs"):
        ru.init.low_rank_(Two(), rank=1)
    report = ru.init.low_rank_(Two(), rank=1, inputs=(x, y))
    assert [r.activation for r in report.values()] == ["relu", "gelu"]
    report = ru.init.low_rank_(Two(), rank=1, calibration={"x": x, "y": y})
    assert [r.activation for r in report.values()] == ["relu", "gelu"]
