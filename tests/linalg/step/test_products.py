"""Products cut in blocks of rows, against the plain ones."""

from __future__ import annotations

import pytest
import torch

from riemann_unn.linalg.step import products
from riemann_unn.linalg.step.products import add_product_, rows_times, times_columns
from tests.support import DTYPES, double, every, gaussian, rounding

PAIR = [(64, 2), (2, 32)]
SHAPES = [(32, 12), (48, 48), (31, 20), (3, 16, 8)]


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    monkeypatch.setattr("riemann_unn.linalg.step.products.CACHED", 0)
    monkeypatch.setattr("riemann_unn.linalg.step.products._LONG", 0)


def layouts(x):
    yield x
    yield x.mT.contiguous().mT
    yield x.mH.contiguous().mH
    yield torch.cat([x, x], dim=-1)[..., ::2]


@every("dtype", DTYPES)
@every("shape", SHAPES)
@every("k", [1, 3, 40])
def test_against_the_plain_products(dtype, shape, k):
    n, p = shape[-2:]
    limit = rounding(dtype, n, factor=100)
    for x in layouts(gaussian(*shape, dtype=dtype)):
        for rows in layouts(gaussian(*shape[:-2], k, n, dtype=dtype, seed=1)):
            assert (rows_times(rows, x) - rows @ x).abs().max() <= limit
        for columns in layouts(gaussian(*shape[:-2], p, k, dtype=dtype, seed=2)):
            assert (times_columns(x, columns) - x @ columns).abs().max() <= limit


@every("dtype", DTYPES)
@every("shape", [*SHAPES, (2, 3, 16, 8)])
@every("k", [1, 2, 9])
def test_a_product_is_added_in_place(dtype, shape, k):
    n, p = shape[-2:]
    for number in range(4):
        for left in layouts(gaussian(*shape[:-2], n, k, dtype=dtype, seed=1)):
            for right in layouts(gaussian(*shape[:-2], k, p, dtype=dtype, seed=2)):
                x = list(layouts(gaussian(*shape, dtype=dtype)))[number]
                expected, memory = x + left @ right, x.data_ptr()
                assert add_product_(x, left, right) is x and x.data_ptr() == memory
                assert (x - expected).abs().max() <= rounding(dtype, n, factor=100)
                x.fill_(torch.nan)
                add_product_(x, left, right, beta=0.0)  # what was there is not read
                assert (x - left @ right).abs().max() <= rounding(dtype, n, factor=100)


def test_thin_products_are_added_in_strips_of_long_rows(monkeypatch):
    strips = []
    baddbmm_ = torch.Tensor.baddbmm_
    monkeypatch.setattr(
        torch.Tensor,
        "baddbmm_",
        lambda x, a, b, beta=1: strips.append(x.shape) or baddbmm_(x, a, b, beta=beta),
    )
    x = gaussian(64, 32)
    add_product_(x, gaussian(64, 8), gaussian(8, 32))
    add_product_(x.mT, gaussian(32, 2), gaussian(2, 64))
    assert strips == [(8, 8, 32)] * 2
    add_product_(x, gaussian(64, 9), gaussian(9, 32))
    add_product_(gaussian(63, 32), gaussian(63, 2), gaussian(2, 32))
    add_product_(x.to(torch.complex64), *(gaussian(*s, dtype=torch.complex64) for s in PAIR))
    monkeypatch.setattr("riemann_unn.linalg.step.products._LONG", 33)
    add_product_(x, *(gaussian(*shape) for shape in PAIR))
    assert len(strips) == 2


def test_large_matrices_go_block_by_block_and_others_do_not(monkeypatch):
    blocks = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: blocks.append(a.shape[0]) or bmm(a, b))
    x = gaussian(64, 32)
    for y in (x, x.mT.contiguous().mT):
        rows_times(gaussian(2, 64), y)
        times_columns(y, gaussian(32, 2))
    assert blocks == [16] * 4
    rows_times(gaussian(40, 64), x)  # so many rows are for BLAS
    times_columns(gaussian(33, 31), gaussian(31, 1))  # no 16 equal blocks
    monkeypatch.setattr("riemann_unn.linalg.step.products.CACHED", 64 * 32)
    rows_times(gaussian(2, 64), x)
    assert len(blocks) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("k", [1, 3])
def test_products_that_read_once(dtype, threads, k, monkeypatch):
    """Against double precision: wide X, square Y, and zeros where they are asked for."""
    monkeypatch.setattr("riemann_unn.linalg.step.products._HUGE", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, g = gaussian(256, 300, dtype=dtype), gaussian(256, 300, dtype=dtype, seed=1)
        v = gaussian(300, k, dtype=dtype, seed=2)
        assert products.are_read_once(x, g, k) and not products.are_read_once(x, g.mT, k)
        z, xv = products.skew_products(x, g, v.mT.contiguous())
        a, b, u = double(x), double(g), double(v)
        limit = 1e-12 if dtype == torch.float64 else 2e-3
        assert (z - 0.5 * (a.mT @ (b @ u) - b.mT @ (a @ u))).abs().max() <= limit
        assert (xv - a @ u).abs().max() <= limit
        for clear in (False, True):
            y, w = gaussian(256, 256, dtype=dtype), v[:256]
            expected = 0.5 * (double(y) - double(y).mT) @ double(w)
            found = products.skew_columns(y, w.mT.contiguous(), clear=clear)
            assert (found - expected).abs().max() <= limit
            assert bool(y.any()) is not clear
    finally:
        torch.set_num_threads(before)
