"""Sketches: exact on low rank, scale-free, reproducible, and close to the best elsewhere."""

from __future__ import annotations

import pytest
import torch

from riemann_unn.linalg import sketch
from riemann_unn.linalg.step.sketch import orthonormal_columns
from tests.support import DTYPES, gaussian, generator, low_rank, rounding

METHODS = ["lsi", "column", "svd"]


def product(factors):
    return factors[0] @ factors[1].mH


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 3])
def test_exact_on_matrices_of_their_rank(method, dtype, k):
    delta = low_rank(17, 11, k, dtype=dtype)
    for seed in range(20):
        a, b = sketch(delta, rank=k, method=method, generator=generator(seed))
        assert a.shape == (17, k) and b.shape == (11, k)
        assert (a @ b.mH - delta).abs().max() <= rounding(dtype, 17, factor=200)
    # Negative control: one direction too few must miss by the smallest singular value.
    if k > 1:
        a, b = sketch(delta, rank=k - 1, method=method, generator=generator())
        assert torch.linalg.matrix_norm(a @ b.mH - delta) > 0.3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-30, 1e-7, 1e30])
def test_scale_free(method, scale):
    delta = gaussian(12, 9, dtype=torch.float32)
    plain = product(sketch(delta, rank=2, method=method, generator=generator()))
    scaled = product(sketch(delta * scale, rank=2, method=method, generator=generator()))
    assert (scaled / scale - plain).abs().max() <= rounding(torch.float32, 12, factor=50)


@pytest.mark.parametrize("method", METHODS)
def test_batches_equal_single_matrices(method):
    deltas = gaussian(3, 10, 8)
    batch = product(sketch(deltas, rank=2, method=method, generator=generator()))
    for one, delta in zip(batch, deltas, strict=True):
        alone = product(sketch(delta, rank=2, method=method, generator=generator()))
        assert (one - alone).abs().max() < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_complex_with_zero_imaginary_part_equals_real(method):
    delta = gaussian(10, 8)
    real = product(sketch(delta, rank=2, method=method, generator=generator()))
    complex_ = product(
        sketch(delta.to(torch.complex128), rank=2, method=method, generator=generator())
    )
    assert (complex_ - real).abs().max() < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_zero_and_degenerate_matrices(method):
    zero = torch.zeros(6, 5)
    a, b = sketch(zero, rank=2, method=method, generator=generator())
    assert torch.equal(a @ b.mH, zero)
    one_column = torch.zeros(6, 5)
    one_column[:, 3] = torch.arange(6.0)
    for rank in (1, 2, 3):
        factors = sketch(one_column, rank=rank, method=method, generator=generator())
        assert (product(factors) - one_column).abs().max() < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_full_rank_is_the_matrix_itself(method):
    delta = gaussian(5, 8)
    a, b = sketch(delta, rank=5, method=method, generator=generator())
    assert torch.equal(a @ b.mH, delta)


@pytest.mark.parametrize("method", METHODS)
def test_randomness_comes_from_the_generator_alone(method):
    delta = gaussian(12, 9)
    before = torch.get_rng_state()
    one = sketch(delta, rank=2, method=method, generator=generator(5))
    two = sketch(delta, rank=2, method=method, generator=generator(5))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert torch.equal(torch.get_rng_state(), before)
    if method != "svd":
        other = sketch(delta, rank=2, method=method, generator=generator(6))
        assert not torch.allclose(product(one), product(other))


def test_not_a_number_spreads_to_the_factors():
    delta = gaussian(6, 5)
    delta[4, 2] = float("nan")
    a, _ = sketch(delta, rank=2, method="lsi", generator=generator())
    assert a.isnan().any()


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_orthonormal_columns(k, dtype):
    for w in (gaussian(9, k, dtype=dtype), gaussian(3, 9, k, dtype=dtype)):
        q = orthonormal_columns(w)
        eye = torch.eye(k, dtype=dtype)
        assert (q.mH @ q - eye).abs().max() <= rounding(dtype, 9)
        assert (q @ (q.mH @ w) - w).abs().max() <= rounding(dtype, 9)


def test_bad_arguments():
    with pytest.raises(ValueError, match="rank=0 must be at least 1"):
        sketch(gaussian(3, 3), rank=0)
    with pytest.raises(ValueError, match="'magic' is unknown"):
        sketch(gaussian(3, 3), rank=1, method="magic")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-30, 1.0])
def test_exactly_equal_columns(method, scale):
    # LAPACK's complex64 QR and SVD return not-a-number, or fail, on most of these.
    for dtype in DTYPES:
        for seed in range(20):
            delta = scale * gaussian(15, 1, dtype=dtype, seed=seed).expand(15, 8)
            a, b = sketch(delta, rank=2, method=method, generator=generator(seed))
            gap = torch.linalg.matrix_norm(a / scale @ b.mH - delta / scale)
            assert gap <= rounding(dtype, 15, factor=100)


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30, 1e38])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_one_column_of_any_length_becomes_a_unit_vector(scale, batch):
    w = torch.full((*batch, 7, 1), scale)
    w[..., 3, :] = -scale
    unit = orthonormal_columns(w)
    assert unit.dtype == torch.float32
    assert (unit.square().sum(-2) - 1).abs().max() <= 1e-6
    assert (unit[..., 0, :] + unit[..., 3, :]).abs().max() <= 1e-6
    assert not orthonormal_columns(0 * w).any()
    assert torch.equal(orthonormal_columns(0 * w, otherwise=unit), unit)
    w[..., 2, :] = float("nan")
    assert orthonormal_columns(w).isnan().all()
