"""Tangent directions against the dense Ω, which the kernels never form."""

from __future__ import annotations

import pytest
import torch

from riemann_unn.linalg import (
    next_directions,
    polar,
    rotate_low_rank_,
    rotate_whole_,
    skew,
    tangent_coordinates,
    tangent_directions,
    tangent_gradient,
    tangent_times,
)
from riemann_unn.linalg.step.tangent import starts_by_planes
from tests.support import DTYPES, double, error, every, gaussian, generator, point, rounding

SHAPES = [(12, 12), (5, 12), (3, 10, 10), (2, 3, 9)]
METHODS = ["tangent", "svd", "lsi", "column"]
PHIS = ["exp", "cayley", "polar"]


@pytest.fixture(params=["small", "large"], autouse=True)
def kind(request, monkeypatch):
    """Everything holds for large points too, which are read in blocks and applied once."""
    if request.param == "large":
        monkeypatch.setattr("riemann_unn.linalg.step.products.CACHED", 0)
        monkeypatch.setattr("riemann_unn.linalg.step.products._BLOCKS", 2)
        monkeypatch.setattr("riemann_unn.linalg.step.update.CACHED", 0)
        monkeypatch.setattr("riemann_unn.linalg.step.tangent.CACHED", 0)
        monkeypatch.setattr("riemann_unn.linalg.step.tangent._FORMED", 0)


def omega(x, g):
    """The slow oracle: ½ (Xᴴ G - Gᴴ X), in double precision."""
    return skew(double(x).mH @ double(g))


def problem(shape, dtype, rank=2, method="tangent", seed=0):
    x, g = point(*shape, dtype=dtype), gaussian(*shape, dtype=dtype, seed=seed + 1)
    v, z, xv = tangent_directions(x, g, rank=rank, method=method, generator=generator(seed))
    return x, g, v, z, xv


@every("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@every("method", METHODS)
@every("rank", [1, 2])
def test_directions_are_orthonormal_and_z_is_omega_v(dtype, shape, method, rank):
    x, g, v, z, xv = problem(shape, dtype, rank, method)
    limit = rounding(dtype, shape[-1], 20)
    assert v.shape == (*shape[:-2], shape[-1], rank) and v.dtype == z.dtype == dtype
    assert (v.mH @ v - torch.eye(rank, dtype=dtype)).abs().max() <= limit
    assert (xv - x @ v).abs().max() <= limit
    gap = float((z - omega(x, g) @ double(v)).abs().max())
    if method in ("tangent", "svd"):
        assert gap <= limit
    else:  # negative control: the published sketches drop part of the tangent gradient
        assert gap > 0.05


@every("dtype", DTYPES)
@every("shape", SHAPES)
@every("given", [False, True])
def test_what_a_base_sees_is_tangent_and_moves_as_omega_k(dtype, shape, given):
    x, g, v, z, xv = problem(shape, dtype)
    out = torch.full(shape, torch.nan, dtype=dtype) if given else None
    seen = tangent_gradient(x, v, z, xv, out=out)
    assert out is None or seen is out
    full, eye = omega(x, g), torch.eye(shape[-1], dtype=double(x).dtype)
    rest = eye - double(v) @ double(v).mH
    omega_k = full - rest @ full @ rest
    limit = rounding(dtype, shape[-1], 40)
    if shape[-1] == shape[-2]:
        assert (seen - omega_k).abs().max() <= limit
        wide = seen
    else:
        wide = skew(double(x).mH @ double(seen))
        # Tangent at X, with the motion of Ω_k to first order.
        assert (seen @ x.mH + x @ seen.mH).abs().max() <= limit
        assert (double(x) @ wide - double(x) @ skew(double(x).mH @ double(seen))).abs().max() == 0
    # Descent: the share of ⟨Ω_k, Ω⟩ that the base is shown is positive.
    inner = (wide.conj() * full).real.sum(dim=(-2, -1))
    assert (inner > 0).all()


@every("dtype", [torch.float64, torch.complex128])
@every("shape", [(5, 12), (2, 3, 9)])
def test_all_of_a_thin_omega_is_known_on_the_rows_of_the_point(dtype, shape):
    """With v = Xᴴ nothing is left out, and the first step with momentum is the plain one."""
    x, g = point(*shape, dtype=dtype), gaussian(*shape, dtype=dtype, seed=3)
    v = x.mH.clone()
    xv = x @ v
    z = tangent_times(x, g, v, xv)
    w = skew(v.mH @ z)
    assert (z @ v.mH - v @ z.mH - v @ w @ v.mH - omega(x, g)).abs().max() <= 1e-14
    seen = tangent_gradient(x, v, z, xv)
    normal = 0.5 * (g @ x.mH + x @ g.mH) @ x
    assert (seen - (g - normal)).abs().max() <= 1e-14  # the projection of the gradient
    assert (tangent_coordinates(x, seen, v, xv) - z).abs().max() <= 1e-14


@every("dtype", DTYPES)
@every("shape", SHAPES)
def test_coordinates_of_what_a_base_wrote(dtype, shape):
    x, _, v, _, xv = problem(shape, dtype)
    delta = gaussian(*shape, dtype=dtype, seed=9)
    wide = double(delta) if shape[-1] == shape[-2] else double(x).mH @ double(delta)
    gap = tangent_coordinates(x, delta, v, xv) - skew(wide) @ double(v)
    assert gap.abs().max() <= rounding(dtype, shape[-1], 20)


@every("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("phi", PHIS)
@every("rank", [1, 2, 4])
@every("size", [1e-6, 0.3, 3.0])
def test_turning_along_directions_is_the_dense_turn(dtype, shape, phi, rank, size):
    x, _, v, z, xv = problem(shape, dtype, rank)
    d = z * (-size / torch.linalg.matrix_norm(z, 2).max())
    w = skew(double(v).mH @ double(d))
    k = double(d) @ double(v).mH - double(v) @ double(d).mH - double(v) @ w @ double(v).mH
    eye = torch.eye(shape[-1], dtype=k.dtype)
    turn = {
        "exp": torch.linalg.matrix_exp,
        "cayley": lambda k: torch.linalg.inv(eye - k / 2) @ (eye + k / 2),
        "polar": lambda k: polar(eye + k),
    }[phi]
    expected = double(x) @ turn(k)
    moved = x.clone()
    angle, added = rotate_low_rank_(moved, v, d, xv, phi=phi)
    single = dtype in (torch.float32, torch.complex64)
    assert (moved - expected).abs().max() <= (3e-6 if single else 1e-13)
    assert error(moved.mH) <= (1e-6 if single else 4e-15)
    if size == 3.0:
        assert (moved - double(x) @ turn(-k)).abs().max() > 1e-2  # the check can fail
    largest = torch.linalg.matrix_norm(k, 2)
    limits = {"exp": largest, "cayley": 2 * (largest / 2).atan(), "polar": largest.atan()}
    assert (angle - limits[phi]).abs().max() <= rounding(dtype, 1, 40) * max(size, 1)
    # The next sketch starts from one direction of each plane: all of K is known on them.
    starts = (added, next_directions(v, d)) if rank > 1 or not dtype.is_complex else ()
    if rank > 1 and shape[-1] >= 2 * rank:  # what d adds to v spans, with v, the same
        for start in (
            rotate_low_rank_(x.clone(), v, d, xv, phi=phi, by_planes=False)[1],
            next_directions(v, d, by_planes=False),
        ):
            assert (double(v).mH @ double(start)).abs().max() <= rounding(dtype, shape[-1], 40)
            both = torch.linalg.qr(torch.cat([double(v), double(start)], dim=-1))[0]
            rest = eye - both @ both.mH
            assert (rest @ k).abs().max() <= (1e-5 if single else 1e-12) * size
    for start in starts if shape[-1] >= 2 * rank else ():
        start = torch.linalg.qr(double(start))[0]
        rest = eye - start @ start.mH
        assert (rest @ k @ rest).abs().max() <= (1e-5 if single else 1e-12) * size


@every("phi", PHIS)
@every("shape", SHAPES)
@every("rank", [1, 3])
def test_zero_moves_change_no_bit_and_huge_ones_stay(phi, shape, rank):
    for dtype in DTYPES:
        x, _, v, z, xv = problem(shape, dtype, rank)
        moved = x.clone()
        rotate_low_rank_(moved, v, 0 * z, xv, phi=phi)
        assert torch.equal(moved, x)
        for size in (1e-36, 1e6, 1e30):
            rotate_low_rank_(moved, v, size * z, moved @ v, phi=phi)
            assert torch.isfinite(moved).all()
        single = dtype in (torch.float32, torch.complex64)
        assert error(moved.mH) <= (1e-6 if single else 1e-14)


@every("phi", PHIS)
@every("dtype", [torch.float64, torch.complex128])
def test_rank_deficient_moves_of_any_size(phi, dtype):
    x, v = point(12, 12, dtype=dtype), point(12, 3, dtype=dtype, seed=5)
    u = gaussian(12, 1, dtype=dtype, seed=6)
    for d in (
        u.expand(12, 3).clone(),
        torch.cat([u, 0 * u, 0 * u], 1),
        1j * v if dtype.is_complex else v,
    ):
        w = skew(v.mH @ d)
        d = d - v @ (v.mH @ d) + v @ w  # coordinates of a skew matrix
        for size in (1e-30, 1.0, 1e3, 1e30):
            moved = x.clone()
            rotate_low_rank_(moved, v, size * d, x @ v, phi=phi)
            assert error(moved) <= 1e-14


@every("phi", [*PHIS, torch.sin])
@every("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 7, 80])
def test_whole_turns_and_their_cap(phi, dtype, n):
    x, k = point(n, n, dtype=dtype), skew(gaussian(n, n, dtype=dtype, seed=1))
    for cap in (None, 0.3):
        moved = x.clone()
        rotate_whole_(moved, k.clone(), phi=phi, max_angle=cap)
        single = dtype in (torch.float32, torch.complex64)
        assert error(moved) <= (5e-7 if single else 2e-15)
        if cap is not None:
            turned = torch.angle(torch.linalg.eigvals(double(x).mH @ double(moved))).abs().max()
            assert turned <= cap * (1 + 1e-6) + (1e-5 if single else 0)
            if phi == "exp" and torch.linalg.matrix_norm(double(k), 2) > cap:
                assert turned >= cap * (1 - 1e-5)


# How good directions are ---------------------------------------------------------


def energy(v, z):
    w = v.mH @ z
    return float(2 * z.abs().square().sum() - w.abs().square().sum())


def best(full, rank):
    return float(torch.linalg.svdvals(full)[: 2 * rank].square().sum())


@every("dtype", [torch.float64, torch.complex128])
@every("rank", [1, 3])
def test_svd_is_exact_on_gradients_of_its_rank_and_the_best_there_is(dtype, rank):
    x = point(12, 12, dtype=dtype)
    g = gaussian(12, rank, dtype=dtype) @ gaussian(rank, 12, dtype=dtype, seed=1)
    v, z, xv = tangent_directions(x, g, rank=rank, method="svd")
    assert (tangent_gradient(x, v, z, xv) - omega(x, g)).abs().max() <= 1e-13
    v, z, xv = tangent_directions(x, g, rank=3, method="svd")  # of more than its rank
    assert (v.mH @ v - torch.eye(3, dtype=dtype)).abs().max() <= 1e-13
    assert (tangent_gradient(x, v, z, xv) - omega(x, g)).abs().max() <= 1e-13
    if not dtype.is_complex:  # in complex Ω the signs of the angles decide what k columns hold
        g = gaussian(12, 12, seed=4)
        v, z, _ = tangent_directions(x, g, rank=rank, method="svd")
        assert energy(v, z) == pytest.approx(best(omega(x, g), rank), rel=1e-12)


def test_subspace_iteration_that_starts_in_the_leading_planes_comes_near_the_best(request):
    """Spectrum 1/j, k = 2: .95 of the best of rank 2k; from z, or from what z adds to v, less.

    So does one that starts in the planes at some steps and from what z adds to v at the others.
    """
    if "large" in request.node.name:
        pytest.skip("of large points Ω is applied once a step")
    values = torch.tensor([1 / (1 + i // 2) for i in range(64)], dtype=torch.float64)
    u = point(64, 64, seed=1)
    plane = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    full = u @ (torch.block_diag(*[plane] * 32) * values) @ u.mH
    x = point(64, 64)
    shares = {}
    starts = {
        "leading": lambda v, z, step: next_directions(v, z),
        "some": lambda v, z, step: next_directions(v, z, by_planes=starts_by_planes(step)),
        "new": lambda v, z, step: next_directions(v, z, by_planes=False),
        "z": lambda v, z, step: torch.linalg.qr(z)[0],
    }
    for name, next_start in starts.items():
        start, found = None, []
        for step in range(30):
            v, z, _ = tangent_directions(
                x, x @ full, rank=2, start=start, generator=generator(step)
            )
            found.append(energy(v, z) / best(full, 2))
            start = next_start(v, z, step)
        shares[name] = sum(found[10:]) / 20
    assert min(shares["leading"], shares["some"]) >= 0.95
    assert min(shares["leading"], shares["some"]) > max(shares["new"], shares["z"])


def test_not_a_number_and_infinity_reach_the_coordinates():
    for bad in (torch.nan, torch.inf):
        x, g = point(8, 8), gaussian(8, 8)
        g[5, 2] = bad
        for rank in (1, 2):
            for method in ("tangent", "lsi"):
                _, z, _ = tangent_directions(x, g, rank=rank, method=method, generator=generator())
                assert not torch.isfinite(z).all()


def test_a_zero_gradient_leaves_directions_to_move_along():
    """A base with momentum moves on: v must not vanish with the gradient."""
    for shape in ((8, 8), (2, 8, 8)):
        for rank in (1, 2):
            x = point(*shape)
            v, z, _ = tangent_directions(x, 0 * x, rank=rank, generator=generator())
            assert not z.any()
            assert (v.mH @ v - torch.eye(rank)).abs().max() <= 1e-14
            start = next_directions(v, z)
            v, _, _ = tangent_directions(x, 0 * x, rank=rank, start=start, generator=generator())
            assert (v.mH @ v - torch.eye(rank)).abs().max() <= 1e-14


def test_unknown_methods_are_refused():
    with pytest.raises(ValueError, match="sketch 'power' is unknown"):
        tangent_directions(point(4, 4), point(4, 4), rank=1, method="power")
