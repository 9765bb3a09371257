"""The formula against its dense oracle, at every shape, dtype, rank and size of step."""

from __future__ import annotations

import pytest
import torch

from riemann_unn.linalg import retract_low_rank, retract_low_rank_
from tests.support import (
    DTYPES,
    assert_on_manifold,
    dense_step,
    double,
    error,
    every,
    gaussian,
    point,
    rounding,
)

PHIS = ["exp", "cayley", "polar"]
SHAPES = [(24, 24), (40, 12), (30, 29), (3, 10, 10), (1, 1), (7, 1)]


@pytest.fixture(params=["small", "large"], autouse=True)
def kind(request, monkeypatch):
    """Everything holds for the products of large points too."""
    if request.param == "large":
        for name, value in {
            "products.CACHED": 0,
            "products._BLOCKS": 2,
            "products._LONG": 0,
        }.items():
            monkeypatch.setattr(f"riemann_unn.linalg.step.{name}", value)
        monkeypatch.setattr("riemann_unn.linalg.step.update.CACHED", 0)


def factors(shape, k, dtype, size, seed=0):
    *batch, n, p = shape
    a = gaussian(*batch, n, k, dtype=dtype, seed=seed + 1)
    b = gaussian(*batch, p, k, dtype=dtype, seed=seed + 2)
    norm = torch.linalg.matrix_norm(a @ b.mH, 2).max()
    return a * (size / norm), b


@every("phi", PHIS)
@every("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@every("k", [1, 2, 4])
def test_one_step_against_the_dense_reference(phi, dtype, shape, k):
    x = point(*shape, dtype=dtype)
    for size in (1e-6, 0.1, 1.0):
        a, b = factors(shape, k, dtype, size)
        moved = retract_low_rank(x, a, b, phi=phi)
        expected = dense_step(x, double(a) @ double(b).mH, phi)
        gap = torch.linalg.matrix_norm(moved - expected) / torch.linalg.matrix_norm(expected)
        limit = 1e-13 if dtype in (torch.float64, torch.complex128) else 5e-6
        assert gap.max() <= limit, (size, float(gap.max()))
    wrong = dense_step(x, -double(a) @ double(b).mH, phi)
    if shape != (1, 1):  # a real 1 by 1 point cannot move
        assert torch.linalg.matrix_norm(moved - wrong).max() > 1e-2  # the check can fail


@every("phi", PHIS)
@pytest.mark.parametrize("shape", SHAPES)
@every("size", [1e-30, 1e3, 1e8])
def test_steps_of_any_size_stay_on_the_manifold(phi, shape, size):
    for dtype in DTYPES:
        x = point(*shape, dtype=dtype)
        for seed in range(5):
            a, b = factors(shape, 2, dtype, size, seed=10 * seed)
            retract_low_rank_(x, a, b, phi=phi)
        assert error(x) <= (1e-6 if dtype in (torch.float32, torch.complex64) else 1e-14)


@pytest.mark.parametrize("phi", PHIS)
@every("dtype", DTYPES)
@every("shape", [(12, 12), (20, 5)])
def test_degenerate_displacements(phi, dtype, shape):
    x = point(*shape, dtype=dtype)
    n, p = shape
    eye = torch.eye(p, dtype=dtype)
    cases = {
        "minus the point": (-x, eye),
        "the point": (x, eye),
        "a parallel to x b": (x[:, :2].clone(), eye[:, :2]),
        "minus a part of the point": (-x[:, :2].clone(), eye[:, :2]),
        "zero columns": (torch.zeros(n, 2, dtype=dtype), eye[:, :2]),
        "one zero column": (torch.cat([x[:, :1] * 0, x[:, 1:2] * 3], 1), eye[:, :2]),
        "equal columns": (x[:, :1].expand(n, 3).clone() * 5, eye[:, :1].expand(p, 3).clone()),
        "more columns than rows": (
            gaussian(n, n + 3, dtype=dtype),
            gaussian(p, n + 3, dtype=dtype),
        ),
    }
    for name, (a, b) in cases.items():
        moved = retract_low_rank(x, a, b, phi=phi)
        assert torch.isfinite(moved).all(), name
        assert error(moved) <= rounding(dtype), name


@every("phi", PHIS)
def test_zero_displacement_changes_no_bit(phi):
    x = point(9, 9, dtype=torch.float32)
    moved = retract_low_rank(x, torch.zeros(9, 2), torch.eye(9)[:, :2], phi=phi)
    assert torch.equal(moved, x)


@every("phi", PHIS)
def test_no_step_leaves_the_component(phi):
    x = point(6, 6)
    sign = torch.linalg.det(x)
    for seed in range(40):
        a, b = factors((6, 6), 2, x.dtype, 5.0, seed=seed)
        moved = retract_low_rank(x, a, b, phi=phi)
        assert torch.linalg.det(moved) * sign > 0
        assert_on_manifold(moved)


@every("phi", PHIS)
def test_strides_and_conjugate_views_are_written_through(phi):
    base = point(8, 5, dtype=torch.complex128)
    for view in (base.mT.contiguous().mT, base.mH.contiguous().mH, base.expand(2, 8, 5).clone()):
        x = view
        a, b = factors(tuple(x.shape), 2, x.dtype, 0.5)
        expected = dense_step(x, a @ b.mH, phi)
        pointer = x.data_ptr()
        retract_low_rank_(x, a, b, phi=phi)
        assert x.data_ptr() == pointer
        assert (x - expected).abs().max() < 1e-13


def test_empty_matrices_pass_through():
    for shape in ((0, 0), (4, 0), (0, 3, 3)):
        x = torch.zeros(shape)
        a, b = torch.zeros(*shape[:-1], 1), torch.zeros(*shape[:-2], shape[-1], 1)
        for phi in PHIS:
            assert retract_low_rank(x, a, b, phi=phi).shape == shape
