"""Transforms by blocks and local kernels, beside the transforms of whole kernels in double."""

import pytest
import torch

from riemann_unn.linalg import conv_from_spectrum, conv_matrix, conv_spectrum
from riemann_unn.linalg.conv import blocks
from riemann_unn.linalg.conv.local import local_kernel_
from tests.support import every, gaussian

KERNELS = [
    ((3, 4, 9), 1),
    ((2, 3, 4, 5, 6), 2),
    ((4, 2, 1, 2), 2),
    ((4, 5, 70, 3), 2),  # longer than what is transformed back by products
    ((2, 3, 4, 4, 3, 6), 3),
    ((0, 3, 4, 4), 2),
]
over_kernels = pytest.mark.parametrize(("shape", "ndim"), KERNELS, ids=str)
over_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
over_blocks = pytest.mark.parametrize("sites", [1, 100, 2**20])


@over_kernels
@over_dtypes
@over_blocks
def test_spectra_by_blocks_are_those_of_whole_kernels(shape, ndim, dtype, sites, monkeypatch):
    monkeypatch.setattr(blocks, "_BLOCK", sites)
    kernel, real = gaussian(*shape, dtype=dtype), not dtype.is_complex
    expected = conv_spectrum(kernel, ndim=ndim)
    assert blocks.spectrum_shape(kernel.shape, ndim, real=real) == expected.shape
    torch.testing.assert_close(blocks.spectrum_of_kernel(kernel, ndim=ndim), expected)
    out = torch.full_like(kernel, torch.nan)
    back = blocks.kernel_of_spectrum(expected, real=real, ndim=ndim, out=out)
    assert back is out
    torch.testing.assert_close(out, kernel, atol=1e-13, rtol=0)


@over_kernels
@over_dtypes
@over_blocks
@every("rank", [1, 2, 6])
def test_products_of_thin_factors(shape, ndim, dtype, sites, rank, monkeypatch):
    monkeypatch.setattr(blocks, "_BLOCK", sites)
    kernel, real = gaussian(*shape, dtype=dtype), not dtype.is_complex
    like = conv_spectrum(kernel, ndim=ndim)
    left = gaussian(*like.shape[:-1], rank, dtype=like.dtype, seed=1)
    right = gaussian(*like.shape[:-2], rank, like.shape[-1], dtype=like.dtype, seed=2)
    expected = conv_from_spectrum(left @ right, size=tuple(shape[-ndim:]), real=real)
    out = torch.full_like(kernel, torch.nan)
    blocks.kernel_of_product(left, right, real=real, ndim=ndim, out=out)
    torch.testing.assert_close(out, expected, atol=1e-13, rtol=0)


def test_single_precision_is_that_of_a_transform_and_of_a_rounding():
    kernel = gaussian(16, 16, 28, 28)
    exact = conv_spectrum(kernel)
    single = conv_spectrum(kernel.float(), widen=False)
    assert torch.equal(blocks.spectrum_of_kernel(kernel.float(), ndim=2), single)
    wide = blocks.spectrum_of_kernel(kernel.float(), ndim=2, widen=True)
    assert torch.equal(wide, conv_spectrum(kernel.float()))
    back = torch.empty_like(kernel, dtype=torch.float32)
    blocks.kernel_of_spectrum(exact.to(torch.complex64), real=True, ndim=2, out=back)
    assert (back - kernel).norm() / kernel.norm() < 3e-7


@pytest.mark.parametrize("shape", [(5, 5, 8), (4, 7, 6, 5), (6, 1, 4, 1, 2), (2, 3, 3)], ids=str)
@over_dtypes
def test_local_kernels_are_unitary_and_zero_outside_of_their_window(shape, dtype):
    torch.manual_seed(0)
    kernel = local_kernel_(gaussian(*shape, dtype=dtype))
    m = conv_matrix(kernel)
    m = m if m.shape[0] >= m.shape[1] else m.mH
    assert (m.mH @ m - torch.eye(m.shape[1], dtype=dtype)).abs().max() < 1e-14
    for dim, n in enumerate(shape[2:], start=2):
        assert not kernel.index_select(dim, torch.arange(2, max(n - 1, 2))).any()
    torch.manual_seed(0)
    assert torch.equal(local_kernel_(torch.empty_like(kernel)), kernel)
    assert not torch.equal(local_kernel_(torch.empty_like(kernel)), kernel)


def test_local_kernels_have_half_of_their_mass_at_the_centre_of_each_dimension():
    torch.manual_seed(0)
    mass = local_kernel_(torch.empty(64, 64, 8, 6)).square().sum((0, 1)) / 64
    share = torch.tensor([0.5, 0.25, 0.25])
    rows, columns = mass.sum(1)[[0, 1, 7]], mass.sum(0)[[0, 1, 5]]
    for found in (rows, columns):
        torch.testing.assert_close(found, share, atol=0.03, rtol=0)
