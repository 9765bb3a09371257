"""Sketches: exact on low rank, scale-free, reproducible, and close to the best elsewhere."""

from __future__ import annotations

import pytest
import torch

from riemann_unn.linalg import orthonormal_rows, sketch
from tests.support import DTYPES, gaussian, generator, low_rank, point, rounding

METHODS = ["power", "lsi", "column", "svd"]


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


def captured(delta, factors):
    best = torch.linalg.svdvals(delta)[: factors[0].shape[-1]].square().sum()
    return float(torch.linalg.matrix_norm(product(factors)).square() / best)


def test_warm_start_converges_to_the_best_and_recovers_from_a_bad_one():
    spectrum = torch.logspace(0, -2, 50, dtype=torch.float64)
    delta = point(60, 50) * spectrum @ point(50, 50, seed=1)
    start, energies = None, []
    for step in range(12):
        a, b = sketch(delta, rank=2, start=start, generator=generator(step))
        energies.append(captured(delta, (a, b)))
        start = orthonormal_rows(a.mH)
    assert energies[-1] > 0.98 and energies[-1] > energies[0]
    lsi = [
        captured(delta, sketch(delta, rank=2, method="lsi", generator=generator(s)))
        for s in range(20)
    ]
    assert energies[-1] > sum(lsi) / len(lsi)
    # A start orthogonal to the whole matrix must not blind the sketch.
    left = torch.linalg.svd(low_rank(60, 50, 3))[0]
    a, b = sketch(low_rank(60, 50, 3), rank=3, start=left[:, -3:].mH, generator=generator())
    assert (a @ b.mH - low_rank(60, 50, 3)).abs().max() < 1e-9


def test_not_a_number_spreads_to_the_factors():
    delta = gaussian(6, 5)
    delta[4, 2] = float("nan")
    for method in ("power", "lsi"):
        a, _ = sketch(delta, rank=2, method=method, generator=generator())
        assert a.isnan().any()


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_orthonormal_rows(k, dtype):
    w = gaussian(k, 9, dtype=dtype)
    q = orthonormal_rows(w)
    eye = torch.eye(k, dtype=dtype)
    assert (q @ q.mH - eye).abs().max() <= rounding(dtype, 9)
    assert (w @ q.mH @ q - w).abs().max() <= rounding(dtype, 9)


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


def test_rounds_come_closer_to_the_best():
    spectrum = torch.logspace(0, -1, 40, dtype=torch.float64)
    means = []
    for rounds in (1, 2, 3):
        shares = []
        for seed in range(20):
            delta = point(60, 40, seed=seed) * spectrum @ point(40, 40, seed=seed + 50)
            start = orthonormal_rows(gaussian(1, 60, seed=seed))
            factors = sketch(delta, rank=1, start=start, rounds=rounds, generator=generator(seed))
            shares.append(captured(delta, factors))
        means.append(sum(shares) / len(shares))
    assert means[0] + 0.1 < means[1] and means[1] + 0.05 < means[2]
    with pytest.raises(ValueError, match="rounds=0 must be at least 1"):
        sketch(gaussian(3, 3), rank=1, rounds=0)


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30, 1e38])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_one_row_of_any_length_becomes_a_unit_vector(scale, batch):
    w = torch.full((*batch, 1, 7), scale)
    w[..., 3] = -scale
    unit = orthonormal_rows(w)
    assert unit.dtype == torch.float32
    assert (unit.square().sum(-1) - 1).abs().max() <= 1e-6
    assert (unit[..., 0] + unit[..., 3]).abs().max() <= 1e-6
    assert not orthonormal_rows(0 * w).any()
    w[..., 2] = float("nan")
    assert orthonormal_rows(w).isnan().all()
