"""Functions of Hermitian matrices beside torch's exponential, where eigenvalues meet too."""

from __future__ import annotations

import pytest
import torch

from riemann_unn.linalg.hermitian import hermitian_function
from tests.support import gaussian, point

DOUBLES = [torch.float64, torch.complex128]


def hermitian(dtype, *values):
    u = point(len(values), len(values), dtype=dtype)
    return (u * torch.tensor(values, dtype=dtype)) @ u.mH


def exponential(h):
    return hermitian_function(h, torch.exp, torch.exp)


@pytest.mark.parametrize("dtype", DOUBLES)
@pytest.mark.parametrize("values", [(0.3, -1.0, 2.0), (1.0, 1.0, 2.0), (1.0, 1.0, 1.0 + 1e-10)])
def test_values_and_gradients_are_those_of_the_exponential(dtype, values):
    h, g = hermitian(dtype, *values), gaussian(3, 3, dtype=dtype, seed=1)
    ends = []
    for function in (exponential, torch.linalg.matrix_exp):
        x = h.clone().requires_grad_()
        y = function(0.5 * (x + x.mH))
        ends.append((y.detach(), *torch.autograd.grad((g.conj() * y).sum().real, x)))
    for some, other in zip(*ends, strict=True):
        assert (some - other).abs().max() <= 1e-12
    assert (exponential(h) - ends[0][0]).abs().max() <= 1e-14  # without a gradient


def test_the_derivative_of_an_eigendecomposition_is_none_where_eigenvalues_meet():
    """The control."""
    h = torch.eye(3, dtype=torch.float64).requires_grad_()
    w, v = torch.linalg.eigh(h)
    (found,) = torch.autograd.grad(((v * w.exp()) @ v.mT).square().sum(), h)
    assert not torch.isfinite(found).all()


def test_the_limit_is_the_derivative():
    h = (2 * torch.eye(2, dtype=torch.float64)).requires_grad_()
    y = hermitian_function(h, torch.sqrt, lambda w: 0.5 / w.sqrt())
    (found,) = torch.autograd.grad(y.sum(), h)
    assert found.flatten().tolist() == pytest.approx([0.5 / 2**0.5] * 4)
