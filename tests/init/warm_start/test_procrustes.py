"""Matching layers on data: nearer to the old function than the nearest weights are."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import riemann_unn as ru
from tests.init.warm_start.nets import (
    Normalised,
    Recurrent,
    Residual,
    assert_same_state,
    error_on,
    seeded,
    stack,
    state_of,
    times_points,
    trained,
)
from tests.support import assert_on_manifold, error, gaussian

ANY = ru.Stiefel(flatten=True)


def data(n: int = 300, width: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Clusters on a curved low-dimensional set, as real inputs are."""
    z = gaussian(n, 4, seed=seed)
    x = torch.tanh(z @ gaussian(4, width, seed=77)) + 0.1 * gaussian(n, width, seed=seed + 1)
    return x, (z @ gaussian(4, 3, seed=78)).argmax(1)


def deep(seed: int) -> nn.Sequential:
    m = seeded(stack, 12, 12, 12, 9, 12, 3, seed=seed)
    trained(m, *data(seed=seed))
    return m


NAMES = ["0.weight", "2.weight", "4.weight", "6.weight"]  # square, square, wide, tall


def converted(m: nn.Module, manifold: object = None, **kwargs: object):
    m = copy.deepcopy(m)
    ru.tag_(m, dict.fromkeys(NAMES, manifold or ru.Stiefel()))
    return m, ru.init.warm_start_(m, **kwargs)


def test_beats_the_nearest_weights_on_held_out_inputs_for_every_seed():
    held, ratios = data(seed=1000)[0], []
    for seed in range(10):
        m = deep(seed)
        x = data(seed=seed)[0]
        new, report = converted(m, method="procrustes", calibration=x)
        near, nearest = converted(m, calibration=x)
        for name in NAMES:
            assert_on_manifold(new.get_parameter(name))
            assert report[name].method == "procrustes"
        ratios.append(error_on(new, m, held) / error_on(near, m, held))
        assert report.function_error_after == pytest.approx(error_on(new, m, x))
        assert nearest.function_error_after == pytest.approx(error_on(near, m, x))
        assert report.function_error_before == nearest.function_error_before
    assert sum(r < 1 for r in ratios) >= 9 and max(ratios) <= 1.02, ratios
    assert sorted(ratios)[5] < 0.5


def test_few_calibration_inputs_do_no_harm():
    held, m = data(seed=1000)[0], deep(0)
    near, _ = converted(m)
    for n in (1, 2, 3, 5, 11, 40):
        new, _ = converted(m, method="procrustes", calibration=data(seed=0)[0][:n])
        assert error_on(new, m, held) < 1.02 * error_on(near, m, held)


def test_gain_times_point_is_recovered_exactly():
    m = seeded(stack, 12, 12, 12, 9, 12, 3)
    ru.tag_(m, dict.fromkeys(NAMES, ru.Stiefel()))
    gains = times_points(m, *NAMES)
    points = {n: m.get_parameter(n).detach() / gains[n] for n in NAMES}
    old = copy.deepcopy(m)
    report = ru.init.warm_start_(m, method="procrustes", calibration=data()[0])
    for name in NAMES:
        assert report[name].gain == pytest.approx(gains[name], rel=1e-6)
        assert torch.allclose(m.get_parameter(name), points[name], atol=1e-6)
    assert error_on(m, old, data(seed=5)[0]) < 1e-6
    assert report.function_error_after < 1e-6 < report.function_error_before


def test_first_layer_is_the_closed_form_of_orthogonal_procrustes():
    x, _ = data()
    m = seeded(stack, 12, 12, 3)
    ru.tag_(m, {"0.weight": ru.Orthogonal()})
    with torch.no_grad():
        xc, yc = (t - t.mean(0) for t in (x, m[0](x)))
        u, _, vh = torch.linalg.svd(yc.mT @ xc)
    report = ru.init.warm_start_(m, method="procrustes", calibration=x, refit=False)
    want = u @ vh  # the ridge moves it a little
    assert float((m[0].weight - want).detach().norm() / want.norm()) < 0.02
    gain = float((yc * (xc @ want.mT)).sum() / xc.square().sum())
    assert report["0.weight"].gain == pytest.approx(gain, rel=1e-2)


def test_layers_are_matched_given_those_converted_before():
    x, m = data()[0], deep(3)
    new, report = converted(m, method="procrustes", calibration=x, refit=False)
    # Refitting the second layer alone to its old inputs would be worse given the new first layer.
    h_old, h_new = F.relu(m[0](x)), F.relu(new[0](x))
    y = m[2](h_old).detach()

    def fit(inputs):
        a, b = inputs - inputs.mean(0), y - y.mean(0)
        u, _, vh = torch.linalg.svd(b.mT @ a)
        u = u @ vh
        return u, (b * (a @ u.mT)).sum() / a.square().sum()

    @torch.no_grad()
    def miss(u, g):
        a = (h_new - h_new.mean(0)) / (1 / report["0.weight"].gain)
        return float((y - y.mean(0) - g * a @ u.mT).norm())

    naive = miss(*fit(h_old.detach()))
    got = miss(new[2].weight.detach(), report["2.weight"].gain)
    assert got < naive * 0.999


@pytest.mark.parametrize("det", [1, -1])
def test_determinant_is_respected(det):
    m = seeded(stack, 6, 6, 6, 3)
    ru.tag_(m, {"[02].weight": ru.Orthogonal(det=det)})
    ru.init.warm_start_(m, method="procrustes", calibration=gaussian(60, 6))
    for i in (0, 2):
        assert torch.linalg.det(m[i].weight.detach()) == pytest.approx(det)


def test_a_second_time_changes_nothing_beyond_rounding():
    for dtype in (torch.float32, torch.float64):
        x, m = data()[0].to(dtype), deep(1).to(dtype)
        new, _ = converted(m, method="procrustes", calibration=x)
        before = state_of(new)
        report = ru.init.warm_start_(new, method="procrustes", calibration=x)
        eps = torch.finfo(dtype).eps
        for name, value in new.state_dict().items():
            assert torch.allclose(value, before[name], rtol=0, atol=50 * eps), name
        assert report.folded == {} and report.fitted == ()


def test_refit_is_of_the_last_untagged_linear_layer_and_can_be_declined():
    x, m = data()[0], deep(2)
    new, report = converted(m, method="procrustes", calibration=x)
    plain, off = converted(m, method="procrustes", calibration=x, refit=False)
    assert {"8.weight", "8.bias"} <= set(report.fitted) and "8.weight" not in off.fitted
    assert report.function_error_after < off.function_error_after
    for p, q in zip(new[:8].parameters(), plain[:8].parameters(), strict=True):
        assert torch.allclose(p, q)
    # The refit head is the ridge regression on what it now reads.
    h, y = new[:8](x).detach(), m(x).detach()
    best = torch.linalg.lstsq(h - h.mean(0), y - y.mean(0)).solution
    least = float(((y - y.mean(0)) - (h - h.mean(0)) @ best).norm())
    assert float((y - new(x)).detach().norm()) < 1.05 * least


def test_convolutions_with_skip_connections_and_batches():
    m = seeded(Residual)
    x = gaussian(40, 1, 6, 6)
    trained(m, x, torch.arange(40) % 3, steps=40, lr=1e-2)
    names = ["a.weight", "b.weight", "c.weight"]
    errors = {}
    for key, calibration in {"one": x, "many": list(x.split(16)), "loader": [[x, x]]}.items():
        new = ru.tag_(copy.deepcopy(m), dict.fromkeys(names, ANY))
        report = ru.init.warm_start_(new, method="procrustes", calibration=calibration)
        assert all(error(new.get_parameter(n)) < 2e-15 for n in names)
        errors[key] = report.function_error_after
        assert report.function_error_after < 0.5 * report.function_error_before
    assert errors["many"] == pytest.approx(errors["one"], rel=1e-2)
    assert errors["loader"] == pytest.approx(errors["one"], rel=1e-6)


def test_batch_normalisation_keeps_its_statistics_apart_from_folding():
    m = seeded(Normalised)
    x = gaussian(40, 1, 6, 6)
    trained(m, x, torch.arange(40) % 3, steps=30, lr=1e-2)
    ru.tag_(m, {"conv.weight": ANY})
    before, old = state_of(m), copy.deepcopy(m)
    report = ru.init.warm_start_(m, method="procrustes", calibration=x)
    assert torch.equal(m.norm.running_mean, before["norm.running_mean"])
    assert torch.equal(m.last.num_batches_tracked, before["last.num_batches_tracked"])
    low, _ = report.folded["last.running_mean"]
    assert torch.allclose(m.last.running_mean, low * before["last.running_mean"])
    assert error_on(m, old, x) < 0.5 * report.function_error_before


def test_layers_that_least_squares_does_not_fit_get_the_nearest_point():
    m = seeded(Recurrent)
    ru.tag_(m, {"rnn.weight_hh_l0": ru.Orthogonal()})
    want = ru.Orthogonal().projx(m.rnn.weight_hh_l0.detach())
    report = ru.init.warm_start_(m, method="procrustes", calibration=gaussian(20, 7, 3))
    r = report["rnn.weight_hh_l0"]
    assert r.method == "polar" and "one tensor" in r.note and "one tensor" in str(report)
    assert torch.allclose(m.rnn.weight_hh_l0, want)
    assert set(report.fitted) == {"head.weight", "head.bias"}
    assert report.function_error_after < report.function_error_before


@torch.no_grad()
def test_bias_is_fitted_to_the_gain_that_a_layer_is_left_with():
    x, m = data()[0] + 1, seeded(stack, 12, 12, 3, act=nn.Tanh)
    m[0].weight.mul_(3)
    ru.tag_(m, {"0.weight": ru.Orthogonal()})
    y, old = m[0](x), m[0].bias.clone()
    report = ru.init.warm_start_(m, method="procrustes", calibration=x, refit=False)
    assert not report["0.weight"].folded and report["0.weight"].method == "procrustes"
    left = (y - m[0](x)).mean(0).norm()
    assert left < 0.05 * (y - x @ m[0].weight.mT - old).mean(0).norm()


class Odd(nn.Module):
    """A weight that the layer squares, one that no layer owns alone, and one that nothing calls."""

    def __init__(self):
        super().__init__()
        self.square = Squares()
        self.one, self.two = nn.Linear(5, 5), nn.Linear(5, 5)
        self.two.weight = self.one.weight
        self.idle = nn.Linear(5, 5)
        self.dead = nn.Linear(5, 5)

    def forward(self, x):
        x = self.two(F.relu(self.one(self.square(x))))
        return x + self.dead(torch.zeros_like(x))


class Squares(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))

    def forward(self, x):
        return F.linear(x, self.weight**2)


def test_odd_layers_are_named_and_get_the_nearest_point():
    m = seeded(Odd)
    ru.tag_(m, {"*.weight": ru.Orthogonal()})
    report = ru.init.warm_start_(m, method="procrustes", calibration=gaussian(30, 5))
    notes = {name: r.note for name, r in report.items()}
    assert all(r.method == "polar" for r in report.values())
    assert "affine" in notes["square.weight"] and "shared" in notes["one.weight"]
    assert "calls it" in notes["idle.weight"] and "ignores" in notes["dead.weight"]
    for _, p in ru.tagged_parameters(m):
        assert_on_manifold(p)


def test_matching_that_does_worse_is_dropped(monkeypatch):
    from riemann_unn.init.warm_start import conversion

    real = conversion.match_layers_

    def spoiled(model, *args, **kwargs):
        fitted = real(model, *args, **kwargs)
        model[8].weight.data.mul_(50)
        return fitted

    monkeypatch.setattr(conversion, "match_layers_", spoiled)
    m = deep(0)
    near, _ = converted(m)
    new, report = converted(m, method="procrustes", calibration=data()[0])
    assert (
        report.notes[0].endswith("; nearest points with gains folded were taken")
        and report.fitted == ()
    )
    assert all(r.method == "polar" for r in report.values())
    for p, q in zip(new.parameters(), near.parameters(), strict=True):
        assert torch.allclose(p, q)


def test_without_folding_gains_stay_at_one_and_the_head_makes_up():
    x, m = data()[0], deep(4)
    _, report = converted(m, method="procrustes", calibration=x, fold_gain=False)
    assert report.folded == {} and not any(r.folded for r in report.values())
    assert report.function_error_after < report.function_error_before


def test_complex_layers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 6, dtype=torch.complex128)
            self.head = nn.Linear(6, 2, dtype=torch.complex128)

        def forward(self, x):
            return self.head(self.first(x))

    torch.manual_seed(0)
    m = Net()
    ru.tag_(m, {"first.weight": ru.Unitary()})
    old, x = copy.deepcopy(m), gaussian(50, 6, dtype=torch.complex128)
    report = ru.init.warm_start_(m, method="procrustes", calibration=x)
    assert_on_manifold(m.first.weight)
    # A linear head after an invertible layer can make up for it entirely.
    assert error_on(m, old, x) < 1e-3 and report["first.weight"].method == "procrustes"


def test_inplace_activations_do_not_disturb_the_recording():
    m = seeded(stack, 6, 6, 6, 3)
    twin = copy.deepcopy(m)
    for i in (1, 3):
        twin[i] = nn.ReLU(inplace=True)
    x = gaussian(50, 6)
    for net in (m, twin):
        ru.tag_(net, {"[02].weight": ru.Orthogonal()})
        ru.init.warm_start_(net, method="procrustes", calibration=x)
    assert_same_state(twin, state_of(m))


class Functional(nn.Module):
    """Layers that are function calls: one of the model's own, one inside a submodule."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(gaussian(6, 6, seed=1))

        def forward(self, x):
            return F.relu(F.linear(x, self.weight))

    def __init__(self):
        super().__init__()
        self.own, self.bias = nn.Parameter(gaussian(6, 6)), nn.Parameter(gaussian(6))
        self.inner, self.head = self.Inner(), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.inner(F.relu(F.linear(x, self.own, self.bias))))


def test_function_errors_are_told_where_the_scale_of_an_output_is_known():
    m = seeded(Functional)
    ru.tag_(m, {"own": ru.Orthogonal(), "inner.weight": ru.Orthogonal()})
    times_points(m, "own", "inner.weight")
    report = ru.init.warm_start_(m, calibration=gaussian(40, 6))
    assert report["own"].folded and report["inner.weight"].folded
    assert report["own"].function_error_after < 1e-12 < report["own"].function_error_before
    assert report["inner.weight"].function_error_after is None


class Writes(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(F.relu(self.inner(x.mul_(2))))


def test_models_that_write_to_their_inputs_get_copies():
    m, x = seeded(Writes), gaussian(60, 6)
    ru.tag_(m, {"inner.weight": ru.Orthogonal()})
    before = x.clone()
    report = ru.init.warm_start_(m, method="procrustes", calibration=x)
    assert torch.equal(x, before)
    assert report.notes == () and report.function_error_after < report.function_error_before < 2
