"""E[φ(w·x) φ(v·x)]: against sampling, against quadrature, and its gradients where it has kinks."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from riemann_unn.linalg import ACTIVATIONS, activation_kernel, gauss_hermite
from riemann_unn.linalg.low_rank.activation_kernel import as_activation, second_moment, smoothed
from tests.support import gaussian, rounding

NAMES = ["relu", "leaky_relu", "identity", "abs", "tanh", "gelu", "silu", "sigmoid", "elu"]


def around_the_plane(w: Tensor, v: Tensor, activation: str) -> float:
    """The oracle: polar coordinates in the plane of w and v, midpoints, no kernel."""
    p, q = float(w.norm()), float(v.norm())
    theta = math.acos(max(-1.0, min(1.0, float(w @ v) / (p * q))))
    f = ACTIVATIONS[activation]
    # For homogeneous φ the radius separates: E r^2 = 2.
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) * (2 * math.pi / 200_000)
    return float((f(p * t.cos()) * f(q * (t - theta).cos())).mean() * 2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("biased", [False, True])
def test_against_monte_carlo(name, biased):
    w, v = gaussian(2, 4, 3, seed=1)
    beta, gamma = gaussian(2, 4, seed=2) if biased else (None, None)
    x = gaussian(1_000_000, 3, seed=3)
    f = as_activation(name)
    product = f(x @ w.mH + (0 if beta is None else beta))
    product = product * f(x @ v.mH + (0 if gamma is None else gamma))
    deviation = product.std(0) / 1000
    got = activation_kernel(w, v, activation=name, w_bias=beta, v_bias=gamma)
    assert ((got - product.mean(0)).abs() <= 4 * deviation).all()
    # The control: the kernel of another activation is not as near.
    other = activation_kernel(w, v, activation="softplus", w_bias=beta, v_bias=gamma)
    assert ((other - product.mean(0)).abs() > 4 * deviation).any()


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "identity", "abs"])
def test_closed_form_is_exact(name):
    w, v = gaussian(2, 20, 5, seed=4)
    got = activation_kernel(w, v, activation=name)
    want = [around_the_plane(a, b, name) for a, b in zip(w, v, strict=True)]
    # Midpoints of a periodic function with corners are exact to h^2, about 1e-9.
    assert torch.allclose(got, torch.tensor(want, dtype=torch.float64), atol=1e-8, rtol=1e-8)
    ones = activation_kernel(w, w, activation=name)
    slope = ACTIVATIONS[name].slope
    assert torch.allclose(ones, 0.5 * (1 + slope**2) * (w * w).sum(-1), rtol=1e-12, atol=0)
    # Positively homogeneous of degree one, at any size.
    scaled = activation_kernel(1e-150 * w, 1e120 * v, activation=name)
    assert torch.allclose(scaled, 1e-30 * got, rtol=1e-12, atol=1e-42)


def test_relu_at_known_angles():
    e = torch.eye(2, dtype=torch.float64)
    half = torch.tensor([1.0, math.sqrt(3)], dtype=torch.float64) / 2
    known = {0: 0.5, 1: 1 / (2 * math.pi), 2: 0.0}
    got = [float(activation_kernel(e[0], v)) for v in (e[0], e[1], -e[0])]
    assert got == pytest.approx(list(known.values()), abs=1e-15)
    third = (math.sqrt(3) / 2 + (2 * math.pi / 3) / 2) / (2 * math.pi)
    assert float(activation_kernel(e[0], half)) == pytest.approx(third, abs=1e-15)


@pytest.mark.parametrize("name", ["relu", "leaky_relu"])
def test_quadrature_agrees_with_the_closed_form(name):
    w, v = gaussian(2, 10, 4, seed=5)
    zero = torch.zeros(10, dtype=torch.float64)
    closed = activation_kernel(w, v, activation=name)
    panels = activation_kernel(w, v, activation=name, w_bias=zero, v_bias=zero)
    assert torch.allclose(panels, closed, rtol=1e-12, atol=1e-12)
    plain = activation_kernel(w, v, activation=lambda x: ACTIVATIONS[name].function(x), nodes=200)
    assert torch.allclose(plain, closed, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["tanh", "gelu", "sigmoid"])
def test_smooth_activations_converge(name):
    w, v = 0.5 * gaussian(2, 10, 4, seed=6)
    coarse, fine = (activation_kernel(w, v, activation=name, nodes=n) for n in (64, 200))
    assert torch.allclose(coarse, fine, atol=1e-6)
    few = activation_kernel(w, v, activation=name, nodes=3)
    assert not torch.allclose(few, fine, atol=1e-6)


@pytest.mark.parametrize("name", ["relu", "leaky_relu"])
def test_gradients(name):
    w, v = gaussian(2, 4, 3, seed=7)
    args = (w.requires_grad_(), v.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: activation_kernel(a, b, activation=name), args)
    assert torch.autograd.gradgradcheck(lambda a, b: activation_kernel(a, b, activation=name), args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [1.0, -1.0, 0.0, 2.0, 1 + 1e-9])
def test_gradients_are_finite_at_the_kinks(factor, dtype):
    w = gaussian(6, 5, dtype=dtype, seed=8).requires_grad_()
    v = (factor * w.detach()).requires_grad_()
    value = activation_kernel(w, v)
    one, two = torch.autograd.grad(value.sum(), (w, v))
    assert torch.isfinite(one).all() and torch.isfinite(two).all()
    # dk/dw = (|v| sin θ w/|w| + (π - θ) v) / 2π: v/2 at θ = 0, zero at θ = π.
    want = (0.5 * v if factor > 0 else torch.zeros_like(v)).detach()
    limit = 1e-3 if dtype == torch.float32 else 1e-4 if factor > 1 else 1e-7
    assert torch.allclose(one, want, atol=limit)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "tanh"])
@pytest.mark.parametrize("factor", [1.0, -1.0, 0.0])
def test_gradients_with_biases_are_finite_at_the_kinks(name, factor):
    w = gaussian(6, 5, seed=8)
    w[0] = 0
    w.requires_grad_()
    v = (factor * w.detach()).requires_grad_()
    biases = [gaussian(6, seed=9).requires_grad_(), torch.zeros(6).double().requires_grad_()]
    value = activation_kernel(w, v, activation=name, w_bias=biases[0], v_bias=biases[1])
    for gradient in torch.autograd.grad(value.sum(), (w, v, *biases)):
        assert torch.isfinite(gradient).all()


def test_moments_of_one_neuron():
    q, bias = torch.linspace(0.1, 3, 12, dtype=torch.float64), gaussian(12, seed=9)
    z, weight = gauss_hermite(400, q)
    for name in ("relu", "leaky_relu", "tanh", "gelu"):
        f = ACTIVATIONS[name]
        value = f(q[:, None] * z + bias[:, None])
        tolerance = 2e-3 if f.slope is not None else 1e-3
        assert torch.allclose((value**2) @ weight, second_moment(q, f, bias=bias), atol=tolerance)
        assert torch.allclose(value @ weight, smoothed(bias, q, f), atol=6e-3)


def test_hermite_nodes_are_exact_for_polynomials():
    z, weight = gauss_hermite(6, torch.zeros((), dtype=torch.float64))
    moments = [float((z**k) @ weight) for k in range(13)]
    odd_factorials = [1, 0, 1, 0, 3, 0, 15, 0, 105, 0, 945, 0]
    assert moments[:12] == pytest.approx(odd_factorials, abs=rounding(torch.float64, 6, 1e5))
    assert moments[12] != pytest.approx(10395, rel=1e-3)


def test_bad_input():
    w = gaussian(3, 4)
    with pytest.raises(ValueError, match="'rellu' is unknown: choose from"):
        activation_kernel(w, w, activation="rellu")
    with pytest.raises(ValueError, match="last dimensions"):
        activation_kernel(w, gaussian(3, 5))
    with pytest.raises(TypeError, match="real floating"):
        activation_kernel(w.to(torch.complex128), w)
    with pytest.raises(TypeError, match="a name or a function"):
        activation_kernel(w, w, activation=3)


def test_functions_and_modules_are_recognised():
    assert as_activation(functional.relu).slope == 0
    assert as_activation(functional.leaky_relu).slope == 0.01
    assert as_activation(torch.nn.LeakyReLU(0.3)).slope == 0.3
    assert as_activation(torch.nn.PReLU(init=0.2)).slope == pytest.approx(0.2)
    assert as_activation(torch.nn.Identity()).slope == 1
    assert as_activation(torch.abs).slope == -1
    assert as_activation(torch.nn.SiLU()).slope is None
    x = gaussian(4)
    before = x.clone()
    as_activation(torch.nn.ELU(inplace=True))(x)
    assert torch.equal(x, before)
    for coupled in (torch.nn.Softmax(dim=0), torch.sum, lambda x: x[:1]):
        with pytest.raises(ValueError, match="not elementwise"):
            as_activation(coupled)
