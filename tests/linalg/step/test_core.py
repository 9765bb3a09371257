"""φ on a core: one function of angles, against matrix functions, at any size and with a cap."""

from __future__ import annotations

import pytest
import torch

from riemann_unn.linalg import check_phi, core_minus_identity, polar, skew
from riemann_unn.linalg.step.core import (
    ANGLES,
    leading_directions,
    leading_of,
    plane_minus_identity,
    planes_of,
)
from tests.support import DTYPES, double, every, gaussian

PHIS = list(ANGLES)
DOUBLES = [torch.float64, torch.complex128]


def core(m, dtype, size, seed=0, batch=()):
    k = skew(gaussian(*batch, m, m, dtype=dtype, seed=seed))
    return k * (size / torch.linalg.matrix_norm(double(k), 2).max().to(k.dtype.to_real()))


def oracle(k, phi):
    eye = torch.eye(k.shape[-1], dtype=k.dtype)
    if phi == "exp":
        return torch.linalg.matrix_exp(k)
    if phi == "cayley":
        return torch.linalg.inv(eye - k / 2) @ (eye + k / 2)
    return polar(eye + k)


def off(turn):
    """How far I + turn is from unitary, formed without rounding turn away."""
    return float((turn + turn.mH + turn.mH @ turn).abs().max())


@pytest.mark.parametrize("phi", PHIS)
@every("dtype", DTYPES)
@every("m", [1, 2, 3, 8])
@every("size", [1e-12, 1e-3, 1.0, 30.0])
def test_against_matrix_functions(phi, dtype, m, size):
    for batch in ((), (3,)):
        k = core(m, dtype, size, batch=batch) if m > 1 or dtype.is_complex else gaussian(1, 1) * 0
        turn, angle = core_minus_identity(k, phi)
        eye = torch.eye(m, dtype=turn.dtype)
        assert turn.dtype == double(k).dtype and turn.is_complex() == k.is_complex()
        assert (turn - (oracle(double(k), phi) - eye)).abs().max() <= 1e-13 * max(size, 1)
        assert off(turn) <= 2e-15
        # Relative accuracy: a tiny step is its generator, to all digits.
        if size == 1e-12:
            assert (turn - skew(double(k))).abs().max() <= 2e-12 * size
        largest = torch.linalg.matrix_norm(double(k), 2)
        assert (angle - ANGLES[phi](largest)).abs().max() <= 1e-12 * max(size, 1)
    if size >= 1 and (m > 1 or dtype.is_complex):
        assert (turn - (oracle(-double(k), phi) - eye)).abs().max() > 1e-2  # the check can fail


@every("phi", PHIS)
@every("dtype", DOUBLES)
@every("size", [1e6, 1e16, 1e30])
def test_huge_angles_stay_unitary(phi, dtype, size):
    for m in (2, 3, 8):
        for seed in range(5):
            assert off(core_minus_identity(core(m, dtype, size, seed=seed), phi)[0]) <= 2e-14
    # Two planes with one angle: which eigenvectors are found is up to rounding.
    block = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=dtype)
    u = polar(gaussian(4, 4, dtype=dtype))
    k = u @ torch.block_diag(block, block) @ u.mH * size
    assert off(core_minus_identity(k, phi)[0]) <= 2e-14


@every("phi", PHIS)
def test_zero_is_exactly_the_identity(phi):
    for dtype in DTYPES:
        turn, angle = core_minus_identity(torch.zeros(2, 4, 4, dtype=dtype), phi)
        assert not turn.any() and not angle.any()


@every("phi", PHIS)
@every("size", [0.0, 1e-12, 0.3, 3.0, 1e3])
@every("is_complex", [False, True])
def test_a_plane_in_closed_form_is_the_core(phi, size, is_complex):
    corner = size * gaussian(6, seed=1) * is_complex
    beside = size * gaussian(6, seed=2).abs()
    beside[0] = 0
    turn, angle = plane_minus_identity(corner, beside, phi)
    k = torch.zeros(6, 2, 2, dtype=torch.complex128)
    k[:, 0, 0], k[:, 0, 1], k[:, 1, 0] = 1j * corner, -beside, beside
    expected, largest = core_minus_identity(k if is_complex else k.real, phi)
    assert (turn - expected).abs().max() <= 1e-14 * max(size, 1)
    assert (angle - largest).abs().max() <= 1e-13 * max(size, 1)
    assert off(turn) <= 4e-15
    if not is_complex:
        assert not turn.imag.any()
    if size >= 0.3:
        wrong, _ = core_minus_identity(-k if is_complex else -k.real, phi)
        assert (turn - wrong).abs().max() > 1e-3


@every("phi", [*PHIS, torch.sinh])
@every("dtype", DTYPES)
def test_no_plane_turns_further_than_the_cap(phi, dtype):
    for size in (1e-3, 0.5, 100.0):
        k = core(6, dtype, size)
        for cap in (1e-2, 0.2, 3.0):
            turn, angle = core_minus_identity(k, phi, max_angle=cap)
            eye = torch.eye(6, dtype=turn.dtype)
            turned = torch.angle(torch.linalg.eigvals(eye + turn)).abs().max()
            assert turned <= cap + 1e-12 and float(angle) <= cap
            if size <= cap and phi in PHIS:  # what is shorter is left alone
                assert torch.equal(turn, core_minus_identity(k, phi)[0])
            elif phi == "exp":  # and what is longer is shortened, all planes alike
                expected = torch.linalg.matrix_exp(double(k) * (cap / size)) - eye
                assert (turn - expected).abs().max() <= 1e-6
    beside = torch.tensor([0.0, 0.1, 5.0], dtype=torch.float64)
    _, angle = plane_minus_identity(beside, beside, phi, max_angle=0.2)
    assert angle.max() <= 0.2


def test_a_function_of_angles_of_ones_own():
    k = core(5, torch.float64, 0.7)
    turn, _ = core_minus_identity(k, lambda theta: 2 * torch.atan(theta / 2))
    assert (turn - core_minus_identity(k, "cayley")[0]).abs().max() <= 1e-15
    check_phi(torch.sin)
    for wrong, message in (
        (torch.cos, "must be an odd function"),
        (lambda theta: 2 * theta, "slope 1 at zero"),
        ("qr", "phi='qr' is unknown; choose from"),
        (None, "phi=None is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            check_phi(wrong)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_leading_directions_hold_all_of_a_core_that_has_no_more_planes(count):
    """Ω of rank 2 count is known on them; a real matrix of a complex batch has real ones."""
    real = gaussian(6, 2 * count, seed=1) @ core(2 * count, torch.float64, 1.0)
    real = real @ gaussian(6, 2 * count, seed=1).mT
    left = gaussian(6, count, dtype=torch.complex128, seed=2)
    right = gaussian(6, count, dtype=torch.complex128, seed=3)
    k = torch.stack([real.to(left.dtype), skew(left @ right.mH), torch.zeros_like(left @ left.mH)])
    theta, v = planes_of(k)
    found = leading_directions(k, theta, v, count)
    assert not found[0].imag.any() and not found[2].imag.any()
    eye = torch.eye(6, dtype=k.dtype)
    for one, start in zip(k[:2], found[:2], strict=True):
        rest = eye - start @ start.mH
        assert (rest @ one @ rest).abs().max() <= 1e-12
        if count > 1:  # one column too few leaves a plane out
            rest = eye - start[:, 1:] @ start[:, 1:].mH
            assert (rest @ one @ rest).abs().max() > 1e-3
    start = torch.linalg.qr(leading_of(real, count))[0]
    rest = torch.eye(6, dtype=real.dtype) - start @ start.mT
    assert (rest @ real @ rest).abs().max() <= 1e-12
