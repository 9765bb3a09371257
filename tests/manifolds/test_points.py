"""Points: random ones, origins, checks; manifolds as values; and what is refused."""

import contextlib
import copy
import pickle

import geoopt
import pytest
import torch
from torch import Tensor

import riemann_unn as ru
from tests.manifolds.grid import EMPTY, SHAPES, gauss, grid, off, point, tol
from tests.support import generator

DRAWS = 6000
HAAR = [(ru.Orthogonal(), (3, 3)), (ru.Unitary(), (3, 3)), (ru.Stiefel(), (4, 2))]
HAAR += [(ru.Stiefel(), (2, 4))]
DOUBLE = [torch.float64, torch.complex128]


# Random points ----------------------------------------------------------------


@grid(SHAPES + EMPTY)
def test_random_points(manifold, shape, dtype):
    x = manifold.random(*shape, dtype=dtype, generator=generator(3))
    assert x.shape == shape and x.dtype == dtype and x.is_contiguous() and not x.is_conj()
    assert x.manifold is manifold and manifold.has_det(x)
    assert x.numel() == 0 or off(manifold, x) <= tol(dtype, shape, 4)
    state = torch.get_rng_state()
    assert torch.equal(x, manifold.random(shape, dtype=dtype, generator=generator(3)))
    other = manifold.random(shape, dtype=dtype, generator=generator(4))
    assert torch.equal(state, torch.get_rng_state())
    assert x.numel() < 2 or not torch.equal(x, other)


def moments(x: Tensor) -> dict[str, float]:
    """How far a sample of matrices is from Haar's moments, in standard deviations."""
    n, p = x.shape[-2:]
    top, field = max(n, p), 2 if x.is_complex() else 1
    entry, squared = x[..., 0, 0], x[..., 0, 0].abs() ** 2
    fourth = 3 / (top * (top + 2)) if field == 1 else 2 / (top * (top + 1))
    values = {
        "mean": entry.real * (top * field) ** 0.5,
        "square": (squared - 1 / top) / (fourth - 1 / top**2) ** 0.5,
        "pair": (x[..., 0, 0] * x[..., 1, 1].conj()).real * top,
    }
    if n == p:
        values["trace"] = x.diagonal(dim1=-2, dim2=-1).sum(-1).abs() ** 2 - 1
    return {name: float(v.mean().abs()) * len(x) ** 0.5 for name, v in values.items()}


@grid(HAAR, DOUBLE)
def test_random_points_are_uniform(manifold, shape, dtype):
    x = manifold.random(DRAWS, *shape, dtype=dtype, generator=generator(0)).as_subclass(Tensor)
    found = moments(x)
    assert max(found.values()) < 5, found


def test_moments_find_the_bias_of_plain_qr():
    q = torch.linalg.qr(gauss((DRAWS, 3, 3), torch.float64, 0))[0]
    assert max(moments(q).values()) > 50


@pytest.mark.parametrize("det", [1, -1, None])
@pytest.mark.parametrize("n", [1, 4, 5])
def test_signs_of_random_determinants(det, n):
    x = ru.Orthogonal(det=det).random(200, n, n, dtype=torch.float64, generator=generator(0))
    signs = set(torch.linalg.det(x.as_subclass(Tensor)).round().int().tolist())
    assert signs == ({1, -1} if det is None else {det})


def test_special_random_points_are_uniform_too():
    m = ru.Orthogonal(det=1)
    x = m.random(DRAWS, 3, 3, dtype=torch.float64, generator=generator(0)).as_subclass(Tensor)
    trace = x.diagonal(dim1=-2, dim2=-1).sum(-1)  # rotations: mean of tr is 0, of its square 1
    assert abs(float(trace.mean())) < 5 / DRAWS**0.5
    assert abs(float((trace**2).mean()) - 1) < 10 / DRAWS**0.5
    assert float(x.mean(0).abs().max()) < 5 / DRAWS**0.5


def test_global_generator_is_the_default():
    draws = []
    with torch.random.fork_rng():
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            draws.append(ru.Orthogonal().random(3, 3))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_default_dtypes_follow_torch():
    found = []
    for dtype in (torch.float32, torch.float64):
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(dtype)
            for m in (ru.Orthogonal(), ru.Stiefel(), ru.Unitary()):
                found.append((m.random(2, 2).dtype, m.origin(2, 2).dtype))
        finally:
            torch.set_default_dtype(before)
    single, double = [torch.float32] * 2 + [torch.complex64], [torch.float64] * 2 + DOUBLE[1:]
    assert found == [(d, d) for d in single + double]


@grid()
def test_origin_is_the_identity(manifold, shape, dtype):
    x = manifold.origin(*shape, dtype=dtype)
    assert x.manifold is manifold and x.is_contiguous() and x.dtype == dtype
    assert torch.equal(x, manifold.origin(shape, dtype=dtype, seed=0))
    assert manifold.check_point_on_manifold(x) and off(manifold, x) == 0
    m = manifold.to_matrices(x.as_subclass(Tensor)).clone()
    assert torch.equal(m[..., 0, 0].real, torch.full(m.shape[:-2], manifold.det or 1).to(m.real))
    m[..., 0, 0] = 1
    assert torch.equal(m, torch.eye(*m.shape[-2:], dtype=dtype).expand_as(m))


# Checks -----------------------------------------------------------------------


@grid()
def test_check_of_points_knows_the_precision(manifold, shape, dtype):
    x = point(manifold, shape, dtype)
    fine, coarse = (1e-10, 1e-8) if dtype in DOUBLE else (1e-6, 1e-4)
    assert manifold.check_point_on_manifold(x) and manifold.check_point_on_manifold(x * (1 + fine))
    ok, reason = manifold.check_point_on_manifold(x * (1 + coarse), explain=True)
    assert not ok and "X^H X - I" in reason
    assert manifold.check_point_on_manifold(x * (1 + coarse), atol=1e-3)
    for bad in (2.0, float("nan")):  # one entry, in the last matrix of a batch
        x.view(-1)[-1] = bad
        assert not manifold.check_point_on_manifold(x)
    with pytest.raises(ValueError, match=manifold.name):
        manifold.assert_check_point_on_manifold(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_held_to_what_they_can_hold(dtype):
    x = point(ru.Orthogonal(), (8, 8), torch.float64)
    assert ru.Orthogonal().check_point_on_manifold(x.to(dtype))
    assert not ru.Orthogonal().check_point_on_manifold((1.1 * x).to(dtype))


@pytest.mark.parametrize("det", [1, -1])
def test_check_of_points_knows_the_determinant(det):
    manifold, other = ru.Orthogonal(det=det), ru.Orthogonal(det=-det)
    x = manifold.random(3, 4, 4, dtype=torch.float64, generator=generator(0)).as_subclass(Tensor)
    assert manifold.check_point_on_manifold(x) and ru.Orthogonal().check_point_on_manifold(x)
    assert not manifold.has_det(torch.cat([x[:2], -x[2:, [1, 0, 2, 3]]]))  # one of three is wrong
    ok, reason = other.check_point_on_manifold(x, explain=True)
    assert not ok and f"determinant is not {-det:+d}" in reason
    assert other.has_det(other.projx(x)) and other.check_point_on_manifold(other.projx(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_determinants_of_halves_are_known(dtype):
    x = ru.Orthogonal(det=-1).random(5, 5, generator=generator(0)).as_subclass(Tensor).to(dtype)
    assert ru.Orthogonal(det=-1).has_det(x) and not ru.Orthogonal(det=1).has_det(x)
    p = ru.tag_(torch.nn.Parameter(x), ru.Orthogonal(det=-1))
    ru.optim.ProjUNNT([p], lr=0.1)


@pytest.mark.parametrize("call", ["random", "origin"])
@pytest.mark.parametrize(
    ("manifold", "shape", "dtype", "words"),
    [
        (ru.Orthogonal(), (3, 4), torch.float32, "square"),
        (ru.Orthogonal(), (3,), torch.float32, "square"),
        (ru.Unitary(), (2, 3), torch.complex64, "square"),
        (ru.Stiefel(), (3,), torch.float32, "two or more dimensions"),
        (ru.Stiefel(flatten=True), (3,), torch.float32, "two or more dimensions"),
        (ru.Orthogonal(), (3, 3), torch.complex64, r"Unitary\(\)"),
        (ru.Unitary(), (3, 3), torch.float64, r"Orthogonal\(\)"),
        (ru.Orthogonal(), (3, 3), torch.int64, "int64"),
        (ru.Unitary(), (3, 3), torch.int64, "int64"),
        (ru.Stiefel(), (4, 3), torch.bool, "bool"),
    ],
)
def test_shapes_and_dtypes_that_are_refused(manifold, shape, dtype, words, call):
    with pytest.raises(ru.ManifoldError, match=words) as raised:
        getattr(manifold, call)(*shape, dtype=dtype)
    assert repr(manifold) in str(raised.value) and str(shape) in str(raised.value)
    ok, reason = manifold.check_point_on_manifold(torch.ones(shape, dtype=dtype), explain=True)
    assert not ok and reason


def test_geoopt_parameters_of_a_wrong_shape_are_refused():
    with pytest.raises(ValueError, match="square"):
        geoopt.ManifoldParameter(torch.ones(3, 4), manifold=ru.Orthogonal())


def test_estimated_error_is_near_the_exact_one():
    m = ru.Stiefel()
    x = m.random(600, 520, dtype=torch.float64, generator=generator(0))
    x = x.as_subclass(Tensor) + 1e-4 * gauss((600, 520), torch.float64, 1)
    exact = float(m.orthogonality_error(x))
    assert exact == pytest.approx(off(m, x), rel=1e-9)
    assert m.estimated_error(x) == pytest.approx(exact, rel=0.1)
    assert m.estimated_error(x.mT) == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("det", [0, 2, -2, 0.5, "1"])
def test_bad_determinants_are_refused(det):
    with pytest.raises(ru.ManifoldError, match=r"\+1, -1 or None"):
        ru.Orthogonal(det=det)


def test_float_determinant_is_refused_or_means_the_integer():
    with contextlib.suppress(ru.ManifoldError):
        assert repr(ru.Orthogonal(det=1.0)) == "Orthogonal(det=+1)"


def test_manifolds_are_values():
    every = [ru.Orthogonal(), ru.Orthogonal(det=1), ru.Orthogonal(det=-1), ru.Unitary()]
    every += [ru.Stiefel(), ru.Stiefel(flatten=True), ru.Stiefel(flatten=True, blocks=2)]
    every += [ru.Orthogonal(blocks=4), ru.Orthogonal(blocks=4, det=1), ru.Unitary(blocks=(1, 4))]
    for i, m in enumerate(every):
        for c in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), eval(repr(m), vars(ru))):
            assert c == m and hash(c) == hash(m) and repr(c) == repr(m) and c is not m
        assert [m == n for n in every] == [i == j for j in range(len(every))]
        assert m != repr(m)
    assert len(set(every + copy.deepcopy(every))) == len(every)
