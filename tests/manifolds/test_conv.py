"""Manifolds of convolution kernels against the dense block-circulant operator."""

import copy

import geoopt
import pytest
import torch
from torch import nn

import riemann_unn as ru
from riemann_unn.errors import ManifoldError
from riemann_unn.linalg import conv_matrix, conv_polar
from tests.support import assert_on_manifold, gaussian, generator, slope

REAL = [
    (ru.OrthogonalConv(1), (3, 3, 6)),
    (ru.OrthogonalConv(2), (3, 5, 4, 5)),
    (ru.OrthogonalConv(2), (5, 3, 4, 4)),
    (ru.OrthogonalConv(3), (2, 2, 2, 3, 4)),
]
COMPLEX = [(ru.UnitaryConv(1), (4, 3, 5)), (ru.UnitaryConv(2), (2, 4, 3, 4))]
CASES = [(m, s, torch.float64) for m, s in REAL] + [(m, s, torch.complex128) for m, s in COMPLEX]
everywhere = pytest.mark.parametrize(("manifold", "shape", "dtype"), CASES, ids=str)


def random(manifold, shape, dtype, seed=0):
    x = manifold.random(*shape, dtype=dtype, generator=generator(seed))
    return x.as_subclass(torch.Tensor)


def tall(x):
    """The dense operator, or its adjoint if it is wide."""
    m = conv_matrix(x)
    return m if m.shape[0] >= m.shape[1] else m.mH


@everywhere
def test_view_is_linear_conformal_and_invertible(manifold, shape, dtype):
    x, y = gaussian(*shape, dtype=dtype), gaussian(*shape, dtype=dtype, seed=1)
    m, n = manifold.to_matrices(x), manifold.to_matrices(y)
    assert m.is_complex() and m.shape[-2] >= m.shape[-1]
    torch.testing.assert_close(manifold.from_matrices(m, x.shape), x)
    torch.testing.assert_close(manifold.to_matrices(x + 2 * y), m + 2 * n)
    sites = x[0, 0].numel()
    weight = torch.ones(m.shape[0], 1, 1)
    if not dtype.is_complex:  # one of each conjugate pair stands for both
        weight[(m.imag.abs() > 0).any(-1).any(-1)] = 2
    inner = (m.conj() * n * weight).sum().real
    torch.testing.assert_close(inner, sites * (x.conj() * y).sum().real)


@everywhere
def test_points_are_semi_unitary_operators(manifold, shape, dtype):
    for x in (
        random(manifold, shape, dtype),
        manifold.origin(*shape, dtype=dtype),
        manifold.projx(gaussian(*shape, dtype=dtype)),
    ):
        m = tall(x)
        assert x.dtype == dtype and x.shape == shape
        assert (m.mH @ m - torch.eye(m.shape[1], dtype=dtype)).abs().max() < 1e-12
        assert manifold.check_point_on_manifold(x)
        assert_on_manifold(x, manifold)
    assert not manifold.check_point_on_manifold(gaussian(*shape, dtype=dtype))
    assert not manifold.check_point_on_manifold(1.01 * random(manifold, shape, dtype))


@everywhere
def test_error_is_that_of_the_worst_frequency(manifold, shape, dtype):
    x = random(manifold, shape, dtype) + 1e-3 * gaussian(*shape, dtype=dtype)
    hat = torch.fft.fftn(x, dim=tuple(range(2, x.ndim))).flatten(2).movedim(-1, 0)
    hat = hat if shape[0] >= shape[1] else hat.mH
    p = hat.shape[-1]
    norms = torch.linalg.matrix_norm(hat.mH @ hat - torch.eye(p, dtype=hat.dtype)) / p**0.5
    torch.testing.assert_close(ru.orthogonality_error(x, manifold), norms.max())


@everywhere
def test_projections_are_those_of_the_operator(manifold, shape, dtype):
    x, v = random(manifold, shape, dtype), gaussian(*shape, dtype=dtype, seed=1)
    m, d = tall(x), tall(v)
    inside = m.mH @ d
    torch.testing.assert_close(
        tall(manifold.proju(x, v)), d - m @ (0.5 * (inside + inside.mH)), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(manifold.projx(v), conv_polar(v), atol=1e-12, rtol=0)
    u = manifold.proju(x, v)
    assert manifold.check_vector_on_tangent(x, u)
    assert not manifold.check_vector_on_tangent(x, v)
    assert manifold.inner(x, u).shape == ()
    torch.testing.assert_close(manifold.inner(x, u, v), manifold.inner(x, u))


@everywhere
@pytest.mark.parametrize("move", ["retr", "expmap"])
def test_retractions_stay_and_agree_to_first_order(manifold, shape, dtype, move):
    x = random(manifold, shape, dtype)
    u = manifold.proju(x, gaussian(*shape, dtype=dtype, seed=1))
    u = u / u.abs().max()
    sizes = [10.0**-i for i in (1.5, 2.0, 2.5, 3.0)]
    gaps = []
    for t in sizes:
        y = getattr(manifold, move)(x, t * u)
        assert_on_manifold(y, manifold)
        assert y.dtype == dtype
        gaps.append(float((y - x - t * u).abs().max()))
    assert slope(gaps, sizes) == pytest.approx(2.0, abs=0.1)


@everywhere
def test_transport_is_an_isometry(manifold, shape, dtype):
    x = random(manifold, shape, dtype)
    u, v, w = (manifold.proju(x, gaussian(*shape, dtype=dtype, seed=i)) for i in (1, 2, 3))
    y, moved = manifold.retr_transp(x, u, v)
    other = manifold.transp_follow_retr(x, u, w)
    torch.testing.assert_close(manifold.inner(y, moved, other), manifold.inner(x, v, w))
    assert manifold.check_vector_on_tangent(y, moved)


def test_batches_of_kernels_are_independent():
    manifold = ru.OrthogonalConv(1)
    x = gaussian(4, 3, 2, 6)
    assert manifold.to_matrices(x).shape == (4, 4, 3, 2)
    torch.testing.assert_close(manifold.projx(x)[2], manifold.projx(x[2]))
    assert manifold.orthogonality_error(x).shape == (4, 4)


def test_bfloat16_kernels_can_be_checked():
    x = random(ru.OrthogonalConv(2), (4, 4, 4, 4), torch.float32).bfloat16()
    assert 1e-4 < float(ru.orthogonality_error(x, ru.OrthogonalConv(2))) < 2e-2


def test_equality_printing_and_copies():
    assert repr(ru.OrthogonalConv(3)) == "OrthogonalConv(3)"
    assert ru.OrthogonalConv(2) == ru.OrthogonalConv() != ru.OrthogonalConv(1)
    assert ru.OrthogonalConv(2) != ru.UnitaryConv(2)
    layer = nn.ParameterDict({"k": nn.Parameter(random(ru.OrthogonalConv(1), (2, 2, 4), None))})
    ru.tag_(layer["k"], ru.OrthogonalConv(1))
    assert ru.manifold_of(copy.deepcopy(layer)["k"]) == ru.OrthogonalConv(1)
    assert isinstance(ru.UnitaryConv(2), geoopt.Manifold)
    assert ru.UnitaryConv(1).random(2, 2, 4).dtype == torch.complex64


@pytest.mark.parametrize(
    ("manifold", "shape", "dtype", "message"),
    [
        (ru.OrthogonalConv(2), (3, 3, 8), torch.float32, "2 dimensions in size"),
        (ru.OrthogonalConv(2), (3, 3, 0, 8), torch.float32, "no sites"),
        (ru.OrthogonalConv(1), (3, 3, 8), torch.complex64, "UnitaryConv takes complex"),
        (ru.OrthogonalConv(1), (3, 3, 8), torch.int64, "floating point"),
        (ru.UnitaryConv(1), (3, 3, 8), torch.float32, "OrthogonalConv takes real"),
    ],
)
def test_tensors_that_cannot_be_kernels_are_refused(manifold, shape, dtype, message):
    with pytest.raises(ManifoldError, match=message):
        manifold.random(*shape, dtype=dtype)
    if dtype != torch.int64:
        with pytest.raises(ManifoldError, match=message):
            ru.tag_(nn.Parameter(torch.zeros(shape, dtype=dtype)), manifold)


@pytest.mark.parametrize("ndim", [0, -1, 1.5, True, "2"])
def test_dimensions_must_be_a_positive_integer(ndim):
    with pytest.raises(ManifoldError, match="lattice dimensions"):
        ru.OrthogonalConv(ndim)
