"""modReLU and the phase sigmoid by their formulas, and where they have no derivative."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from riemann_unn.nn import ModReLU, PhaseSigmoid
from tests.support import gaussian

REAL_AND_COMPLEX = [torch.float64, torch.complex128]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", REAL_AND_COMPLEX)
def test_modrelu_keeps_the_phase_and_shifts_the_modulus(dtype: torch.dtype) -> None:
    layer = ModReLU(5, dtype=dtype)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([-0.5, -0.1, 0.0, 0.2, 1.0]))
    z = torch.randn(100, 5, dtype=dtype)
    out = layer(z)
    torch.testing.assert_close(out.abs(), (z.abs() + layer.bias).clamp(min=0))
    kept = out.abs() > 0
    assert kept.any() and not kept.all()
    torch.testing.assert_close((out / out.abs())[kept], (z / z.abs())[kept])


@pytest.mark.parametrize("dtype", REAL_AND_COMPLEX)
def test_modrelu_gradcheck(dtype: torch.dtype) -> None:
    layer = ModReLU(6, dtype=dtype)
    with torch.no_grad():
        layer.bias.uniform_(-0.3, 0.3)
    z = torch.randn(4, 6, dtype=dtype)
    z = (z / z.abs() * (z.abs() + 0.5)).requires_grad_()  # away from the kink, where |z| = -b

    def call(z: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"bias": bias}, (z,))

    bias = layer.bias.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(call, (z, bias))
    assert torch.autograd.gradgradcheck(call, (z, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, *REAL_AND_COMPLEX])
@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-30])
def test_modrelu_gradient_is_finite_at_and_near_zero(dtype: torch.dtype, size: float) -> None:
    layer = ModReLU(3, dtype=dtype)
    nn.init.constant_(layer.bias, 0.5)
    z = torch.full((2, 3), size, dtype=dtype, requires_grad=True)
    out = layer(z)
    torch.view_as_real(out).sum().backward() if dtype.is_complex else out.sum().backward()
    assert out.isfinite().all() and z.grad is not None and z.grad.isfinite().all()
    assert layer.bias.grad is not None and layer.bias.grad.isfinite().all()
    if size == 0.0:
        assert not out.any() and not z.grad.any() and not layer.bias.grad.any()


def test_modrelu_complex_with_zero_imaginary_part_equals_real() -> None:
    real, unitary = ModReLU(7, dtype=torch.float64), ModReLU(7, dtype=torch.complex128)
    unitary.load_state_dict(real.state_dict())
    z = torch.randn(50, 7, dtype=torch.float64)
    z[0] = 0
    torch.testing.assert_close(unitary(z.to(torch.complex128)), real(z).to(torch.complex128))


def test_modrelu_bias_is_real_small_and_refuses_bad_arguments() -> None:
    layer = ModReLU(100, dtype=torch.complex64)
    assert layer.bias.dtype == torch.float32
    assert 0 < layer.bias.abs().max() <= 0.01
    with pytest.raises(ValueError, match="features must be positive, got 0"):
        ModReLU(0)
    with pytest.raises(ValueError, match="floating or complex"):
        ModReLU(3, dtype=torch.int64)


def test_phase_sigmoid_settles_where_it_says():
    activation, z = PhaseSigmoid(2.0), gaussian(50, dtype=torch.complex128)
    phases = z.angle()
    for _ in range(60):
        z = activation(z)
    torch.testing.assert_close(z.abs(), torch.full((50,), 0.75**0.5, dtype=torch.float64))
    torch.testing.assert_close(z.angle(), phases)
    z = torch.zeros(3, dtype=torch.complex128, requires_grad=True)
    activation(z).abs().square().sum().backward()
    assert torch.isfinite(torch.view_as_real(z.grad)).all()
