"""Bad input to the warm start, its source, and that nothing else is touched."""

import copy
import json
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import riemann_unn as ru
from tests.init.warm_start.nets import (
    Branching,
    Circular,
    Normalised,
    Recurrent,
    Residual,
    assert_same_state,
    error_on,
    seeded,
    stack,
    state_of,
)
from tests.support import assert_on_manifold, gaussian

METHODS = ["polar", "lie", "procrustes"]
X = gaussian(40, 6)


def net(seed: int = 0) -> nn.Sequential:
    return ru.tag_(seeded(stack, 6, 6, 6, 3, seed=seed), {"[02].weight": ru.Orthogonal()})


def warm(m: nn.Module, method: str, x: torch.Tensor = X, **kwargs: object):
    if method == "procrustes":
        kwargs.setdefault("calibration", x)
    return ru.init.warm_start_(m, method=method, progress=False, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"method": "qr"}, ValueError, "'polar', 'lie' or 'procrustes'"),
        ({"method": "procrustes"}, ValueError, "needs calibration"),
        ({"method": "procrustes", "calibration": []}, ValueError, "empty"),
        ({"calibration": torch.zeros(0, 6)}, ValueError, "empty"),
        ({"calibration": iter(())}, ValueError, "empty"),
        ({"calibration": 3}, TypeError, "int"),
        ({"calibration": [3]}, TypeError, "batch 0 is a int"),
        ({"calibration": torch.full((2, 6), math.nan)}, ValueError, "NaN"),
        ({"calibration": torch.zeros(4, 7)}, ValueError, "batch 0: RuntimeError"),
        ({"calibration": [{"x": X}]}, ValueError, "takes 'input'"),
        ({"base": torch.optim.Adam}, TypeError, "base: only"),
        ({"lr": 0.1}, TypeError, "lr: only"),
        ({"method": "lie", "base": "adam"}, TypeError, "no optimizer class"),
        ({"method": "lie", "max_steps": 0}, ValueError, "max_steps"),
        ({"method": "lie", "tolerance": math.nan}, ValueError, "tolerance"),
        ({"source": [1]}, ru.ManifoldTypeError, "state dict"),
        ({"source": {}}, ru.ManifoldError, r"lacks the tagged '0.weight', '2.weight'"),
    ],
)
def test_refused_with_a_reason_and_nothing_changed(kwargs, error, match):
    m = net()
    before = state_of(m)
    with pytest.raises(error, match=match):
        ru.init.warm_start_(m, **{"progress": False, **kwargs})
    assert_same_state(m, before)
    assert all(child.training for child in m.modules())


def test_lazy_parameters_are_refused():
    m = nn.Sequential(nn.Linear(6, 6), nn.LazyLinear(3))
    ru.tag_(m, {"0.weight": ru.Orthogonal()})
    with pytest.raises(ru.ManifoldTypeError, match=r"'1.weight' has no shape yet; run the model"):
        ru.init.warm_start_(m)


def test_calibration_needs_a_model():
    p = ru.tag_(nn.Parameter(gaussian(3, 3)), ru.Orthogonal())
    with pytest.raises(ru.ManifoldTypeError, match="pass the model"):
        ru.init.warm_start_(p, calibration=X)


def test_source_problems_are_all_listed():
    source = net(1).state_dict()
    source["head.weight"] = source.pop("4.weight")
    del source["2.weight"]
    source["0.weight"] = torch.zeros(5, 6)
    source["0.bias"] = torch.zeros(6, dtype=torch.complex128)
    m = net()
    before = state_of(m)
    with pytest.raises(ru.ManifoldError) as raised:
        ru.init.warm_start_(m, source=source)
    for part in ("lacks the tagged '2.weight'", "no 'head.weight'", "(5, 6) there, (6, 6) here"):
        assert part in str(raised.value)
    assert "'0.bias' is torch.complex128 there" in str(raised.value)
    assert_same_state(m, before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["module", "state", "tagged only"])
def test_source_is_taken_over_and_converted(method, kind):
    trained, m = net(1), net(0)
    want = copy.deepcopy(trained)
    if kind == "tagged only":
        want = net(0)
        names = ["0.weight", "2.weight"]
        want.load_state_dict({k: trained.state_dict()[k] for k in names}, strict=False)
        source = {k: trained.state_dict()[k] for k in names}
    else:
        source = trained if kind == "module" else trained.state_dict()
    before = state_of(trained)
    warm(m, method, source=source)
    warm(want, method)
    assert_same_state(m, state_of(want))
    assert_same_state(trained, before)


def test_source_with_nan_changes_nothing():
    m, source = net(), net(1).state_dict()
    source["2.weight"] = source["2.weight"].clone().index_fill_(0, torch.tensor([1]), math.nan)
    before = state_of(m)
    with pytest.raises(ru.OffManifoldError, match=r"'2.weight' holds NaN"):
        ru.init.warm_start_(m, source=source)
    assert_same_state(m, before)


@pytest.mark.parametrize("place", ["fold_", "report"])
@pytest.mark.parametrize("method", METHODS)
def test_failure_half_way_leaves_the_model_as_it_was(method, place, monkeypatch):
    from riemann_unn.init.warm_start import conversion, folding

    home = folding.Folding if place == "fold_" else conversion.Conversion
    real = getattr(home, place)

    def broken(self, *args):
        real(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(home, place, broken)
    m = seeded(Normalised)
    ru.tag_(m, {"conv.weight": ru.Stiefel(flatten=True)})
    before = state_of(m)
    with pytest.raises(KeyboardInterrupt):
        warm(m, method, gaussian(8, 1, 6, 6))
    assert_same_state(m, before)
    assert all(child.training for child in m.modules()) and not m.stem._forward_hooks


class Noisy(nn.Module):
    """Draws from every random state, and counts its calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        x = F.dropout(F.relu(self.first(x)), 0.1, training=True)
        return self.head(x + 0 * (random.random() + np.random.rand()))


@pytest.mark.parametrize("method", METHODS)
def test_modes_randomness_gradients_and_buffers_are_untouched(method):
    m = ru.tag_(seeded(Noisy), {"first.weight": ru.Orthogonal()})
    m.head.eval()
    m.first.weight.grad = grad = torch.ones(6, 6).double()
    m.first.weight.requires_grad_(False)
    objects = list(m.parameters())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()

    def loader():  # draws as a shuffling loader does
        for _ in range(3):
            torch.rand(1)
            yield X[:20]

    warm(m, method, calibration=loader())
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])
    assert m.training and m.first.training and not m.head.training
    assert m.first.weight.grad is grad and m.head.weight.grad is None
    assert not m.first.weight.requires_grad and m.head.weight.requires_grad
    assert all(a is b and a.is_leaf for a, b in zip(m.parameters(), objects, strict=True))
    assert float(m.calls) == 0 and torch.is_grad_enabled()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", [Residual, Normalised, Recurrent, Circular, Branching])
def test_every_kind_of_model_is_ready_for_every_optimizer(method, build):
    m = seeded(build).float()
    tags = {
        Residual: {"[abc].weight": ru.Stiefel(flatten=True)},
        Normalised: {"conv.weight": ru.Stiefel(flatten=True)},
        Recurrent: {"rnn.weight_hh_l0": ru.Orthogonal()},
        Circular: {},  # its layers tag their own kernels
        Branching: {"first.weight": ru.Orthogonal(det=1)},
    }[build]
    x = {Recurrent: gaussian(12, 4, 3), Branching: gaussian(12, 5)}
    x = x.get(build, gaussian(12, 1, 6, 6)).float()
    if tags:
        ru.tag_(m, tags)
    old = copy.deepcopy(m)
    report = warm(m, method, x)
    assert list(report) == [name for name, _ in ru.tagged_parameters(m)]
    for _, p in ru.tagged_parameters(m):
        assert_on_manifold(p)
    if method == "procrustes":
        near = copy.deepcopy(old)
        ru.init.warm_start_(near)
        assert error_on(m, old, x) <= error_on(near, old, x) + 1e-6
    for cls in (ru.optim.ProjUNND, ru.optim.ProjUNNT, ru.optim.Cayley, ru.optim.Expm):
        opt = cls(m.parameters(), lr=1e-2)
        m(x).square().sum().backward()
        opt.step()
        for _, p in ru.tagged_parameters(m):
            assert_on_manifold(p)


def test_rank_deficient_layers_are_named_once():
    m = net()
    with torch.no_grad():
        m[0].weight[1] = m[0].weight[0]
        m[2].weight.zero_()
    with pytest.warns(UserWarning, match=r"'0.weight', '2.weight' is rank-deficient") as caught:
        report = ru.init.warm_start_(m)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert report["0.weight"].condition == report["2.weight"].condition == math.inf
    for name in report:
        assert_on_manifold(m.get_parameter(name))
    assert not report["2.weight"].folded and "not positive" in report["2.weight"].note


def test_report_is_a_dict_prints_and_draws(tmp_path):
    m = net()
    report = warm(m, "procrustes")
    assert isinstance(report, dict) and list(report) == ["0.weight", "2.weight"]
    text = str(report)
    for part in ("0.weight", "procrustes", "condition", "function error", "folded: ", "fitted: "):
        assert part in text
    plain = json.loads(json.dumps(report.as_dict()))
    assert plain["parameters"]["0.weight"]["gain"] == report["0.weight"].gain
    assert plain["function_error_after"] == report.function_error_after
    pytest.importorskip("matplotlib")
    for i, r in enumerate((report, ru.init.warm_start_(net(1)), warm(net(2), "lie"))):
        r.plot(tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").stat().st_size > 1000
    assert copy.deepcopy(report).folded == report.folded


def test_condition_is_that_of_the_weights_before():
    u, v = (torch.linalg.qr(gaussian(6, 6, seed=i))[0] for i in (1, 2))
    m = net()
    with torch.no_grad():
        m[0].weight.copy_(u * torch.tensor([8.0, 4, 2, 1, 1, 0.5]).double() @ v)
    assert ru.init.warm_start_(m)["0.weight"].condition == pytest.approx(16)


def test_keyword_and_tuple_batches_reach_the_model():
    m = net()
    want = ru.init.warm_start_(copy.deepcopy(m), calibration=X).function_error_after
    for calibration in ((X,), {"input": X}, [{"input": X[:20]}, (X[20:],)]):
        report = ru.init.warm_start_(copy.deepcopy(m), calibration=calibration)
        assert report.function_error_after == pytest.approx(want)
