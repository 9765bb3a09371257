"""Warm start in the Lie algebra: as near as the polar factor, by any optimizer, never by it."""

import pytest
import torch
from torch import nn

import riemann_unn as ru
from riemann_unn.init.warm_start import lie
from tests.init.warm_start.nets import assert_same_state, seeded, stack, state_of
from tests.support import DTYPES, assert_on_manifold, double, gaussian, rounding

CASES = {
    "2": ((2, 2), torch.float64),
    "square": ((9, 9), torch.float32),
    "64": ((64, 64), torch.float64),
    "tall": ((20, 6), torch.float64),
    "wide": ((6, 20), torch.float32),
    "batched": ((3, 5, 5), torch.float64),
    "unitary": ((8, 8), torch.complex64),
    "complex tall": ((9, 4), torch.complex128),
    "one": ((1, 1), torch.float64),
}


def nearest(w: torch.Tensor) -> float:
    u, _, vh = torch.linalg.svd(double(w), full_matrices=False)
    return float((u @ vh - double(w)).norm() / double(w).norm())


def lie_(p: nn.Parameter | nn.Module, **kwargs: object):
    return ru.init.warm_start_(p, method="lie", progress=False, **kwargs)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("sign", [1, -1])
def test_within_a_percent_of_the_polar_distance(case, sign):
    shape, dtype = case
    w = gaussian(*shape, dtype=dtype, seed=4)
    w[..., 0, :] *= sign  # both components of the orthogonal group
    p = ru.tag_(nn.Parameter(w.clone()), ru.Stiefel())
    report = lie_(p)["parameter"]
    assert_on_manifold(p)
    assert report.method == "lie" and report.note == ""
    assert nearest(w) - 1e-6 <= report.distance <= 1.01 * nearest(w) + 1e-6
    assert report.loss[-1] <= report.loss[0] or report.loss[-1] < 1e-12


@pytest.mark.parametrize(
    ("shape", "manifold"),
    [
        ((3, 2, 4, 4), ru.OrthogonalConv(2)),
        ((2, 3, 5), ru.UnitaryConv(1)),
        ((6, 2, 3, 3), ru.Stiefel(flatten=True)),
    ],
    ids=["orthogonal", "unitary", "flattened"],
)
def test_kernels_come_within_a_percent_too(shape, manifold):
    dtype = torch.complex128 if isinstance(manifold, ru.UnitaryConv) else torch.float64
    w = gaussian(*shape, dtype=dtype)
    p, q = (ru.tag_(nn.Parameter(w.clone()), manifold) for _ in range(2))
    got, best = lie_(p)["parameter"], ru.init.warm_start_(q)["parameter"]
    assert_on_manifold(p)
    assert got.loss and best.distance - 1e-9 <= got.distance <= 1.01 * best.distance


@pytest.mark.parametrize(
    ("base", "kwargs"),
    [
        (torch.optim.Adam, {}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.Adagrad, {"lr": 0.3}),
        (torch.optim.LBFGS, {"max_iter": 5}),
    ],
)
def test_any_optimizer_does(base, kwargs):
    w = gaussian(12, 12, seed=1)
    p = ru.tag_(nn.Parameter(w.clone()), ru.Orthogonal())
    report = lie_(p, base=base, tolerance=1e-3, **kwargs)["parameter"]
    assert report.distance <= 1.01 * nearest(w)
    assert len(report.loss) < 1000


def test_does_not_start_from_the_answer_nor_take_it():
    w = gaussian(8, 8, seed=2)
    p = ru.tag_(nn.Parameter(w.clone()), ru.Orthogonal())
    with pytest.warns(UserWarning, match="'parameter': the descent stopped after 1 steps"):
        report = lie_(p, base=torch.optim.SGD, lr=1e-6, max_steps=1)["parameter"]
    assert_on_manifold(p)
    assert report.distance > 1.05 * nearest(w) and "stopped" in report.note


@pytest.mark.parametrize("det", [1, -1])
@pytest.mark.parametrize("sign", [1, -1])
def test_determinant(det, sign):
    w = gaussian(6, 6, seed=3)
    w[0] *= sign * torch.linalg.det(w).sign()
    p, q = (ru.tag_(nn.Parameter(w.clone()), ru.Orthogonal(det=det)) for _ in range(2))
    lie_(p)
    ru.init.warm_start_(q)
    assert torch.linalg.det(p.detach()) == pytest.approx(det)
    assert torch.allclose(p, q, atol=1e-3)


def test_identity_and_minus_identity_are_reached():
    for w in (torch.eye(6).double(), -torch.eye(6).double(), torch.eye(6).double().flip(0)):
        for scale in (1.0, 3.0):
            p = ru.tag_(nn.Parameter(scale * w), ru.Orthogonal())
            lie_(p)
            assert torch.allclose(p, w, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_a_second_time_moves_by_rounding_only(dtype):
    p = ru.tag_(nn.Parameter(gaussian(7, 7, dtype=dtype)), ru.Stiefel())
    lie_(p)
    once = p.detach().clone()
    report = lie_(p)["parameter"]
    assert float((p - once).detach().abs().max()) <= rounding(dtype, 7)
    assert report.loss == ()


def test_zero_weights_are_defined_and_warned_of():
    p = ru.tag_(nn.Parameter(torch.zeros(4, 4)), ru.Orthogonal())
    with pytest.warns(UserWarning, match="rank-deficient"):
        lie_(p)
    assert_on_manifold(p)


def test_progress_is_visible_and_can_be_silenced(capsys):
    pytest.importorskip("tqdm")
    for progress in (True, False):
        p = ru.tag_(nn.Parameter(gaussian(5, 5)), ru.Orthogonal())
        ru.init.warm_start_(p, method="lie", progress=progress)
        shown = capsys.readouterr().err
        assert ("lie parameter" in shown and "loss" in shown) == progress


def test_without_tqdm_it_runs_silently(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    p = ru.tag_(nn.Parameter(gaussian(5, 5)), ru.Orthogonal())
    ru.init.warm_start_(p, method="lie")
    assert_on_manifold(p)
    assert capsys.readouterr().err == ""


def test_divergence_leaves_the_model_as_it_was():
    m = ru.tag_(seeded(stack, 5, 5, 2), {"0.weight": ru.Orthogonal()})
    before = state_of(m)
    with pytest.raises(FloatingPointError, match=r"'0.weight' diverged"):
        lie_(m, base=torch.optim.SGD, lr=float("inf"))
    assert_same_state(m, before)


def test_loss_is_the_relative_squared_distance_at_a_fixed_gain():
    w = gaussian(6, 6, seed=9)
    u, record = lie.descend(
        w,
        det=None,
        base=torch.optim.LBFGS,
        base_kwargs={},
        max_steps=100,
        tolerance=1e-7,
        name="w",
        progress=False,
    )
    gain = w.norm() / 6**0.5
    assert record.converged
    want = float((w - gain * u).norm() / w.norm()) ** 2
    assert record.loss[-1] == pytest.approx(want, rel=1e-4)
