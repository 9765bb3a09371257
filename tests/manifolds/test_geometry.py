"""Geometry: projections, retractions and transports against dense double-precision formulas."""

import math

import geoopt
import numpy as np
import pytest
import torch
from torch import Tensor

import riemann_unn as ru
from tests.manifolds.grid import (
    CURVED,
    CURVED_DOUBLE,
    DOUBLE,
    EMPTY,
    SHAPES,
    gap,
    gauss,
    grid,
    numpy_matrices,
    off,
    order,
    point,
    real_dot,
    tangent,
    tol,
)

# The matrix view ----------------------------------------------------------


@grid(SHAPES + EMPTY)
def test_view_is_an_isometry_and_its_inverse_is_exact(manifold, shape, dtype):
    x, y = gauss(shape, dtype, 1), gauss(shape, dtype, 2)
    m = manifold.to_matrices(x)
    assert m.shape[-2] >= m.shape[-1] and m.numel() == x.numel()
    assert torch.equal(manifold.from_matrices(m, x.shape), x)
    assert torch.equal(manifold.to_matrices(x + 2 * y), m + 2 * manifold.to_matrices(y))
    torch.testing.assert_close(real_dot(m, manifold.to_matrices(y)), real_dot(x, y))


@grid()
def test_view_shares_memory(manifold, shape, dtype):
    x = gauss(shape, dtype, 1)
    manifold.to_matrices(x).fill_(2)
    assert torch.equal(x, torch.full(shape, 2, dtype=dtype))


# Projections and metric -----------------------------------------------------


@grid()
def test_projx_is_the_nearest_point(manifold, shape, dtype):
    x = gauss(shape, dtype, 3)
    got = manifold.projx(x)
    u, _, vh = np.linalg.svd(numpy_matrices(manifold, x), full_matrices=False)
    if manifold.det is not None:
        u[..., -1] *= (np.linalg.det(u @ vh).real * manifold.det)[..., None]
    want = manifold.from_matrices(torch.from_numpy(u @ vh), x.shape)
    assert got.dtype == dtype and got.shape == x.shape
    assert gap(got, want) <= tol(dtype, shape, 100)
    assert off(manifold, got) <= tol(dtype, shape, 4)
    assert gap(manifold.projx(got), got) <= tol(dtype, shape, 4)
    other = manifold.projx(got + 0.1 * gauss(shape, dtype, 4))
    if gap(other, got) > 1e-3:  # O(1) has no other point near by
        assert torch.linalg.vector_norm(x - other) > torch.linalg.vector_norm(x - got)


@grid()
def test_proju_is_the_orthogonal_projection(manifold, shape, dtype):
    x, a, b = point(manifold, shape, dtype), gauss(shape, dtype, 1), gauss(shape, dtype, 2)
    pa, bound = manifold.proju(x, a), tol(dtype, shape)
    assert gap(manifold.proju(x, pa), pa) <= bound
    assert abs(float(real_dot(pa, b) - real_dot(a, manifold.proju(x, b)))) <= bound
    assert manifold.check_vector_on_tangent(x, pa)
    v = tangent(manifold, x, 5)
    assert gap(manifold.proju(x, v), v) <= bound  # none of the space is lost
    assert gap(a, pa) > 1e-2
    ok, reason = manifold.check_vector_on_tangent(x, a, explain=True)
    assert not ok and "sym" in reason


@grid()
def test_riemannian_gradient_represents_the_differential(manifold, shape, dtype):
    x, g = point(manifold, shape, dtype), gauss(shape, dtype, 1)
    v = tangent(manifold, x, 2)
    inner = manifold.inner(x, manifold.egrad2rgrad(x, g), v)
    kept = manifold.inner(x, v, keepdim=True)
    assert inner.dtype == dtype.to_real()
    assert inner.shape == (() if getattr(manifold, "flatten", False) else shape[:-2])
    assert kept.ndim == x.ndim and torch.equal(kept.flatten(), manifold.inner(x, v, v).flatten())
    assert abs(float(inner.sum() - real_dot(g, v))) <= tol(dtype, shape)


# Retraction and geodesic ----------------------------------------------------


@pytest.mark.parametrize("size", [1.0, 1e3, 1e6, 1e12])
@grid()
def test_moves_stay_on_the_manifold(manifold, shape, dtype, size):
    x = point(manifold, shape, dtype)
    u = tangent(manifold, x, 2, size)
    before = x.clone(), u.clone()
    moved = [manifold.retr(x, u), manifold.expmap(x, u), manifold.retr_transp(x, u, u)[0]]
    errors = [off(manifold, y) for y in moved]
    assert max(errors) <= tol(dtype, shape), errors
    assert all(y.dtype == dtype and y.shape == x.shape and manifold.has_det(y) for y in moved)
    assert torch.equal(x, before[0]) and torch.equal(u, before[1])


@CURVED_DOUBLE
@pytest.mark.parametrize("name", ["retr", "expmap"])
def test_moves_are_first_order(manifold, shape, dtype, name):
    x = point(manifold, shape, dtype)
    u, move = tangent(manifold, x, 2), getattr(manifold, name)
    orders = [order(lambda t, c=c: move(x, c * t * u) - (x + t * u)) for c in (1, -1, 2)]
    assert orders[0] == pytest.approx(2, abs=0.1)
    assert orders[1:] == pytest.approx([1, 1], abs=0.1)  # a wrong sign or step would be seen


@pytest.mark.parametrize("shape", [(5, 5), (9, 3)])
def test_order_check_finds_the_fault_of_geoopt(shape):
    theirs, ours = geoopt.CanonicalStiefel(), ru.Stiefel()
    x = point(ours, shape, torch.float64)
    u = tangent(ours, x, 2)
    orders = [order(lambda t, m=m: m.retr(x, t * u) - (x + t * u)) for m in (theirs, ours)]
    assert orders == pytest.approx([1, 2], abs=0.1)


@CURVED_DOUBLE
def test_order_of_the_retraction_against_the_geodesic(manifold, shape, dtype):
    x = point(manifold, shape, dtype)
    u = tangent(manifold, x, 2)
    m, v = manifold.to_matrices(x), manifold.to_matrices(u)
    thin = m.shape[-1] < m.shape[-2] and (m.shape[-1] > 1 or dtype.is_complex)
    found = order(lambda t: manifold.retr(x, t * u) - manifold.expmap(x, t * u))
    assert found == pytest.approx(2 if thin else 3, abs=0.1)
    if thin:  # what costs an order is the turn inside the columns' span
        u = manifold.from_matrices(v - m @ (m.mH @ v), x.shape)
        found = order(lambda t: manifold.retr(x, t * u) - manifold.expmap(x, t * u))
        assert found == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("size", [1e-6, 1.0, 10.0])
@CURVED
def test_moves_against_dense_formulas(manifold, shape, dtype, size):
    x = point(manifold, shape, dtype)
    u = tangent(manifold, x, 2, size)
    m, v = (manifold.to_matrices(z).to(torch.complex128) for z in (x, u))
    eye = torch.eye(m.shape[-2], dtype=m.dtype)
    geodesic = torch.linalg.matrix_exp(v @ m.mH - m @ v.mH) @ m
    geodesic = geodesic @ torch.linalg.matrix_exp(-m.mH @ v)
    half = (eye - 0.5 * m @ m.mH) @ v @ m.mH
    half = 0.5 * (half - half.mH)
    rotated = torch.linalg.solve(eye - half, (eye + half) @ m)
    bound = max(1, size) * tol(dtype, shape, 16)
    for got, want in ((manifold.expmap(x, u), geodesic), (manifold.retr(x, u), rotated)):
        error = gap(manifold.to_matrices(got), want)
        assert error <= bound
        assert error <= 1e-12 or dtype not in DOUBLE


@pytest.mark.parametrize("dtype", DOUBLE)
def test_geodesic_of_the_sphere_is_the_great_circle(dtype):
    sphere = ru.Stiefel()
    x = point(sphere, (6, 1), dtype)
    u = tangent(sphere, x, 2, 1.7)
    want = x * math.cos(1.7) + u * (math.sin(1.7) / 1.7)
    if dtype == torch.float64:
        assert gap(sphere.expmap(x, u), want) <= 1e-14
    v = sphere.proju(x, u - x * (x.mH @ u))  # complex: without turning the phase
    length = float(v.norm())
    want = x * math.cos(length) + v * (math.sin(length) / length)
    assert gap(sphere.expmap(x, v), want) <= 1e-14


# Transport ------------------------------------------------------------------


@CURVED
def test_transport_is_isometric_tangent_and_reversible(manifold, shape, dtype):
    x = point(manifold, shape, dtype)
    u, v, w = (tangent(manifold, x, seed) for seed in (2, 3, 4))
    y, tu = manifold.retr_transp(x, u, u)
    tv, tw = (manifold.transp_follow_retr(x, u, z) for z in (v, w))
    bound = tol(dtype, shape)
    assert gap(y, manifold.retr(x, u)) <= bound
    assert manifold.check_vector_on_tangent(y, tv)
    for a, b, ta, tb in ((v, w, tv, tw), (u, v, tu, tv)):
        assert gap(manifold.inner(y, ta, tb), manifold.inner(x, a, b)) <= bound
    back, returned = manifold.retr_transp(y, -tu, tv)
    assert gap(back, x) <= bound
    assert gap(returned, v) <= bound
    if x.numel() > 1:
        assert gap(manifold.retr(y, tu), x) > 1e-2  # forward is not back


def test_projection_as_transport_would_be_neither_isometric_nor_reversible():
    m = ru.Stiefel()
    x = point(m, (9, 3), torch.float64)
    u = tangent(m, x, 2)
    y = m.retr(x, u)
    carried = m.transp(x, y, u)
    assert gap(m.inner(y, carried), m.inner(x, u)) > 1e-3
    assert gap(m.retr(y, -carried), x) > 1e-3


@CURVED
def test_other_transports_are_projections_at_the_end(manifold, shape, dtype):
    x = point(manifold, shape, dtype)
    u, v = tangent(manifold, x, 2), tangent(manifold, x, 3)
    y, w = manifold.expmap_transp(x, u, v)
    assert torch.equal(y, manifold.expmap(x, u))
    assert torch.equal(w, manifold.transp(x, y, v))
    assert torch.equal(w, manifold.transp_follow_expmap(x, u, v))
    normal = v - w
    assert manifold.check_vector_on_tangent(y, w)
    assert float(manifold.inner(y, normal, w).abs().max()) <= tol(dtype, shape)


# Edges ----------------------------------------------------------------------


@grid(EMPTY)
def test_empty_tensors_pass_through(manifold, shape, dtype):
    x = manifold.random(shape, dtype=dtype).as_subclass(Tensor)
    results = [x, manifold.origin(*shape, dtype=dtype), manifold.projx(x), manifold.proju(x, x)]
    results += [manifold.retr(x, x), manifold.expmap(x, x), *manifold.retr_transp(x, x, x)]
    assert all(r.shape == shape and r.dtype == dtype for r in results)
    assert manifold.estimated_error(x) == 0
    assert manifold.check_point_on_manifold(x)
    assert manifold.check_vector_on_tangent(x, x)


@grid()
def test_strides_do_not_matter(manifold, shape, dtype):
    x = point(manifold, shape, dtype)
    u = tangent(manifold, x, 2)
    xs, us = (z.mT.contiguous().mT for z in (x, u))  # equal values, other strides
    if dtype.is_complex:
        xs, us = xs.conj().resolve_conj().conj(), us.conj().resolve_conj().conj()  # lazy
    bound = tol(dtype, shape)
    for name in ("retr", "expmap", "proju", "transp_follow_retr"):
        extra = (u,) if name == "transp_follow_retr" else ()
        a, b = getattr(manifold, name)(x, u, *extra), getattr(manifold, name)(xs, us, *extra)
        assert gap(a, b) <= bound
    assert gap(manifold.projx(x), manifold.projx(xs)) <= bound
