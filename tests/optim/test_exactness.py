"""What a step promises: the map it claims, the manifold kept, at any size and for long."""

from __future__ import annotations

import pytest
import torch

import riemann_unn as ru
from tests.support import (
    DTYPES,
    SHAPES,
    assert_on_manifold,
    dense_step,
    double,
    error,
    every,
    every_second,
    gaussian,
    generator,
    low_rank,
    parameter,
    point,
)

CLASSES = {"exp": ru.optim.ProjUNNT, "polar": ru.optim.ProjUNND, "cayley": ru.optim.Cayley}
PHIS = list(CLASSES)
SKETCHES = ["lsi", "column", "svd"]  # which are exact on gradients of their rank


@every("phi", PHIS)
@pytest.mark.parametrize("sketch", SKETCHES)
@every("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(24, 24), (40, 12), (12, 40)])
def test_one_step_equals_the_dense_reference(phi, sketch, dtype, shape):
    for k in (1, 3):
        p = parameter(*shape, dtype=dtype)
        x = double(p.detach().clone())
        p.grad = low_rank(*shape, k, dtype=dtype, seed=k)
        CLASSES[phi]([p], lr=0.7, rank=k, sketch=sketch).step()
        expected = dense_step(x, -0.7 * double(p.grad), phi)
        gap = torch.linalg.matrix_norm(p.detach() - expected) / torch.linalg.matrix_norm(expected)
        assert gap <= (1e-13 if dtype in (torch.float64, torch.complex128) else 5e-6)
        unmoved = torch.linalg.matrix_norm(x - expected) / torch.linalg.matrix_norm(expected)
        assert unmoved > 1e-2  # so the bound above says something


@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("shape", [(9, 9), (12, 5), (5, 12), (2, 6, 6)])
def test_full_rank_equals_dense(phi, shape):
    for rank in (min(shape[-2:]), 50, None):
        p = parameter(*shape, dtype=torch.float64)
        x = p.detach().clone()
        p.grad = gaussian(*shape, seed=3)
        CLASSES[phi]([p], lr=0.3, rank=rank).step()
        assert (p - dense_step(x, -0.3 * p.grad, phi)).abs().max() < 1e-13


@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_complex_with_zero_imaginary_part_equals_real(phi, base):
    real = parameter(10, 10, dtype=torch.float64)
    complex_ = torch.nn.Parameter(real.detach().to(torch.complex128))
    ru.tag_(complex_, ru.Unitary())
    optimizers = [CLASSES[phi]([p], lr=0.05, rank=2, base=base) for p in (real, complex_)]
    for step in range(20):
        real.grad = gaussian(10, 10, seed=step)
        complex_.grad = real.grad.to(torch.complex128)
        for optimizer in optimizers:
            optimizer.step()
    assert (complex_ - real).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("phi", "dtype", "shape"),
    every_second(PHIS, DTYPES, [*SHAPES.values(), (1, 1), (6, 1), (1, 6)]),
)
def test_many_steps_stay_on_the_manifold(phi, dtype, shape):
    for rank in (1, 4):
        p = parameter(*shape, dtype=dtype)
        optimizer = CLASSES[phi]([p], lr=0.1, rank=rank, base=torch.optim.Adam)
        for step in range(100):
            p.grad = gaussian(*shape, dtype=dtype, seed=step)
            optimizer.step()
        assert_on_manifold(p)


@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("shape", [(0, 0), (4, 0), (0, 4), (0, 3, 3), (2, 0, 0)])
def test_empty_parameters_are_left_in_peace(phi, shape):
    empty, full = parameter(*shape), parameter(4, 4)
    optimizer = CLASSES[phi]([empty, full], lr=0.1)
    for p in (empty, full):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert empty.shape == shape
    assert_on_manifold(full)


@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("n", [8, 64, 200])
def test_huge_learning_rates_stay_finite_and_exact(phi, dtype, n):
    p = parameter(n, n, dtype=dtype)
    optimizer = CLASSES[phi]([p], lr=1e3, rank=1)
    for step in range(100):
        g = gaussian(n, n, dtype=dtype, seed=step)
        p.grad = g * (n**0.5 / torch.linalg.matrix_norm(g))
        optimizer.step()
        assert torch.isfinite(p).all()
        assert error(p) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("rank", [1, 4, 24])
def test_descent_on_a_target_stays_exact(phi, rank):
    for seed in range(20):
        target = point(24, 24, dtype=torch.float32, seed=seed + 100)
        p = parameter(24, 24, seed=seed)
        optimizer = CLASSES[phi]([p], lr=0.05, rank=rank)
        first = (p - target).square().sum()
        for _ in range(100):
            optimizer.zero_grad()
            (p - target).square().sum().backward()
            optimizer.step()
        assert (p - target).square().sum() < first
        assert_on_manifold(p)


def wander(p, phi, steps, *, polish=True, size=1e-2):
    """Take rank-1 steps of a given size in random directions."""
    optimizer = CLASSES[phi]([p], lr=size, rank=1, polish=polish)
    source = generator(1)
    n, m = p.shape
    for _ in range(steps):
        u = torch.randn(n, 1, dtype=p.dtype, generator=source)
        v = torch.randn(m, 1, dtype=p.dtype, generator=source)
        p.grad = (u / torch.linalg.vector_norm(u)) @ (v / torch.linalg.vector_norm(v)).mH
        optimizer.step()


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_rounding_does_not_accumulate_in_single_precision(dtype):
    p = parameter(128, 128, dtype=dtype)
    wander(p, "exp", 10_000)  # bench/polish_drift.py takes 100,000
    assert error(p) <= 5e-7


@pytest.mark.parametrize("phi", PHIS)
def test_rounding_does_not_accumulate_in_double_precision(phi):
    p = parameter(64, 64, dtype=torch.float64)
    wander(p, phi, 10_000 if phi == "exp" else 3_000)
    assert error(p) <= 2e-15


@pytest.mark.parametrize(
    ("phi", "dtype"),
    [*((phi, torch.float32) for phi in PHIS), ("exp", torch.complex64)],
)
def test_without_the_polish_rounding_does_accumulate(phi, dtype):
    p = parameter(128, 128, dtype=dtype)
    wander(p, phi, 4_000, polish=False)
    assert error(p) > 1e-6
    q = parameter(128, 128, dtype=dtype)
    wander(q, phi, 4_000)
    assert error(q) <= 5e-7


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("phi", PHIS)
def test_a_unitary_target_is_reached(phi, rank):
    n = 64
    target = point(n, n, dtype=torch.complex64, seed=7)
    p = parameter(n, n, dtype=torch.complex64, manifold=ru.Unitary())
    # The gradient of |U - T|² is 2 (U - T): half of it is the whole distance.
    lr = 0.5 if rank == 1 else 0.25
    optimizer = CLASSES[phi]([p], lr=lr, rank=rank)
    for _ in range(4000 // rank):
        optimizer.zero_grad()
        loss = (p - target).abs().square().sum()
        loss.backward()
        optimizer.step()
    assert float(torch.linalg.matrix_norm(p.detach() - target)) / n**0.5 <= 1e-4
    assert_on_manifold(p)


@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("shape", list(SHAPES.values()))
def test_zero_gradients_change_no_bit(phi, shape):
    p, other = parameter(*shape), parameter(*shape, seed=1)
    before = p.detach().clone()
    optimizer = CLASSES[phi]([p, other], lr=0.1)
    for step in range(20):
        p.grad = torch.zeros_like(p)
        other.grad = gaussian(*shape, dtype=torch.float32, seed=step)
        optimizer.step()
    assert torch.equal(p, before)
    assert not torch.equal(other, point(*shape, dtype=torch.float32, seed=1))


def test_determinants_are_kept():
    p = torch.nn.Parameter(
        ru.Orthogonal(det=1).random(6, 6, dtype=torch.float64).as_subclass(torch.Tensor).clone()
    )
    ru.tag_(p, ru.Orthogonal(det=1))
    optimizer = ru.optim.ProjUNND([p], lr=3.0, rank=2)
    for step in range(200):
        p.grad = gaussian(6, 6, seed=step)
        optimizer.step()
        assert torch.linalg.det(p) > 0
    assert_on_manifold(p)


def test_slightly_rough_points_are_mended_by_the_first_step():
    for shape in ((40, 40), (600, 600)):
        p = parameter(*shape)
        with torch.no_grad():
            p.add_(1e-5 * gaussian(*shape, dtype=torch.float32) / shape[-1] ** 0.5)
        assert error(p) > 5e-6
        p.grad = gaussian(*shape, dtype=torch.float32)
        ru.optim.ProjUNNT([p], lr=0.1).step()
        assert_on_manifold(p)


@pytest.mark.parametrize("phi", PHIS)
@every("rank", [1, 2, None])
@every("n", [1, 2, 3, 12])
def test_gradients_at_the_ends_of_single_precision(phi, rank, n):
    """1e36 turns by a huge angle, and 1e-36 by the one that its learning rate asks for."""
    for dtype in (torch.float32, torch.complex64):
        ends = []
        for scale, lr in ((1e36, 1.0), (1.0, 0.1), (1e-36, 1e35)):
            p = parameter(n, n, dtype=dtype)
            optimizer = CLASSES[phi]([p], lr=lr, rank=rank)
            for step in range(3):
                p.grad = gaussian(n, n, dtype=dtype, seed=step) * scale
                optimizer.step()
            assert torch.isfinite(p).all() and error(p) <= 1e-6
            ends.append(p.detach().clone())
        assert (ends[1] - ends[2]).abs().max() <= 1e-4
