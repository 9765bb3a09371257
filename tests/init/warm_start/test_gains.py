"""Which gains weights get, folded or not: what serves best is kept, and fresh weights are told."""

import copy
import math

import pytest
import torch
from torch import nn

import riemann_unn as ru
from riemann_unn.init.warm_start.untrained import random_gain
from tests.init.warm_start.nets import error_on, seeded, stack
from tests.init.warm_start.resnet import untrained
from tests.support import assert_on_manifold, gaussian

ALL = {
    "body.*conv*.weight": ru.Stiefel(flatten=True),
    "*down.0.weight": ru.Stiefel(flatten=True),
    "conv1.weight": ru.Stiefel(flatten=True),
}
X = gaussian(12, 3, 16, 16, dtype=torch.float32)


def spoiled_gains(monkeypatch, factor):
    """Make every gain wrong, so that folding does harm."""
    from riemann_unn.init.warm_start import warm_start

    monkeypatch.setattr(warm_start, "_gain", lambda w, u, m: factor * float(w.norm() / u.norm()))
    monkeypatch.setattr(warm_start, "set_initial_gains_", lambda placed: False)


def converted(model, tags=ALL, **kwargs):
    m = ru.tag_(copy.deepcopy(model), tags)
    return m, ru.init.warm_start_(m, progress=False, **kwargs)


def test_random_gain_is_that_of_random_matrices():
    for shape in ((256, 256), (64, 512), (512, 64)):
        s = torch.linalg.svdvals(gaussian(*shape))
        want = s.pow(3).sum() / s.pow(2).sum() / s.square().mean().sqrt()
        assert random_gain(min(shape) / max(shape)) == pytest.approx(float(want), rel=1e-2)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_an_untrained_residual_net_is_better_than_its_nearest_points(calibrated, seed):
    model = untrained(seed).eval()
    near, _ = converted(model, fold_gain=False)
    new, report = converted(model, calibration=X if calibrated else None)
    assert error_on(new, model, X) < 0.7 * error_on(near, model, X)
    assert "as they were drawn" in report.notes[0] and report.folded
    for name, p in ru.tagged_parameters(new):
        size = (model.get_parameter(name).norm() / p.norm()).detach()
        assert report[name].gain == pytest.approx(float(size), rel=1e-4)
        assert_on_manifold(p)


def test_trained_and_small_weights_do_not_count_as_drawn():
    model = seeded(stack, 64, 64, 64, 64, 10)
    tags = {"[024].weight": ru.Orthogonal()}
    assert "as they were drawn" in converted(model, tags)[1].notes[0]  # a control
    with torch.no_grad():  # what training does: a few directions grow
        u, v = gaussian(64, 2, seed=1), gaussian(2, 64, seed=2)
        model[2].weight.add_(u @ v / 16)
    assert converted(model, tags)[1].notes == ()
    assert not converted(seeded(stack, 12, 12, 12, 12, 4), tags)[1].notes
    points = converted(seeded(stack, 64, 64, 64, 64, 10), tags)[0]
    assert ru.init.warm_start_(points).notes == ()


@pytest.mark.parametrize("factor", [4.0, 0.1])
def test_folded_gains_that_do_harm_are_dropped(monkeypatch, factor):
    spoiled_gains(monkeypatch, factor)
    model = untrained().eval()
    near, plain = converted(model, fold_gain=False, calibration=X)
    new, report = converted(model, calibration=X)
    assert report.notes[0].endswith("; nearest points alone were taken")
    assert report.function_error_after == pytest.approx(plain.function_error_after)
    assert report.folded == {} and not any(r.folded for r in report.values())
    for p, q in zip(new.parameters(), near.parameters(), strict=True):
        assert torch.equal(p, q)
    blind, _ = converted(model)  # a control: without calibration nothing is compared
    assert error_on(blind, model, X) > report.function_error_after


def test_matching_that_does_worse_than_all_is_dropped_for_the_nearest_points(monkeypatch):
    from riemann_unn.init.warm_start import conversion

    spoiled_gains(monkeypatch, 30.0)
    monkeypatch.setattr(
        conversion,
        "match_layers_",
        lambda model, *args, **kwargs: model[0].weight.data.mul_(50).new_zeros(0).tolist(),
    )
    model = seeded(stack, 8, 8, 8, 3)
    tags = {"[02].weight": ru.Orthogonal()}
    new, report = converted(model, tags, method="procrustes", calibration=gaussian(40, 8))
    near, _ = converted(model, tags, fold_gain=False)
    assert "matched layers" in report.notes[0] and "alone were taken" in report.notes[0]
    for p, q in zip(new.parameters(), near.parameters(), strict=True):
        assert torch.equal(p, q)


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 3, 8, 64])
@pytest.mark.parametrize(
    ("manifold", "out", "into"),
    [(ru.Orthogonal(), 16, 16), (ru.Stiefel(), 24, 16), (ru.Stiefel(), 16, 24)],
)
def test_procrustes_in_every_dtype_is_as_good_as_in_double(manifold, out, into, count, dtype):
    model = seeded(stack, into, out, 5)
    x = gaussian(count, into)
    tags = {"0.weight": manifold}
    want = converted(model, tags, method="procrustes", calibration=x)[1]
    new, report = converted(model.to(dtype), tags, method="procrustes", calibration=x.to(dtype))
    assert report["0.weight"].method == want["0.weight"].method
    level = 0.02 * (torch.finfo(dtype).bits == 16) + 0.005
    assert report.function_error_after <= 1.05 * want.function_error_after + level
    assert all(p.dtype is dtype for p in new.parameters())
    assert (
        manifold.orthogonality_error(new[0].weight.detach().double()) < 4 * torch.finfo(dtype).eps
    )
    if count < 4:
        assert "too few calibration inputs, or all alike: give more" in report["0.weight"].note


def test_a_layer_that_insists_on_half_precision_gets_the_nearest_point():
    class Insists(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x.half(), self.weight, self.bias)

    model = nn.Sequential(Insists(8, 8), nn.ReLU(), nn.Linear(8, 3)).half()
    _, report = converted(
        model,
        {"0.weight": ru.Orthogonal()},
        method="procrustes",
        calibration=gaussian(40, 8).half(),
    )
    assert report["0.weight"].method == "polar" and "not affine" in report["0.weight"].note
    assert math.isfinite(report.function_error_after)
