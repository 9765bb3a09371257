"""The maps φ: unitary whatever the size of their argument, and the maps they claim to be."""

from __future__ import annotations

import pytest
import torch

from riemann_unn.linalg import (
    cayley,
    exp_skew,
    newton_schulz_,
    polar,
    rotate_by,
    skew,
    unitary_core,
)
from tests.support import (
    DTYPES,
    assert_on_manifold,
    double,
    every,
    gaussian,
    low_rank,
    point,
    rounding,
    slope,
)

SIZES = [(2, 2), (5, 5), (3, 4, 4), (1, 1), (80, 80), (20, 6, 6)]


def generators(shape, dtype, size=1.0):
    k = skew(gaussian(*shape, dtype=dtype))
    return k * (size / torch.linalg.matrix_norm(k, 2).max().clamp_min(1e-30))


@every("dtype", DTYPES)
@every("shape", SIZES)
@every("map_", [exp_skew, cayley])
def test_skew_maps_are_unitary_however_large_the_generator(map_, shape, dtype):
    for size in (0.0, 1e-8, 1.0, 30.0, 1e3):
        assert_on_manifold(map_(generators(shape, dtype, size)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SIZES)
def test_exp_matches_the_power_series_definition(shape, dtype):
    k = generators(shape, dtype, 2.0)
    expected = torch.linalg.matrix_exp(double(k))
    # scaling and squaring, the oracle, itself loses digits with n
    assert (exp_skew(k) - expected).abs().max() <= rounding(dtype, shape[-1] ** 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cayley_matches_its_definition(dtype):
    k = double(generators((6, 6), dtype, 2.0))
    eye = torch.eye(6, dtype=k.dtype)
    expected = torch.linalg.inv(eye - k / 2) @ (eye + k / 2)
    assert (cayley(k.to(dtype)) - expected).abs().max() <= rounding(dtype, 6)


def test_exp_branches_agree():
    k = generators((4, 5, 5), torch.float64, 3.0)
    one_by_one = torch.stack([exp_skew(x) for x in k])  # eigendecomposition
    many = exp_skew(torch.cat([k, k, k]))[:4]  # matrix_exp
    large = exp_skew(torch.cat([k, 100 * k, k]))[:4]  # eigendecomposition, for the norm
    assert (one_by_one - many).abs().max() < 1e-14
    assert (one_by_one - large).abs().max() < 1e-14


@pytest.mark.parametrize("map_", [exp_skew, cayley, polar])
def test_maps_are_differentiable(map_):
    x = gaussian(4, 4, seed=3).requires_grad_()
    arg = (lambda z: map_(skew(z))) if map_ is not polar else map_
    assert torch.autograd.gradcheck(arg, x)


def test_cayley_agrees_with_exp_to_second_order():
    k = generators((6, 6), torch.float64)
    sizes = [10.0**-i for i in (1.0, 1.5, 2.0, 2.5)]
    gaps = [float(torch.linalg.matrix_norm(cayley(t * k) - exp_skew(t * k))) for t in sizes]
    assert slope(gaps, sizes) == pytest.approx(3.0, abs=0.1)
    wrong = [float(torch.linalg.matrix_norm(cayley(-t * k) - exp_skew(t * k))) for t in sizes]
    assert slope(wrong, sizes) == pytest.approx(1.0, abs=0.1)  # the check can fail


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9), (3, 5, 2), (1, 1)])
def test_polar_is_nearest(shape, dtype):
    x = gaussian(*shape, dtype=dtype)
    u = polar(x)
    assert u.shape == x.shape and u.dtype == dtype
    assert_on_manifold(u)
    singular = torch.linalg.svdvals(double(x))
    distance = torch.linalg.matrix_norm(double(u) - double(x))
    optimum = (singular - 1).square().sum(-1).sqrt()
    assert (distance - optimum).abs().max() <= rounding(dtype, max(shape))


def test_polar_of_rank_deficient_matrices_is_orthonormal():
    for x in (torch.zeros(5, 5), torch.zeros(5, 3), low_rank(6, 6, 2, dtype=torch.float32)):
        assert_on_manifold(polar(x))
    for dtype in DTYPES:
        for seed in range(30):  # complex64 fails in LAPACK on most of these
            assert_on_manifold(polar(gaussian(15, 1, dtype=dtype, seed=seed).expand(15, 8)))


@pytest.mark.parametrize("det", [1, -1])
def test_polar_with_a_determinant_is_the_nearest_of_that_component(det):
    x = gaussian(4, 5, 5)
    u = polar(x, det=det)
    assert_on_manifold(u)
    assert torch.allclose(torch.linalg.det(u), torch.full((4,), float(det), dtype=u.dtype))
    distance = torch.linalg.matrix_norm(u - x)
    for seed in range(50):
        other = polar(gaussian(4, 5, 5, seed=seed + 1) * 0.1 + x, det=det)
        assert (distance <= torch.linalg.matrix_norm(other - x) + 1e-12).all()


def test_polar_refuses_a_determinant_where_there_is_none():
    with pytest.raises(ValueError, match="square real"):
        polar(gaussian(4, 3), det=1)
    with pytest.raises(ValueError, match="square real"):
        polar(gaussian(3, 3, dtype=torch.complex128), det=1)


@pytest.mark.parametrize("phi", ["exp", "cayley", "polar"])
def test_core_is_the_identity_plus_the_skew_part_to_second_order(phi):
    z = gaussian(4, 4)
    sizes = [10.0**-i for i in (2.0, 2.5, 3.0, 3.5)]
    eye = torch.eye(4, dtype=z.dtype)
    gaps = [
        float(torch.linalg.matrix_norm(unitary_core(t * skew(z), phi=phi) - eye - t * skew(z)))
        for t in sizes
    ]
    assert slope(gaps, sizes) == pytest.approx(2.0, abs=0.1)
    wrong = [
        float(torch.linalg.matrix_norm(unitary_core(t * skew(z), phi=phi) - eye - t * z))
        for t in sizes
    ]
    assert slope(wrong, sizes) == pytest.approx(1.0, abs=0.1)  # without the skew part it fails


def test_core_is_exactly_the_identity_at_zero():
    for phi in ("exp", "cayley", "polar"):
        for dtype in DTYPES:
            core = unitary_core(torch.zeros(4, 4, dtype=dtype), phi=phi)
            assert torch.equal(core, torch.eye(4, dtype=core.dtype))


def test_core_refuses_an_unknown_map():
    with pytest.raises(ValueError, match="phi='qr' is unknown"):
        unitary_core(skew(gaussian(2, 2)), phi="qr")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SIZES)
def test_the_polar_map_is_the_polar_factor_of_a_step(shape, dtype):
    for size in (0.0, 1e-8, 1.0, 30.0, 1e3, 1e8):
        k = generators(shape, dtype, size)
        core = unitary_core(k, phi="polar")
        assert_on_manifold(core)
        if size <= 30:
            eye = torch.eye(shape[-1], dtype=double(k).dtype)
            assert (core - polar(eye + double(k))).abs().max() <= rounding(dtype, shape[-1], 64)


@pytest.mark.parametrize("size", [0.1, 3.0, 1e4])
@pytest.mark.parametrize("phi", ["exp", "cayley", "polar"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_rotating_is_multiplying_by_the_core(dtype, phi, size):
    n = 80  # more than is computed in double precision
    z = skew(gaussian(n, n, dtype=dtype) * (size / n))
    x = polar(gaussian(n, n, dtype=dtype, seed=1))
    expected = x @ unitary_core(z, phi=phi)
    assert torch.linalg.matrix_norm(rotate_by(x, z.clone(), phi=phi) - expected) <= 1e-11 * n


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_skew_part_of_large_matrices(dtype, monkeypatch):
    monkeypatch.setattr("riemann_unn.linalg.maps.CACHED", 0)
    for z in (gaussian(30, 30, dtype=dtype), gaussian(30, 30, dtype=dtype).mH):
        before = z.clone()
        assert (skew(z) - 0.5 * (before - before.mH)).abs().max() <= rounding(dtype)
        assert torch.equal(z, before)


@pytest.mark.parametrize("phi", ["exp", "cayley", "polar"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
def test_one_newton_schulz_step_mends_what_rotating_leaves(phi, size):
    x = point(80, 80, dtype=torch.float32)
    moved = rotate_by(x, skew(gaussian(80, 80, dtype=torch.float32) * (size / 80)), phi=phi)
    assert_on_manifold(newton_schulz_(moved))
