"""Kernels of a step compile whole, to the same numbers, and once."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import riemann_unn as ru
from riemann_unn.linalg import (
    conv_from_spectrum,
    conv_spectrum,
    retract_low_rank,
    tangent_directions,
)
from riemann_unn.linalg.maps import skew
from riemann_unn.linalg.step.masked_polish import rows_due
from riemann_unn.linalg.step.polish import newton_schulz_
from riemann_unn.linalg.step.tangent import (
    iterate,
    next_directions,
    tangent_coordinates,
    tangent_gradient,
)
from riemann_unn.linalg.step.update import rotate_low_rank_, rotate_whole_, rotation_factors_lazily
from riemann_unn.linalg.value_branches import WithoutReading
from tests.support import gaussian, point, rounding

CASES = [((12, 12), 1, torch.float32), ((12, 12), 3, torch.float64), ((6, 20), 2, torch.float32)]
BATCHED = ((2, 9, 9), 1, torch.float32)
# In a compiler that is no compiler: what is traced is run as it is, by torch's own kernels.
QUICK = "aot_eager"


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors(found):
    return [found] if isinstance(found, Tensor) else [t for some in found for t in tensors(some)]


def copies(arguments):
    return [a.clone() for a in arguments]


def assert_compiles(function, *arguments: Tensor, backend=QUICK, factor=64.0):
    """The same numbers, by one graph, which serves for other numbers too."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for scale in (1.0, 0.5, 0.0):
        some = [a * scale if a.is_floating_point() else a + int(8 * scale) for a in arguments]
        some[0] = arguments[0]
        with WithoutReading():
            expected = tensors(function(*copies(some)))
        found = tensors(compiled(*copies(some)))
        assert len(found) == len(expected) > 0
        for one, other in zip(found, expected, strict=True):
            if other.is_floating_point() or other.is_complex():
                size = max(1.0, float(other.abs().max()))
                assert (one - other).abs().max() <= size * rounding(other.dtype, 12, factor)
            else:
                assert torch.equal(one, other)
    assert counter.frame_count == 1


def kernels(shape, k, dtype):
    """Functions with what they are of."""
    *batch, p, n = shape
    x, g = point(*shape, dtype=dtype), gaussian(*shape, dtype=dtype, seed=1)
    v = point(*batch, n, k, dtype=dtype, seed=2)
    d = skew(gaussian(*batch, n, n, dtype=dtype, seed=3)) @ v
    table = torch.randint(-(2**62), 2**62, (k, n), generator=torch.Generator().manual_seed(0))
    count = torch.tensor(5)

    def sketched(x, g, start, table, count):
        draws = lambda k, n: (table * (count * 7919 + 1), 1e-19)  # noqa: E731
        return [t for t in iterate(x, g, rank=k, start=start, draws=draws) if t is not None]

    yield sketched, (x, g, v.mH.contiguous(), table, count)
    for phi in ("exp", "cayley", "polar"):

        def turned(x, v, d, phi=phi, max_angle=0.3 if phi == "exp" else None):
            added = rotate_low_rank_(x, v + 0 * d, d, None, phi=phi, max_angle=max_angle)[1]
            return x, added

        def factors(v, d, phi=phi):
            return rotation_factors_lazily(v, d, phi=phi, max_angle=None, by_planes=True)[:2]

        def retracted(x, a, b, phi=phi):
            return retract_low_rank(x, a, b, phi=phi)

        yield lambda x, d, turned=turned: turned(x, v, d), (x, d)
        yield factors, (v, d)
        if phi == "exp":
            yield retracted, (x.mH.contiguous(), v, point(*batch, p, k, dtype=dtype, seed=4))
        if p == n:
            yield lambda x, g, phi=phi: rotate_whole_(x, skew(g), phi=phi), (x, g)
    yield lambda x, z: tangent_gradient(x, v, z, x @ v), (x, d)
    yield lambda x, delta: tangent_coordinates(x, delta, v, x @ v), (x, g)
    yield lambda x, count: rows_due(x, count, all_rows=False)[1:], (x, count)
    yield newton_schulz_, (x.mH.contiguous(),)
    yield next_directions, (v, d)


@pytest.mark.parametrize(("shape", "k", "dtype"), [*CASES[:2], BATCHED])
def test_kernels_compile_whole_and_once(shape, k, dtype):
    for function, arguments in kernels(shape, k, dtype):
        torch._dynamo.reset()
        assert_compiles(function, *arguments)


def test_directions_of_users_compile():
    x, g = point(8, 8, dtype=torch.float32), gaussian(8, 8, dtype=torch.float32)
    compiled = torch.compile(
        lambda x, g: tangent_directions(x, g, rank=2), fullgraph=True, backend=QUICK
    )
    v, z, xv = compiled(x, g)
    omega = skew(x.mT @ g)
    assert (omega @ v - z).abs().max() <= 1e-5 and (x @ v - xv).abs().max() <= 1e-6


def test_the_transform_of_a_kernel_compiles():
    kernel = ru.OrthogonalConv().random(3, 3, 4, 4).detach().as_subclass(Tensor)
    found = conv_spectrum(kernel, ndim=2)  # what is kept of a size is found before

    def there_and_back(x):
        spectrum = conv_spectrum(x, ndim=2)
        return torch.view_as_real(spectrum), conv_from_spectrum(spectrum, size=(4, 4), real=True)

    assert_compiles(there_and_back, kernel)
    assert (conv_from_spectrum(found, size=(4, 4), real=True) - kernel).abs().max() <= 1e-6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler, of what it compiles badly
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_kernels_by_a_true_compiler():
    shape, k, dtype = CASES[1]
    for function, arguments in list(kernels(shape, k, dtype))[:3]:
        torch._dynamo.reset()
        assert_compiles(function, *arguments, backend="inductor", factor=1e4)
