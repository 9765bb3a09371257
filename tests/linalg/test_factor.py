"""Factorisations and norms where those of single precision fail."""

from __future__ import annotations

import pytest
import torch

from riemann_unn.linalg.factor import (
    DOUBLE,
    column_norms,
    is_triangular,
    length_of,
    real_dtype,
    svd,
    thin_qr,
)
from tests.support import DTYPES, double, gaussian


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["independent", "dependent", "zero"])
def test_thin_qr_gives_orthonormal_columns_and_the_product(dtype, kind):
    w = gaussian(2, 9, 3, dtype=dtype)
    if kind == "dependent":
        w = w[..., :1].expand(2, 9, 3).clone()
    elif kind == "zero":
        w = 0 * w
    q, r = thin_qr(w)
    assert q.dtype == r.dtype == DOUBLE.get(dtype, dtype)
    assert (q.mH @ q - torch.eye(3, dtype=q.dtype)).abs().max() <= 1e-14
    assert (q @ r - double(w)).abs().max() <= 1e-13
    assert is_triangular(r) == (not r.is_complex() or not bool(r.tril(-1).any()))


def test_a_matrix_that_is_not_triangular_is_told():
    full = gaussian(3, 3, dtype=torch.complex128)
    assert not is_triangular(full) and is_triangular(full.triu())
    assert is_triangular(full.real)  # which LAPACK gives always


def test_not_a_number_spreads():
    w = gaussian(5, 2, dtype=torch.complex64)
    w[1, 1] = torch.nan
    assert not torch.isfinite(thin_qr(w)[0]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_norms_of_columns_are_sums_in_double_precision(dtype, scale):
    x = gaussian(2, 4, 3, dtype=dtype) * scale
    expected = double(x).abs().square().sum(dim=-2, keepdim=True).sqrt()
    found = column_norms(x)
    assert found.shape == (2, 1, 3) and found.dtype is torch.float64
    assert ((found - expected) / scale).abs().max() <= 1e-14
    assert length_of(x) == pytest.approx(float(expected.square().sum().sqrt()), rel=1e-14)
    if scale != 1 and dtype is torch.float32:  # the control: its squares have no room
        assert float(x.square().sum()) in (0.0, torch.inf)


@pytest.mark.parametrize("dtype", DTYPES)
def test_singular_values_of_dependent_columns(dtype):
    x = gaussian(6, 1, dtype=dtype).expand(6, 4).clone()
    u, s, vh = svd(x)
    assert u.dtype == vh.dtype == dtype and s.dtype == real_dtype(dtype) == dtype.to_real()
    limit = 1e-5 if dtype in DOUBLE else 1e-13
    assert (u * s @ vh - x).abs().max() <= limit
    assert float(s[0]) == pytest.approx(2 * length_of(x[:, 0]), rel=1e-5)
    assert s[1:].abs().max() <= limit
