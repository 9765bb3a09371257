"""Folding gains: the function of gain times point stays, whatever stands around the layer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import riemann_unn as ru
from tests.init.warm_start.nets import (
    Branching,
    Normalised,
    Recurrent,
    Residual,
    error_on,
    seeded,
    stack,
    state_of,
    times_points,
)
from tests.support import assert_on_manifold, gaussian

SQUARE = ru.Orthogonal()
ANY = ru.Stiefel(flatten=True)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.one, self.two = nn.Linear(6, 3), nn.Linear(6, 4)

    def forward(self, x):
        x = F.leaky_relu(self.inner(x), 0.1)
        return self.one(x), self.two(x.abs())


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(11, 2)

    def forward(self, x):
        return self.head(torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], -1))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.shared, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = F.relu(self.first(x))
        return self.head(F.relu(self.shared(F.relu(self.shared(x)))))


CASES = {
    # name: (model, tagged names, input shape)
    "chain": (lambda: stack(6, 6, 6, 4, 3), ["0.weight", "2.weight", "4.weight"], (9, 6)),
    "no bias": (lambda: stack(6, 6, 6, 3, bias=False), ["0.weight", "2.weight"], (9, 6)),
    "tall and wide": (lambda: stack(6, 9, 4, 3), ["0.weight", "2.weight"], (9, 6)),
    "two heads": (TwoHeads, ["inner.weight"], (9, 6)),
    "concatenation": (Concatenated, ["a.weight", "b.weight"], (9, 6)),
    "residual": (Residual, ["a.weight", "stem.weight", "c.weight"], (5, 1, 6, 6)),
    "norms": (Normalised, ["stem.weight", "conv.weight"], (5, 1, 6, 6)),
    "backwards": (lambda: stack(6, 7, 5), ["2.weight"], (9, 6)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_function_of_gain_times_point_stays(case, mode):
    build, names, shape = case
    m = seeded(build).train(mode)
    ru.tag_(m, dict.fromkeys(names, ANY))
    gains = times_points(m, *names)
    old, x = copy.deepcopy(m), gaussian(*shape, seed=5)
    report = ru.init.warm_start_(m)
    for name in names:
        assert_on_manifold(m.get_parameter(name), ANY)
        assert report[name].gain == pytest.approx(gains[name], rel=1e-12)
        assert report[name].folded and report[name].note == ""
    new, was = m.eval()(x), old.eval()(x)
    for a, b in zip(*([t] if isinstance(t, torch.Tensor) else t for t in (new, was)), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_normalisation_takes_up_gains_in_training_and_evaluation():
    m = seeded(Normalised)
    ru.tag_(m, {"stem.weight": ANY, "conv.weight": ANY})
    x = gaussian(8, 1, 6, 6)
    for _ in range(30):
        m(x)  # running statistics that mean something
    times_points(m, "stem.weight", "conv.weight")
    old = copy.deepcopy(m)
    report = ru.init.warm_start_(m)
    assert report["stem.weight"].folded and report["conv.weight"].folded
    assert {"norm.running_mean", "norm.running_var", "stem.bias"} <= set(report.folded)
    assert not {"norm.weight", "head.weight"} & set(report.folded)
    assert error_on(m, old, x) < 1e-12
    with torch.no_grad():
        new, was = m.train()(x), old.train()(x)
    assert float((new - was).norm() / was.norm()) < 1e-3  # by its epsilon


def test_without_folding_only_tagged_weights_change():
    m = ru.tag_(seeded(stack, 6, 6, 6, 3), {"[02].weight": SQUARE})
    times_points(m, "0.weight", "2.weight")
    before, old = state_of(m), copy.deepcopy(m)
    report = ru.init.warm_start_(m, fold_gain=False)
    changed = {k for k, v in m.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"0.weight", "2.weight"} and report.folded == {}
    assert not any(r.folded for r in report.values())
    assert error_on(m, old, gaussian(9, 6)) > 0.1


def test_report_lists_exactly_what_changed_and_by_how_much():
    m = ru.tag_(seeded(stack, 6, 6, 6, 3, 3), {"2.weight": SQUARE})
    times_points(m, "2.weight")
    before = state_of(m)
    report = ru.init.warm_start_(m)
    changed = {k for k, v in m.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"2.weight", *report.folded} and set(report.folded) == {"2.bias", "4.weight"}
    for name, (low, high) in report.folded.items():
        assert low == high
        assert torch.allclose(m.state_dict()[name], low * before[name])


@pytest.mark.parametrize(
    ("act", "names", "reason"),
    [
        (nn.Tanh, ["0.weight"], "Tanh"),
        (nn.GELU, ["0.weight"], "GELU"),
        (nn.ReLU, ["4.weight"], "output"),
    ],
)
def test_what_cannot_be_folded_says_why(act, names, reason):
    m = seeded(stack, 6, 6, 6, 6, act=act)
    m = nn.Sequential(*m, act()) if act is not nn.ReLU else m
    every = ["0.weight", "2.weight", "4.weight"]
    ru.tag_(m, dict.fromkeys(every, SQUARE))
    times_points(m, *every)
    before = state_of(m)
    report = ru.init.warm_start_(m)
    for name in names:
        assert not report[name].folded and reason in report[name].note, report[name].note
        assert f"{name}" in str(report) and "gain not folded" in str(report)
    if act is not nn.ReLU:
        assert torch.equal(m[0].bias, before["0.bias"]) and report.folded == {}


def test_a_chain_between_fixed_ends_shares_its_gain_out_among_what_is_free():
    # x -> U1 -> relu -> U2 -> out: the product of both gains has nowhere to go, their
    # quotient has; what is left is the function with a total gain of one.
    m = ru.tag_(seeded(stack, 6, 6, 6), {"[02].weight": SQUARE})
    gains = times_points(m, "0.weight", "2.weight")
    old = copy.deepcopy(m)
    report = ru.init.warm_start_(m)
    with torch.no_grad():
        old[2].weight /= gains["0.weight"] * gains["2.weight"]
    assert report["0.weight"].folded and not report["2.weight"].folded
    assert error_on(m, old, gaussian(9, 6)) < 1e-12


def test_skip_connections_tie_scales_together():
    m = seeded(Residual)
    names = ["stem.weight", "a.weight", "b.weight"]
    ru.tag_(m, dict.fromkeys(names, ANY))
    times_points(m, *names)
    report = ru.init.warm_start_(m)
    assert [report[n].folded for n in names] == [True, True, False]
    assert "added to" in report["b.weight"].note


def test_a_weight_used_twice_is_folded_alike_or_not_at_all():
    m = ru.tag_(seeded(Twice), {"shared.weight": SQUARE})
    times_points(m, "shared.weight")
    before = state_of(m)
    report = ru.init.warm_start_(m)
    assert not report["shared.weight"].folded
    changed = {k for k, v in m.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"shared.weight"}


@pytest.mark.parametrize("build", [Branching, Recurrent])
def test_models_that_cannot_be_followed_are_converted_without_folding(build):
    m = seeded(build)
    name = "first.weight" if build is Branching else "rnn.weight_hh_l0"
    ru.tag_(m, {name: SQUARE})
    before = state_of(m)
    report = ru.init.warm_start_(m)
    assert_on_manifold(m.get_parameter(name))
    changed = {k for k, v in m.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {name} and not report[name].folded and "not folded" in str(report)
    if build is Branching:
        assert "cannot read" in report.notes[0] and "cannot read" in str(report)


def test_gain_of_trained_weights_counts_directions_by_their_size():
    s = torch.tensor([4.0, 2.0, 1.0, 1.0, 0.5, 0.1]).double()
    u, v = (torch.linalg.qr(gaussian(6, 6, seed=i))[0] for i in (1, 2))
    p = ru.tag_(nn.Parameter(u * s @ v), SQUARE)
    gain = ru.init.warm_start_(p)["parameter"].gain
    assert gain == pytest.approx(float(s.pow(3).sum() / s.pow(2).sum()))


def test_weights_on_their_manifold_change_nothing_else():
    m = ru.tag_(seeded(stack, 6, 6, 6, 3), {"[02].weight": SQUARE})
    ru.init.warm_start_(m)
    before = state_of(m)
    report = ru.init.warm_start_(m)
    assert report.folded == {} and all(r.gain == 1 for r in report.values())
    for name, value in m.state_dict().items():
        if name in ("0.weight", "2.weight"):
            assert torch.allclose(value, before[name], atol=1e-14)
        else:
            assert torch.equal(value, before[name])
