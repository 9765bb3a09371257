"""Kernel algebra against the dense block-circulant operator and direct sums over sites."""

import itertools

import pytest
import torch
from torch.nn import functional

from riemann_unn import linalg
from riemann_unn.linalg import (
    conv_adjoint,
    conv_apply,
    conv_cayley,
    conv_compose,
    conv_decay,
    conv_exp,
    conv_from_spectrum,
    conv_identity,
    conv_log,
    conv_matrix,
    conv_polar,
    conv_singular_values,
    conv_skew,
    conv_spectrum,
    conv_truncate,
)
from tests.support import every, gaussian, rounding

SIZES = [(1,), (2,), (5,), (8,), (4, 3), (4, 4), (1, 6), (2, 3, 4), (4, 2, 2)]
DOUBLES = [torch.float64, torch.complex128]
SINGLES = [torch.float32, torch.complex64]
EXACT = 1e-12

over_sizes = pytest.mark.parametrize("size", SIZES, ids=str)
over_doubles = pytest.mark.parametrize("dtype", DOUBLES, ids=str)
over_channels = pytest.mark.parametrize("channels", [1, 4])


def kernel(out, in_, size, dtype=torch.float64, seed=0):
    return gaussian(out, in_, *size, dtype=dtype, seed=seed)


def generator(channels, size, dtype=torch.float64, seed=0):
    return conv_skew(kernel(channels, channels, size, dtype, seed))


def convolve_slowly(k, x):
    """The definition, one site at a time."""
    size = k.shape[2:]
    y = torch.zeros(k.shape[0], *size, dtype=torch.promote_types(k.dtype, x.dtype))
    for r, s in itertools.product(itertools.product(*map(range, size)), repeat=2):
        source = tuple((a - b) % n for a, b, n in zip(r, s, size, strict=True))
        y[(slice(None), *r)] += k[(slice(None), slice(None), *s)].to(y.dtype) @ x[
            (slice(None), *source)
        ].to(y.dtype)
    return y


# Products ---------------------------------------------------------------------


@over_sizes
@over_doubles
def test_apply_and_dense_operator_are_the_definition(size, dtype):
    k, x = kernel(3, 2, size, dtype), gaussian(2, *size, dtype=dtype, seed=1)
    slow = convolve_slowly(k, x)
    torch.testing.assert_close(conv_apply(k, x), slow, atol=EXACT, rtol=0)
    dense = (conv_matrix(k) @ x.flatten()).reshape(slow.shape)
    torch.testing.assert_close(dense, slow, atol=EXACT, rtol=0)


def test_apply_is_torchs_correlation_with_the_kernel_turned_around():
    k, x = kernel(3, 2, (5, 5)), gaussian(4, 2, 5, 5, seed=1)
    centred = torch.roll(k.flip((-2, -1)), (1 + 2, 1 + 2), (-2, -1))
    padded = functional.pad(x, (2, 2, 2, 2), mode="circular")
    torch.testing.assert_close(conv_apply(k, x), functional.conv2d(padded, centred))


@over_sizes
@over_doubles
def test_compose_and_adjoint_are_those_of_the_operators(size, dtype):
    left, right = kernel(3, 2, size, dtype), kernel(2, 4, size, dtype, seed=1)
    product = conv_matrix(conv_compose(left, right))
    torch.testing.assert_close(product, conv_matrix(left) @ conv_matrix(right))
    torch.testing.assert_close(conv_matrix(conv_adjoint(left)), conv_matrix(left).mH)


def test_mixed_dtypes_batches_and_bare_kernels():
    k, x = kernel(3, 2, (4, 4)), gaussian(5, 6, 2, 4, 4, dtype=torch.complex128, seed=1)
    parts = torch.complex(conv_apply(k, x.real), conv_apply(k, x.imag))
    torch.testing.assert_close(conv_apply(k, x), parts)
    torch.testing.assert_close(conv_apply(k, x)[3, 2], conv_apply(k, x[3, 2]))
    one, signal = gaussian(4, 4), gaussian(7, 4, 4, seed=1)
    with_channels = conv_apply(one[None, None], signal[:, None])[:, 0]
    torch.testing.assert_close(conv_apply(one, signal), with_channels)
    volume = gaussian(2, 3, 4)
    for f in (conv_adjoint, conv_skew, lambda v, **o: conv_exp(conv_skew(v, **o), **o), conv_polar):
        torch.testing.assert_close(f(volume, ndim=3), f(volume[None, None])[0, 0])
    batch = gaussian(6, 3, 2, 4, 4)
    torch.testing.assert_close(conv_polar(batch, ndim=2)[4], conv_polar(batch[4]))
    torch.testing.assert_close(conv_adjoint(batch, ndim=2)[4], conv_adjoint(batch[4]))
    torch.testing.assert_close(conv_matrix(batch, ndim=2)[4], conv_matrix(batch[4]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    k, x = kernel(2, 2, (4, 4)).to(dtype), gaussian(2, 4, 4).to(dtype)
    y = conv_apply(k, x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, conv_apply(k.float(), x.float()).to(dtype))
    polar = conv_polar(k)
    assert polar.dtype == dtype
    torch.testing.assert_close(polar, conv_polar(k.float()).to(dtype))
    a = (conv_skew(kernel(1, 1, (4, 4))) / 8).to(dtype)
    torch.testing.assert_close(conv_exp(a), conv_exp(a.float()).to(dtype))


@over_sizes
@over_doubles
def test_spectrum_has_an_inverse_and_each_pair_once(size, dtype):
    k = kernel(3, 2, size, dtype)
    spectrum = conv_spectrum(k)
    sites = conv_matrix(torch.zeros(1, 1, *size)).shape[0]
    own_images = 1
    for n in size:
        own_images *= 2 if n % 2 == 0 else 1
    assert spectrum.shape[0] == (sites if dtype.is_complex else (sites + own_images) // 2)
    back = conv_from_spectrum(spectrum, size=size, real=not dtype.is_complex)
    torch.testing.assert_close(back, k, atol=1e-14, rtol=1e-14)
    if not dtype.is_complex:
        # Any matrices at all are the spectrum of a real kernel, but for those that must be real.
        free = gaussian(*spectrum.shape, dtype=torch.complex128, seed=2)
        again = conv_spectrum(conv_from_spectrum(free, size=size, real=True))
        changed = (again - free).abs().amax((-2, -1)) > 1e-12
        assert int(changed.sum()) == own_images
        torch.testing.assert_close(again[changed], free[changed].real.to(free.dtype))


@over_sizes
@over_doubles
def test_singular_values_are_those_of_the_operator(size, dtype):
    k = kernel(3, 2, size, dtype)
    by_frequency = conv_singular_values(k)
    assert by_frequency.shape == (*size, 2)
    whole = torch.linalg.svdvals(conv_matrix(k))
    torch.testing.assert_close(by_frequency.flatten().sort(descending=True).values, whole)


# Maps to unitary kernels ------------------------------------------------------


@over_sizes
@over_channels
@over_doubles
def test_maps_are_those_of_the_dense_operator(size, channels, dtype):
    a = generator(channels, size, dtype)
    dense = conv_matrix(a)
    assert torch.allclose(dense, -dense.mH)
    eye = torch.eye(dense.shape[0], dtype=dtype)
    exp, cayley = conv_exp(a), conv_cayley(a)
    assert exp.dtype == cayley.dtype == dtype and exp.shape == a.shape
    assert (conv_matrix(exp) - torch.linalg.matrix_exp(dense)).abs().max() <= EXACT
    solved = torch.linalg.solve(eye - 0.5 * dense, eye + 0.5 * dense)
    assert (conv_matrix(cayley) - solved).abs().max() <= EXACT
    for u in (exp, cayley):
        assert (conv_singular_values(u) - 1).abs().max() <= EXACT
    there_and_back = conv_compose(exp, conv_exp(-a))
    identity = conv_identity(channels, channels, size, dtype=dtype)
    assert (there_and_back - identity).abs().max() <= EXACT


@over_sizes
@over_doubles
@every(("out", "in_"), [(3, 3), (4, 2), (2, 4)])
def test_polar_is_the_nearest_of_the_dense_operator(size, dtype, out, in_):
    k = kernel(out, in_, size, dtype)
    u, _, vh = torch.linalg.svd(conv_matrix(k), full_matrices=False)
    assert (conv_matrix(conv_polar(k)) - u @ vh).abs().max() <= EXACT


@over_sizes
@over_channels
@over_doubles
def test_log_undoes_exp_within_its_reach(size, channels, dtype):
    a = generator(channels, size, dtype)
    a = a * (3.0 / conv_singular_values(a).max().clamp_min(1e-9))
    assert (conv_log(conv_exp(a)) - a).abs().max() <= 1e-11
    identity = conv_identity(channels, channels, size, dtype=dtype)
    assert conv_log(identity).abs().max() <= EXACT


@pytest.mark.parametrize("dtype", SINGLES, ids=str)
@over_channels
def test_single_precision_is_unitary_to_rounding(dtype, channels):
    a = generator(channels, (8, 8), dtype)
    for u in (
        conv_exp(a),
        conv_cayley(a),
        conv_polar(a + conv_identity(channels, channels, (8, 8))),
    ):
        assert u.dtype == dtype
        assert (conv_singular_values(u) - 1).abs().max() <= rounding(dtype, 64)


@over_doubles
def test_huge_generators_stay_unitary_and_real(dtype):
    a = 1e8 * generator(3, (4, 4), dtype)
    for u in (conv_exp(a), conv_cayley(a)):
        assert (conv_singular_values(u) - 1).abs().max() <= EXACT


def test_negative_control_spectra_without_the_symmetry_are_not_unitary_kernels():
    # A unitary matrix at every frequency, drawn with no regard to conjugate pairs, has a complex
    # kernel; the real part that a real transform returns is not unitary.
    angles = gaussian(8, 8)
    kept = torch.fft.ifft2(torch.exp(1j * angles)).real
    assert (conv_singular_values(kept) - 1).abs().max() > 0.1
    # The same angles made odd, as those of a real kernel are.
    odd = conv_skew(angles)
    kept = torch.fft.ifft2(torch.exp(1j * odd)).real
    assert (conv_singular_values(kept) - 1).abs().max() < EXACT


def test_singular_kernels_have_a_real_unitary_polar_factor():
    for k in (torch.zeros(3, 3, 4, 4), torch.ones(3, 3, 4, 4), torch.zeros(2, 5, 3, 4)):
        assert (conv_singular_values(conv_polar(k.double())) - 1).abs().max() <= EXACT


# Derivatives ------------------------------------------------------------------


def skew_exp(w):
    return conv_exp(conv_skew(w))


def skew_cayley(w):
    return conv_cayley(conv_skew(w))


def log_of_exp(w):
    return conv_log(conv_exp(0.3 * conv_skew(w)))


@pytest.mark.parametrize("size", [(4,), (2, 3)], ids=str)
@pytest.mark.parametrize("channels", [1, 2])
@over_doubles
@pytest.mark.parametrize("f", [skew_exp, skew_cayley, log_of_exp, conv_polar])
def test_gradients(size, channels, dtype, f):
    w = kernel(channels, channels, size, dtype).requires_grad_()
    assert torch.autograd.gradcheck(f, (w,))


@over_doubles
def test_one_channel_derivative_in_every_mode(dtype):
    w = kernel(1, 1, (3, 4), dtype).requires_grad_()
    assert torch.autograd.gradcheck(skew_exp, (w,), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(skew_exp, (w,))


@over_doubles
def test_one_channel_derivative_is_one_product_with_the_kernel(dtype):
    a, h = generator(1, (4, 5), dtype).requires_grad_(), generator(1, (4, 5), dtype, seed=1)
    u, derivative = torch.autograd.functional.jvp(conv_exp, a, h)
    torch.testing.assert_close(derivative, conv_compose(u, h))
    # Against torch's own way through the transforms.
    g = kernel(1, 1, (4, 5), dtype, seed=2)
    (fast,) = torch.autograd.grad(conv_exp(a), a, g)
    through = torch.fft.ifft2(torch.exp(1j * torch.fft.fft2(a).imag))
    (slow,) = torch.autograd.grad(through if dtype.is_complex else through.real, a, g)
    torch.testing.assert_close(fast, slow)


@pytest.mark.parametrize("f", [conv_polar, conv_log, skew_exp])
def test_gradients_at_the_identity_are_finite(f):
    # All singular values and all eigenvalues are equal there.
    w = conv_identity(3, 3, (4, 4), dtype=torch.float64).requires_grad_()
    f(w).square().sum().backward()
    assert torch.isfinite(w.grad).all()
    w = (w.detach() + 1e-9 * kernel(3, 3, (4, 4))).requires_grad_()
    if f is conv_polar:
        f(w)[0, 1, 0, 0].backward()
        expected = torch.zeros_like(w)
        expected[0, 1, 0, 0], expected[1, 0, 0, 0] = 0.5, -0.5
        torch.testing.assert_close(w.grad, expected, atol=1e-6, rtol=0)


# Locality ---------------------------------------------------------------------


def local_generator(size):
    a = kernel(2, 2, (size, size))
    ring = torch.arange(size)
    near = torch.minimum(ring, size - ring) <= 1
    return conv_skew(a * near[:, None] * near) / 4


def test_decay_counts_every_site_once():
    k = kernel(2, 3, (6, 5))
    decay = conv_decay(k)
    assert decay.amplitude.shape == decay.mass_outside.shape == (4,)
    torch.testing.assert_close(decay.amplitude.square().sum(), k.square().sum())
    inside = k[:, :, [0, 1, 5]][..., [0, 1, 4]].square().sum()
    torch.testing.assert_close(decay.mass_outside[1], 1 - inside / k.square().sum())
    assert decay.mass_outside[-1] == 0


def test_exponential_of_a_local_generator_decays_faster_than_exponentially():
    decay = conv_decay(conv_exp(local_generator(32)))
    tail = decay.amplitude[2:10].log10()
    assert tail[-1] < -5
    steps = tail.diff()
    assert steps[-1] < 1.3 * steps[0]  # steeper and steeper
    assert decay.radius(mass=1e-6) <= 6 < decay.radius(mass=1e-16)
    assert decay.radius(mass=1.0) == 0


def test_truncation_reports_the_unitarity_it_costs():
    u = conv_exp(local_generator(16))
    lost = []
    for radius in (1, 3, 5, 8):
        cut = conv_truncate(u, radius=radius)
        sites = (cut.kernel != 0).any(0).any(0)
        assert int(sites.sum()) == min(2 * radius + 1, 16) ** 2
        worst = (conv_singular_values(cut.kernel) - 1).abs().max()
        assert cut.unitarity_lost == pytest.approx(float(worst))
        outside = float(conv_decay(u).mass_outside[radius])
        assert cut.mass_outside == pytest.approx(outside, rel=1e-6, abs=1e-15)
        lost.append(cut.unitarity_lost)
    assert lost[0] > 0.1 > lost[1] > 1e-3 > lost[2] > 1e-6 and lost[3] < EXACT
    oblong = conv_truncate(u, radius=(0, 2)).kernel
    assert int((oblong != 0).any(0).any(0).sum()) == 5


# Refusals ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conv_exp(kernel(2, 2, (4, 4))), "conv_skew"),
        (lambda: conv_exp(kernel(1, 1, (4, 4))), "conv_skew"),
        (lambda: conv_exp(kernel(1, 1, (4, 4)) * torch.nan), "conv_skew"),
        (lambda: conv_cayley(kernel(2, 2, (4,))), "conv_skew"),
        (lambda: conv_exp(kernel(2, 3, (4,))), "as many channels"),
        (lambda: conv_skew(kernel(2, 3, (4,))), "as many channels"),
        (lambda: conv_log(kernel(2, 2, (4,))), "conv_polar"),
        (lambda: conv_log(-conv_identity(2, 2, (4,))), "eigenvalue -1"),
        (lambda: conv_exp(torch.zeros(2, 2, 0)), "no sites"),
        (lambda: conv_exp(torch.zeros(3, 4, 4), ndim=2), "is needed"),
        (lambda: conv_exp(torch.zeros(())), "is needed"),
        (lambda: conv_apply(kernel(2, 2, (4, 4)), torch.zeros(2, 5, 5)), "torus of size"),
        (lambda: conv_apply(kernel(2, 2, (3, 3)), torch.zeros(2, 8, 8)), "pad the kernel"),
        (lambda: conv_apply(kernel(2, 2, (4, 4)), torch.zeros(3, 4, 4)), "2 channels"),
        (lambda: conv_apply(kernel(2, 2, (4, 4)), torch.zeros(4, 4)), "signal"),
        (lambda: conv_apply(torch.zeros(5, 2, 2, 4), torch.zeros(2, 4), ndim=1), "one kernel"),
        (lambda: conv_compose(kernel(2, 2, (4,)), kernel(3, 2, (4,))), "do not compose"),
        (lambda: conv_compose(kernel(2, 2, (4,)), kernel(2, 2, (5,))), "torus"),
        (lambda: conv_truncate(kernel(2, 2, (4, 4)), radius=-1), "radius"),
        (lambda: conv_truncate(kernel(2, 2, (4, 4)), radius=(1, 2, 3)), "radius"),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_generators_skew_to_rounding_are_taken():
    a = generator(2, (4, 4)).float()
    a = a + 1e-6 * kernel(2, 2, (4, 4)).float()
    assert (conv_singular_values(conv_exp(a)) - 1).abs().max() < 1e-6


def test_empty_channels_and_batches_pass_through():
    for shape in ((0, 0, 4), (0, 2, 2, 4)):
        k = torch.zeros(shape)
        for f in (conv_exp, conv_cayley, conv_log, conv_polar, conv_adjoint, conv_skew):
            assert f(k, ndim=1).shape == shape


def test_every_public_name_is_documented():
    names = [name for name in linalg.__all__ if name.startswith("conv_")]
    assert len(names) >= 14
    for name in names:
        assert "Args:" in getattr(linalg, name).__doc__ or name == "conv_identity"


def test_cached_tables_work_in_and_out_of_inference_mode():
    with torch.inference_mode():
        conv_polar(torch.randn(1, 1, 6, 7))
    w = torch.randn(1, 1, 6, 7, requires_grad=True)
    conv_polar(w).sum().backward()
    assert w.grad is not None


def test_frequencies_that_are_their_own_mirror_images_are_exactly_real():
    # A transform of this size leaves rounding there.
    spectrum = conv_spectrum(gaussian(3, 3, 30, 14, dtype=torch.float64))
    real = (spectrum.imag == 0).flatten(-2).all(-1)
    assert int(real.sum()) == 4  # (0, 0), (0, 7), (15, 0) and (15, 7)
