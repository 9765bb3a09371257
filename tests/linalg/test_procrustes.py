"""Procrustes kernels against closed forms, scipy and brute force."""

from itertools import pairwise

import pytest
import torch

import riemann_unn as ru
from riemann_unn.linalg import polar, procrustes, ridge_by_gcv
from tests.support import gaussian, point

DTYPES = [torch.float64, torch.complex128]


def problem(rows: int, out: int, into: int, dtype: torch.dtype, seed: int = 0):
    """Outputs Y = X W^H with noise, and the two sides of the normal equations for U (out, in)."""
    x = gaussian(rows, into, dtype=dtype, seed=seed) * torch.linspace(0.1, 3, into)
    y = x @ gaussian(out, into, dtype=dtype, seed=seed + 1).mH
    y = y + 0.5 * gaussian(rows, out, dtype=dtype, seed=seed + 2)
    gram = x.mH @ x
    return x, y, y.mH @ x, lambda u: u @ gram


def error(x, y, u, g):
    return float((y - g * x @ u.mH).norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "into"), [(6, 6), (9, 4)])
def test_square_and_tall_are_the_closed_form(out, into, dtype):
    x, _, cross, normal = problem(40, out, into, dtype)
    u, g = procrustes(cross, normal, project=polar)
    want = polar(cross)
    assert torch.allclose(u, want, atol=1e-10)
    assert g == pytest.approx(float((want.conj() * cross).real.sum() / x.abs().square().sum()))


def test_square_against_scipy():
    scipy = pytest.importorskip("scipy.linalg").orthogonal_procrustes
    x, y, cross, normal = problem(40, 6, 6, torch.float64)
    r, _ = scipy(x.numpy(), y.numpy())  # y = x r
    assert torch.allclose(procrustes(cross, normal, project=polar)[0], torch.from_numpy(r.T))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gain", [None, 0.7])
def test_wide_beats_its_start_and_its_neighbours(gain, dtype):
    x, y, cross, normal = problem(60, 4, 9, dtype)
    u, g = procrustes(cross, normal, project=polar, gain=gain, max_steps=2000, tolerance=1e-12)
    start, start_g = procrustes(cross, normal, project=polar, gain=gain, max_steps=0)
    assert gain is None or g == start_g == gain
    best = error(x, y, u, g)
    assert best < error(x, y, start, start_g) * 0.999
    for i, size in enumerate([1e-4, 1e-3, 1e-2, 1e-1, 1.0] * 4):
        near = polar(u + size * gaussian(4, 9, dtype=dtype, seed=i))
        assert error(x, y, near, g) >= best - 1e-9
        assert gain is not None or error(x, y, u, g * (1 + size)) >= best


def test_every_step_lowers_the_error():
    x, y, cross, normal = problem(60, 4, 9, torch.float64)
    errors = []
    for steps in range(12):
        u, g = procrustes(cross, normal, project=polar, max_steps=steps, tolerance=0.0)
        errors.append(error(x, y, u, g))
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(errors))
    assert errors[-1] < errors[0]


def test_best_of_several_starts_is_taken():
    _, _, cross, normal = problem(60, 4, 9, torch.float64)
    best, _ = procrustes(cross, normal, project=polar, max_steps=2000, tolerance=1e-13)
    for starts in ([best], [point(4, 9), best], [best, point(4, 9)]):
        u, g = procrustes(cross, normal, project=polar, starts=starts, max_steps=0)
        assert torch.equal(u, best)
        assert g > 0


def test_determinant_is_that_of_the_projection():
    _, _, cross, normal = problem(40, 5, 5, torch.float64)
    for det in (1, -1):
        u, _ = procrustes(cross, normal, project=lambda x, d=det: polar(x, det=d))
        assert torch.linalg.det(u) == pytest.approx(det)


def test_nothing_to_match_has_gain_zero():
    zero = torch.zeros(4, 4)
    u, g = procrustes(zero, lambda u: 0 * u, project=polar)
    assert g == 0 and float(ru.orthogonality_error(u, ru.Stiefel())) < 1e-6


def test_ridge_against_trying_every_penalty():
    x, noise = gaussian(30, 8), gaussian(30, 3, seed=2)
    y = x @ gaussian(8, 3, seed=1) + 2 * noise
    scores = {}
    for e in range(-12, 3):
        lam = 10.0**e * float(torch.linalg.svdvals(x)[0]) ** 2
        b = torch.linalg.solve(x.mT @ x + lam * torch.eye(8), x.mT @ y)
        hat = x @ torch.linalg.solve(x.mT @ x + lam * torch.eye(8), x.mT)
        scores[e] = (float((y - x @ b).square().sum() / (29 - hat.trace()) ** 2), b)
    want = min(scores.values(), key=lambda pair: pair[0])[1]
    assert torch.allclose(ridge_by_gcv(x, y), want)


def test_ridge_predicts_pure_noise_by_little():
    x, y = gaussian(30, 25), gaussian(30, 3, seed=1)
    plain = torch.linalg.lstsq(x, y).solution
    assert ridge_by_gcv(x, y).norm() < 0.5 * plain.norm()
    assert not ridge_by_gcv(torch.zeros(5, 2), torch.ones(5, 1)).any()


def test_ridge_of_exact_data_is_least_squares():
    x, b = gaussian(30, 8), gaussian(8, 3, seed=1)
    assert torch.allclose(ridge_by_gcv(x, x @ b), b, atol=1e-9)
