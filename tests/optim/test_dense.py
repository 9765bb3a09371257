"""Cayley and Expm with whole steps: dense references, Lie coordinates, batches, thin matrices."""

from __future__ import annotations

import copy
import resource

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
    gaussian,
    generator,
    parameter,
    point,
    slope,
)

CLASSES = {"cayley": ru.optim.Cayley, "exp": ru.optim.Expm}
PHIS = list(CLASSES)


@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES.values(), (150, 150), (1, 1), (6, 1)])
def test_one_step_equals_the_dense_reference(phi, dtype, shape):
    p = parameter(*shape, dtype=dtype)
    x = double(p.detach().clone())
    g = gaussian(*shape, dtype=dtype, seed=3)
    p.grad = g / torch.linalg.matrix_norm(g, 2).max()
    CLASSES[phi]([p], lr=0.7).step()
    expected = dense_step(x, -0.7 * double(p.grad), phi)
    gap = torch.linalg.matrix_norm(p.detach() - expected) / torch.linalg.matrix_norm(expected)
    assert gap.max() <= (1e-13 if dtype in (torch.float64, torch.complex128) else 5e-6)
    wrong = dense_step(x, 0.7 * double(p.grad), phi)
    if shape != (1, 1):
        assert torch.linalg.matrix_norm(p.detach() - wrong).max() > 1e-2


@pytest.mark.parametrize("phi", PHIS)
def test_a_rank_of_n_takes_the_whole_step(phi):
    ends = []
    for rank in (None, 9, 40):
        p = parameter(9, 9, dtype=torch.float64)
        optimizer = CLASSES[phi]([p], lr=0.2, rank=rank)
        for step in range(5):
            p.grad = gaussian(9, 9, seed=step)
            optimizer.step()
        ends.append(p.detach().clone())
    assert (ends[0] - ends[1]).abs().max() < 1e-13
    assert (ends[0] - ends[2]).abs().max() < 1e-13


@pytest.mark.parametrize("shape", [(8, 8), (12, 5)])
def test_orders_of_the_retractions(shape):
    x = point(*shape)
    g = gaussian(*shape, seed=5)
    g = g / torch.linalg.matrix_norm(g)
    sizes = [10.0**-i for i in (1.5, 2.0, 2.5, 3.0)]

    def moved(cls, t):
        p = ru.tag_(torch.nn.Parameter(x.clone()), ru.Stiefel())
        p.grad = -g
        cls([p], lr=t).step()
        return p.detach()

    direction = 0.5 * (g - x @ g.mH @ x)  # what the step is to first order
    norm = torch.linalg.matrix_norm
    for cls in CLASSES.values():
        gaps = [float(norm(moved(cls, t) - x - t * direction)) for t in sizes]
        assert slope(gaps, sizes) == pytest.approx(2.0, abs=0.1)
        for factor in (-1.0, 2.0):  # negative controls: flipped sign, doubled step
            gaps = [float(norm(moved(cls, t) - x - factor * t * direction)) for t in sizes]
            assert slope(gaps, sizes) == pytest.approx(1.0, abs=0.1)
    gaps = [float(norm(moved(ru.optim.Cayley, t) - moved(ru.optim.Expm, t))) for t in sizes]
    assert slope(gaps, sizes) == pytest.approx(3.0, abs=0.1)


@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_base_works_in_lie_coordinates(phi, base, dtype):
    p = parameter(10, 10, dtype=dtype)
    start = p.detach().clone()
    optimizer = CLASSES[phi]([p], lr=0.05, base=base)
    for step in range(30):
        p.grad = gaussian(10, 10, dtype=dtype, seed=step)
        optimizer.step()
    assert_on_manifold(p)
    for value in optimizer.state[p].values():  # first moments are skew, so steps are too
        if isinstance(value, torch.Tensor) and value.shape == p.shape:
            residue = torch.linalg.matrix_norm(value + value.mH) / torch.linalg.matrix_norm(value)
            assert residue < 1e-5 or (value.abs() - value.abs().mH).abs().max() < 1e-4
    if dtype not in (torch.float64, torch.complex128):
        return
    # Starting elsewhere on the group gives the same motion, turned: the steps are intrinsic.
    turn = point(10, 10, dtype=dtype, seed=8)
    q = ru.tag_(torch.nn.Parameter(turn @ start), ru.Stiefel())
    optimizer = CLASSES[phi]([q], lr=0.05, base=base)
    for step in range(30):
        q.grad = turn @ gaussian(10, 10, dtype=dtype, seed=step)
        optimizer.step()
    # Dividing by the size of each entry, the bases blow up the rounding of the smallest ones.
    assert (q.detach() - turn @ p.detach()).abs().max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize(
    ("n", "dtype", "limit"),
    [(128, torch.float32, 5e-7), (128, torch.complex64, 5e-7), (64, torch.float64, 2e-15)],
)
def test_rounding_does_not_accumulate(phi, n, dtype, limit):
    p = parameter(n, n, dtype=dtype)
    optimizer = CLASSES[phi]([p], lr=1e-2)
    source = generator(1)
    for _ in range(600):
        g = torch.randn(n, n, dtype=dtype, generator=source)
        p.grad = g / torch.linalg.matrix_norm(g)
        optimizer.step()
    assert error(p) <= limit


def test_thin_matrices_never_become_square():
    # Two copies of n by n would take 7 GB.
    n, p = 30_000, 50
    x = parameter(n, p)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for cls in CLASSES.values():
        optimizer = cls([x], lr=0.1, momentum=0.9)
        for step in range(2):
            x.grad = gaussian(n, p, dtype=torch.float32, seed=step)
            optimizer.step()
    assert_on_manifold(x)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1024 * 1024


@pytest.mark.parametrize("phi", PHIS)
def test_batches_and_many_small_parameters(phi):
    batch = parameter(4096, 16, 16)
    many = [torch.nn.Parameter(x.clone()) for x in batch.detach()[:1024]]
    for q in many:
        ru.tag_(q, ru.Stiefel())
    one, stacked = CLASSES[phi]([batch], lr=0.1), CLASSES[phi](many, lr=0.1)
    for step in range(5):
        batch.grad = gaussian(4096, 16, 16, dtype=torch.float32, seed=step)
        for q, g in zip(many, batch.grad, strict=False):
            q.grad = g.clone()
        one.step()
        stacked.step()
    assert_on_manifold(batch)
    moved = torch.stack([q.detach() for q in many])
    assert (moved - batch.detach()[:1024]).abs().max() < 1e-5
    assert_on_manifold(moved)


@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("det", [1, -1])
@pytest.mark.parametrize("rank", [None, 2])
def test_determinants_are_kept(phi, det, rank):
    manifold = ru.Orthogonal(det=det)
    p = torch.nn.Parameter(manifold.random(7, 7).as_subclass(torch.Tensor).clone())
    ru.tag_(p, manifold)
    optimizer = CLASSES[phi]([p], lr=2.0, rank=rank, base=torch.optim.Adam)
    for step in range(100):
        p.grad = gaussian(7, 7, dtype=torch.float32, seed=step)
        optimizer.step()
        assert torch.linalg.det(p.detach()) * det > 0
    assert_on_manifold(p)


@pytest.mark.parametrize("phi", PHIS)
def test_zero_gradients_and_resuming(phi):
    p = parameter(6, 6)
    before = p.detach().clone()
    optimizer = CLASSES[phi]([p], lr=0.1)
    for _ in range(5):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert torch.equal(p, before)
    p, optimizer = parameter(6, 6), None
    optimizer = CLASSES[phi]([p], lr=0.1, base=torch.optim.Adam)
    twin = None
    for step in range(10):
        if step == 5:
            twin = copy.deepcopy((p, optimizer))
        p.grad = gaussian(6, 6, dtype=torch.float32, seed=step)
        optimizer.step()
    q, optimizer = twin
    for step in range(5, 10):
        q.grad = gaussian(6, 6, dtype=torch.float32, seed=step)
        optimizer.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (4, 5), (2, 7, 5)])
def test_points_that_are_nearly_square(phi, base, shape):
    """Two directions for each row are more than there are."""
    p = parameter(*shape, dtype=torch.float64)
    optimizer = CLASSES[phi]([p], lr=0.1, base=base)
    for step in range(5):
        p.grad = gaussian(*shape, seed=step)
        optimizer.step()
    assert_on_manifold(p)
