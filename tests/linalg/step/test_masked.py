"""Kernels that read nothing: against dense oracles in double precision, for moves of any kind."""

from __future__ import annotations

import pytest
import torch

from riemann_unn.linalg.maps import skew
from riemann_unn.linalg.step.masked import (
    LARGEST_ANGLE,
    dense_minus_identity,
    masked_columns,
    masked_next,
    rotation_by_gram,
)
from riemann_unn.linalg.step.masked_polish import rows_due
from riemann_unn.linalg.step.tangent import (
    gaussian_draws,
    iterate,
    next_directions,
    tangent_coordinates,
    tangent_gradient,
    tangent_times,
)
from riemann_unn.linalg.step.update import rotate_low_rank_lazily_, rotate_whole_
from riemann_unn.linalg.value_branches import WithoutReading
from tests.support import (
    COMPLEX,
    DTYPES,
    double,
    error,
    every,
    gaussian,
    generator,
    point,
    rounding,
)
from tests.unread import ReadError, Unread

PHIS = ["exp", "cayley", "polar"]
SINGLE = (torch.float32, torch.complex64)


def generator_of(v, d):
    """K, n by n, whose coordinates on v are d."""
    v, d = double(v), double(d)
    return d @ v.mH - v @ d.mH - v @ skew(v.mH @ d) @ v.mH


def turn(k, phi):
    """φ(K) by all eigenvectors."""
    theta, v = torch.linalg.eigh(-1j * k)
    maps = {"exp": lambda t: t, "cayley": lambda t: 2 * torch.atan(t / 2), "polar": torch.atan}
    found = (v * torch.exp(1j * maps[phi](theta)).unsqueeze(-2)) @ v.mH
    return found if k.is_complex() else found.real


def move(shape, k, dtype, size, seed=0):
    """A point, directions and coordinates of the skew-Hermitian kind, of a largest angle."""
    *batch, _, n = shape
    x, v = point(*shape, dtype=dtype, seed=seed), point(*batch, n, k, dtype=dtype, seed=seed + 1)
    a = skew(gaussian(*batch, n, n, dtype=dtype, seed=seed + 2))
    d = a @ v
    largest = torch.linalg.matrix_norm(generator_of(v, d), 2).amax()
    return x, v, d * (size / largest).to(d.dtype)


CASES = [((9, 9), 1), ((12, 12), 3), ((6, 20), 2), ((3, 8, 8), 1), ((2, 10, 10), 4), ((5, 6), 5)]


@every("phi", PHIS)
@every("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "k"), CASES)
def test_turns_against_eigenvectors_of_the_whole_generator(phi, dtype, shape, k):
    for size in (1e-6, 0.3, 3.0, 20.0):
        x, v, d = move(shape, k, dtype, size)
        expected = double(x) @ turn(generator_of(v, d), phi)
        for known in (x @ v, None):
            moved = x.clone()
            with WithoutReading(), Unread():
                rotate_low_rank_lazily_(moved, v, d, known, phi=phi, max_angle=None, by_planes=True)
            limit = 2e-6 if dtype in SINGLE else 1e-12 if size <= 4 else 1e-8
            assert (moved - expected).abs().max() <= limit * max(1, size), size
            assert error(moved) <= rounding(dtype, shape[-1], factor=8 if size < 4 else 32), size
    assert (moved - x).abs().max() > 0.01  # the check can fail


@every("phi", PHIS)
@every("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "k"), CASES)
def test_moves_of_any_size_stay_on_the_manifold(phi, dtype, shape, k):
    for size in (1e-30, 1e3, 1e8, 1e30 if dtype in SINGLE else 1e120):
        x, v, d = move(shape, k, dtype, 1.0)
        with WithoutReading():
            rotate_low_rank_lazily_(x, v, d * size, None, phi=phi, max_angle=None, by_planes=True)
        assert error(x) <= rounding(dtype, shape[-1], factor=64), size


@every("phi", PHIS)
@every("dtype", DTYPES)
@every(("shape", "k"), CASES)
def test_a_zero_move_changes_no_bit(phi, dtype, shape, k):
    x, v, d = move(shape, k, dtype, 1.0)
    before = x.clone()
    with WithoutReading():
        angle, added = rotate_low_rank_lazily_(
            x, v, torch.zeros_like(d), x @ v, phi=phi, max_angle=0.1, by_planes=True
        )
    assert torch.equal(x, before) and torch.isfinite(added).all()
    assert angle().abs().max() == 0


@every("phi", PHIS)
@every("dtype", DTYPES)
@every("k", [1, 3])
def test_moves_along_dependent_directions(phi, dtype, k):
    x, v, d = move((12, 12), k, dtype, 1.0)
    thin = d[:, :1] @ gaussian(1, k, dtype=dtype, seed=5)
    within = v @ skew(gaussian(k, k, dtype=dtype, seed=6))
    some = torch.cat([d[:, : k - 1], torch.zeros_like(d[:, :1])], dim=-1)
    for name, other in {"rank one": thin, "inside": within, "a zero column": some}.items():
        moved = x.clone()
        with WithoutReading():
            _, added = rotate_low_rank_lazily_(
                moved, v, other, None, phi=phi, max_angle=None, by_planes=True
            )
        expected = double(x) @ turn(generator_of(v, other), phi)
        limit = 5e-6 if dtype in SINGLE else 1e-12
        assert (moved - expected).abs().max() <= limit, name
        assert error(moved) <= rounding(dtype, 12), name
        if k > 1:
            assert error(added) <= rounding(dtype, 12), name


@every("dtype", DTYPES)
@every(("shape", "k"), CASES)
def test_no_plane_turns_by_more_than_a_cap(dtype, shape, k):
    for phi in PHIS:
        x, v, d = move(shape, k, dtype, 3.0)
        with WithoutReading():
            moved = x.clone()
            angle, _ = rotate_low_rank_lazily_(
                moved, v, d, None, phi=phi, max_angle=0.2, by_planes=True
            )
            expected, fine = x.clone(), x.clone()
            rotate_low_rank_lazily_(
                expected, v, d * 1e-2, None, phi=phi, max_angle=None, by_planes=True
            )
            rotate_low_rank_lazily_(fine, v, d * 1e-2, None, phi=phi, max_angle=0.2, by_planes=True)
        # The bound is within a tenth of the largest plane's angle; φ itself only shortens.
        assert angle().amax() <= 0.2 + 1e-6
        if phi == "exp":
            assert angle().amax() >= 0.2 * 0.85
        assert (fine - expected).abs().max() <= rounding(dtype)  # shorter steps are left alone
        assert error(moved) <= rounding(dtype, shape[-1])


def test_what_is_no_number_spreads_to_the_point_alone_and_raises_nothing():
    for k in (1, 3):
        x, v, d = move((2, 9, 9), k, torch.float32, 1.0)
        d[0, 2, 0] = float("nan")
        before = x.clone()
        with WithoutReading():
            rotate_low_rank_lazily_(x, v, d, None, phi="exp", max_angle=None, by_planes=True)
        assert x[0].isnan().any() and not x[1].isnan().any()
        assert (x[1] - before[1]).abs().max() > 0.01


@every("phi", PHIS)
@every("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 7), (3, 6, 6), (70, 70)])
def test_whole_turns(phi, dtype, shape):
    n = shape[-1]
    for size in (0.0, 1e-6, 0.5, 3.0):
        x = point(*shape, dtype=dtype)
        k = skew(gaussian(*shape, dtype=dtype, seed=3))
        k = k * (size / torch.linalg.matrix_norm(k, 2).amax()).to(dtype)
        expected = double(x) @ turn(double(k), phi)
        with WithoutReading(), Unread():
            rotate_whole_(x, k.clone(), phi=phi)
        assert (x - expected).abs().max() <= rounding(dtype, n, factor=16), size
        assert error(x) <= rounding(dtype, factor=8)
    with WithoutReading():
        rotate_whole_(x, k * 1e6, phi=phi)
        assert error(x) <= rounding(dtype, n, factor=16)
        before = x.clone()
        rotate_whole_(x, k, phi=phi, max_angle=0.1)
    assert torch.linalg.matrix_norm(x - before, 2).amax() <= 0.1 + rounding(dtype, n)


@pytest.mark.parametrize("phi", PHIS)
def test_a_turn_by_too_much_is_a_shorter_turn_in_the_same_planes(phi):
    k = skew(gaussian(6, 6))
    k = k * (1e5 / torch.linalg.matrix_norm(k, 2))
    share = turn(k * (LARGEST_ANGLE / 1e5), phi)
    found = dense_minus_identity(k, phi, None) + torch.eye(6, dtype=k.dtype)
    assert torch.linalg.matrix_norm(found @ share - share @ found) <= 1e-6
    assert error(found) <= 1e-11


@every("dtype", DTYPES)
@every("k", [2, 5])
def test_columns_span_and_complete(dtype, k):
    w, v = gaussian(3, 20, k, dtype=dtype), point(3, 20, k, dtype=dtype, seed=1)
    with Unread():
        q = masked_columns(w, v)
        alone = masked_columns(w, None)
    for found in (q, alone):
        assert error(found) <= rounding(dtype)
        rest = double(w) - double(found) @ (double(found).mH @ double(w))
        # Completed columns are off by the share of the others, independent ones by rounding.
        assert rest.abs().max() <= (1e-3 if found is q else 1e-5 if dtype in SINGLE else 1e-12)
    w[..., -1] = w[..., 0]
    w[1] = 0
    w[2] *= 1e-30
    q = masked_columns(w, v)
    assert error(q) <= rounding(dtype)
    assert error(masked_columns(w * 1e18, v)) <= rounding(dtype)


@every("dtype", DTYPES)
def test_the_next_start_is_what_a_move_adds(dtype):
    for k in (1, 3):
        _, v, d = move((12, 12), k, dtype, 1.0)
        with WithoutReading(), Unread():
            start = next_directions(v, d)
        assert error(start) <= rounding(dtype)
        assert (v.mH @ start).abs().max() <= 1e-3 * k
        both = torch.linalg.qr(torch.cat([double(v), double(start)], dim=-1))[0]
        assert (double(d) - both @ (both.mH @ double(d))).abs().max() <= 1e-4
    assert error(masked_next(v, torch.zeros_like(d))) <= rounding(dtype)


@every("dtype", DTYPES)
@every(("shape", "k"), [((12, 12), 1), ((12, 12), 3), ((6, 20), 2), ((2, 9, 9), 2)])
@pytest.mark.parametrize("formed", [True, False])
def test_directions_are_those_of_the_ordinary_path(dtype, shape, k, formed, monkeypatch):
    if not formed:
        monkeypatch.setattr("riemann_unn.linalg.step.tangent._FORMED", 0)
    x, g = point(*shape, dtype=dtype), gaussian(*shape, dtype=dtype, seed=1)
    start = point(*shape[:-2], shape[-1], k, dtype=dtype, seed=2).mH
    for rows in (start, None):
        found = []
        for context in (WithoutReading(), torch.no_grad()):
            with context:
                found.append(
                    iterate(x, g, rank=k, start=rows, draws=gaussian_draws(x, generator(4)))
                )
        (v, z, _), (u, _, _) = found
        assert error(v) <= rounding(dtype)
        # Of several, a hundred thousandth of the columns before is mixed in.
        limit = 1e-3 if k > 1 else 2e-4 if dtype in SINGLE else 1e-9
        assert torch.linalg.matrix_norm(v @ v.mH - u @ u.mH).amax() <= limit
        assert (z - tangent_times(x, g, v)).abs().max() <= rounding(dtype, 100)
    with WithoutReading(), Unread():
        v, z, xv = iterate(x, g, rank=k, start=start, draws=lambda k, n: (torch.ones(k, n), 1.0))
        xv = x @ v if xv is None else xv
        tangent_coordinates(x, tangent_gradient(x, v, z, xv), v, xv)
    zero = torch.zeros_like(g)
    with WithoutReading():
        v, z, _ = iterate(x, zero, rank=k, start=start, draws=gaussian_draws(x, generator(4)))
    assert error(v) <= rounding(dtype) and z.abs().max() == 0


@every("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9, 9), (5, 30), (3, 20, 20), (90, 90), (1, 4)])
def test_rows_in_turn_mend_as_newton_schulz_does(dtype, shape):
    exact = point(*shape, dtype=torch.complex128 if dtype in COMPLEX else torch.float64)
    noise = gaussian(*shape, dtype=exact.dtype, seed=1)
    scale = 1e-3 if dtype in SINGLE else 1e-5
    rough = (exact + scale * noise / shape[-1] ** 0.5).to(dtype)
    x, before, p = rough.clone(), error(rough), shape[-2]
    with WithoutReading(), Unread():
        index, correction, estimate = rows_due(x, torch.tensor(0), all_rows=True)
        x.sub_(correction)
    assert index is None
    sizes = torch.linalg.matrix_norm(rough @ rough.mH - torch.eye(p, dtype=dtype)) / p**0.5
    assert torch.allclose(estimate, sizes.to(estimate.dtype), rtol=1e-2)
    mended = rough - 0.5 * (rough @ rough.mH - torch.eye(p, dtype=dtype)) @ rough
    assert (x - mended).abs().max() <= rounding(dtype, p)
    assert error(x) <= max(10 * before**2, rounding(dtype))
    # Row by row, with the counts on either side.
    for step in range(2 * p + 2):
        count = torch.tensor(step) if step % 2 else step
        index, correction, estimate = rows_due(rough, count, all_rows=False)
        index = torch.arange(p) if index is None else index
        assert len(set(index.tolist())) == len(index) <= p
        rough.index_add_(-2, index, correction, alpha=-1)
    assert error(rough) <= max(10 * before**2, rounding(dtype, factor=2))
    assert (
        rows_due(torch.full(shape, float("nan"), dtype=dtype), 0, all_rows=False)[2].isnan().all()
    )


def test_the_ordinary_path_is_seen_to_read():
    for k in (1, 3):
        x, v, d = move((12, 12), k, torch.float32, 1.0)
        with pytest.raises(ReadError), Unread():
            rotate_low_rank_lazily_(x, v, d, None, phi="exp", max_angle=None, by_planes=True)
    with pytest.raises(ReadError), Unread():
        rotate_whole_(x, skew(x), phi="polar")
    with pytest.raises(ReadError), Unread():
        _ = x[x > 0]
    for read in (torch.Tensor.tolist, torch.Tensor.item, bool, float):
        with pytest.raises(ReadError), Unread():
            read(x[0, 0])


def test_a_gram_matrix_of_turns_is_in_double_precision():
    _, v, d = move((12, 12), 3, torch.float32, 1.0)
    basis, right, small = rotation_by_gram(v, d, "exp", None)
    assert basis.dtype == right.dtype == small.dtype == torch.float64
    k = generator_of(v, d)
    assert (basis @ right + torch.eye(12) - torch.linalg.matrix_exp(k)).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize(("shape", "k"), CASES[:4])
def test_where_there_are_no_numbers_none_is_asked_for(dtype, shape, k):
    *batch, p, n = shape
    with torch.device("meta"):
        x, g = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
        start = torch.empty(*batch, k, n, dtype=dtype)
        count = torch.empty((), dtype=torch.int64)
        v, z, xv = iterate(
            x, g, rank=k, start=start, draws=lambda k, n: (torch.empty(k, n) * count, 1.0)
        )
        known = x @ v if xv is None else xv
        move = tangent_coordinates(x, tangent_gradient(x, v, z, known), v, known)
        for phi in PHIS:
            _, added = rotate_low_rank_lazily_(
                x, v, move, xv, phi=phi, max_angle=0.1, by_planes=True
            )
            if p == n:
                rotate_whole_(x, skew(g), phi=phi, max_angle=0.1)
        correction, estimate = rows_due(x, count, all_rows=False)[1:]
        for found in (added, next_directions(v, z), correction, estimate):
            assert found.is_meta
    with pytest.raises(RuntimeError, match="meta"):
        bool(estimate.sum() > 0)
