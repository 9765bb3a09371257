r"""The expected product of two neurons, :math:`E[\varphi(w \cdot x)\,\varphi(v \cdot x)]`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "activation_kernel",
    "as_activation",
    "cosine_kernel",
    "gauss_hermite",
    "pair_kernel",
    "second_moment",
    "smoothed",
]

_NODES = 64
_TAIL = 8.5  # standard deviations; the Gaussian is negligible in double beyond


@dataclass(frozen=True)
class Activation:
    """An elementwise activation φ.

    Attributes:
        name: its name.
        function: φ, elementwise on tensors.
        slope: slope below zero of a piecewise linear φ that is the identity above
            (0 for ReLU, 1 for the identity); None for any other φ.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    slope: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)


def leaky_relu(slope: float) -> Activation:
    """Return the leaky ReLU with this slope below zero."""
    if slope == 1.0:
        return ACTIVATIONS["identity"]
    name = "relu" if slope == 0.0 else f"leaky_relu({slope:g})"
    return Activation(name, lambda x: functional.leaky_relu(x, slope), slope)


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation("identity", lambda x: x, 1.0),
    "relu": Activation("relu", torch.relu, 0.0),
    "leaky_relu": Activation("leaky_relu", lambda x: functional.leaky_relu(x, 0.01), 0.01),
    "abs": Activation("abs", torch.abs, -1.0),
}
_SMOOTH = (
    "celu elu gelu hardsigmoid hardswish hardtanh mish relu6 selu sigmoid silu softplus softsign "
    "tanh tanhshrink"
)
ACTIVATIONS.update({n: Activation(n, getattr(functional, n)) for n in _SMOOTH.split()})
"""The activations that have a name; those with a slope have a closed form."""


def as_activation(activation: str | Activation | Callable[[Tensor], Tensor]) -> Activation:
    """Return an activation by name, or from an elementwise function.

    Args:
        activation: a name out of ``ACTIVATIONS``, or a function that maps a tensor
            elementwise.

    Raises:
        ValueError: the name is unknown, or the function is not elementwise.
        TypeError: it is neither a name nor a function.
    """
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation {activation!r} is unknown: choose from "
                f"{', '.join(sorted(ACTIVATIONS))}, or pass an elementwise function"
            )
        return ACTIVATIONS[activation]
    if not callable(activation):
        raise TypeError(f"an activation is a name or a function, got {activation!r}")
    known = _piecewise_linear(activation)
    if known is not None:
        return known
    name = getattr(activation, "__name__", type(activation).__name__.lower())
    found = Activation(name, lambda x: activation(x.clone()))  # the function may work in place
    numbers = torch.tensor([-1.0, 0.5, 2.0])
    whole, alone = found(numbers), [found(x) for x in numbers[:, None]]
    if whole.shape != numbers.shape or not torch.allclose(whole, torch.cat(alone)):
        raise ValueError(
            f"activation {name!r} is not elementwise: what it makes of a number depends on the "
            "others; pass a function that maps each number by itself"
        )
    return found


def _piecewise_linear(function: Callable[[Tensor], Tensor]) -> Activation | None:
    """Return the piecewise linear activation that a function or a module is, or None."""
    if isinstance(function, torch.nn.LeakyReLU):
        return leaky_relu(float(function.negative_slope))
    if isinstance(function, torch.nn.PReLU) and function.weight.numel() == 1:
        return leaky_relu(float(function.weight.detach()))
    for name, same in {
        "relu": (torch.relu, functional.relu, torch.nn.ReLU),
        "leaky_relu": (functional.leaky_relu,),
        "abs": (torch.abs,),
        "identity": (torch.nn.Identity,),
    }.items():
        if function in same or type(function) in same:
            return ACTIVATIONS[name]
    return None


def _apply(function: Any, c: Tensor) -> Tensor:
    result: Tensor = function.apply(c)
    return result


class _Order0(torch.autograd.Function):
    """(π - arccos c) / π, with a derivative that stays finite at c = ±1."""

    @staticmethod
    def forward(ctx: Any, c: Tensor) -> Tensor:
        ctx.save_for_backward(c)
        return 1 - torch.acos(c.clamp(-1, 1)) / math.pi

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        (c,) = ctx.saved_tensors
        sine = (1 - c * c).clamp_min(torch.finfo(c.dtype).eps).sqrt()
        result: Tensor = grad[0] / (math.pi * sine)
        return result


class _Order1(torch.autograd.Function):
    """(sin θ + (π - θ) cos θ) / π at c = cos θ; its derivative is the kernel of order 0."""

    @staticmethod
    def forward(ctx: Any, c: Tensor) -> Tensor:
        ctx.save_for_backward(c)
        c = c.clamp(-1, 1)
        return ((1 - c * c).sqrt() + (math.pi - torch.acos(c)) * c) / math.pi

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        (c,) = ctx.saved_tensors
        return _apply(_Order0, c) * grad[0]


def cosine_kernel(c: Tensor, *, slope: float = 0.0) -> Tensor:
    r"""Return :math:`E[\varphi(a)\varphi(b)]` of standard Gaussians with correlation ``c``.

    .. math::

        k(\cos\theta) = \frac{(1-\alpha)^2}{2\pi}
            \bigl(\sin\theta + (\pi-\theta)\cos\theta\bigr) + \alpha\cos\theta

    for the piecewise linear φ of slope α below zero. Its first derivative is continuous up to
    :math:`c = \pm 1`, and so is autograd's.

    Args:
        c: correlations in [-1, 1], any shape, real.
        slope: α; 0 is ReLU, 1 the identity.

    Reference:
        Cho and Saul, "Kernel methods for deep learning" (2009), section 2, order 1.
    """
    return 0.5 * (1 - slope) ** 2 * _apply(_Order1, c) + slope * c


@lru_cache(maxsize=16)
def _gauss(n: int, family: str) -> tuple[Tensor, Tensor]:
    """Nodes and weights, of sum one, for the standard normal or the uniform law on [-1, 1]."""
    k = torch.arange(1, n, dtype=torch.float64)
    off = k.sqrt() if family == "hermite" else k / (4 * k * k - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return nodes, vectors[0] ** 2


def gauss_hermite(n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return nodes and weights with :math:`E f(z) \approx \sum_j \omega_j f(z_j)`, z ~ N(0, 1).

    Args:
        n: number of nodes; exact for polynomials of degree below 2 n.
        like: dtype and device of the result.

    Returns:
        Two tensors of shape ``(n,)``.

    Reference:
        Golub and Welsch, "Calculation of Gauss quadrature rules" (1969).
    """
    nodes, weights = _gauss(n, "hermite")
    return nodes.to(like), weights.to(like)


def _between_kinks(first: Tensor, second: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights (..., 3 n) for z ~ N(0, 1), for functions smooth except at two points."""
    low = torch.minimum(first, second).clamp(-_TAIL, _TAIL)
    high = torch.maximum(first, second).clamp(-_TAIL, _TAIL)
    end = torch.full_like(low, _TAIL)
    edges = torch.stack([-end, low, high, end], dim=-1)
    half = 0.5 * (edges[..., 1:] - edges[..., :-1])[..., None]
    middle = 0.5 * (edges[..., 1:] + edges[..., :-1])[..., None]
    nodes, weights = (t.to(first) for t in _gauss(n, "legendre"))
    z = (middle + half * nodes).flatten(-2)
    density = torch.exp(-0.5 * z * z) * math.sqrt(2 / math.pi)
    return z, (half * weights).flatten(-2) * density


def smoothed(mean: Tensor, std: Tensor, activation: Activation, *, nodes: int = 32) -> Tensor:
    r"""Return :math:`E\,\varphi(\mu + \sigma z)`, z ~ N(0, 1), for each μ and σ ≥ 0.

    In closed form, :math:`\mu\Phi(\mu/\sigma) + \sigma\phi(\mu/\sigma)` for ReLU, where φ is
    piecewise linear; by Gauss-Hermite quadrature for any other.

    Args:
        mean: any shape.
        std: broadcasts with ``mean``.
        activation: φ.
        nodes: number of quadrature nodes.
    """
    if activation.slope is None:
        # Node by node: all at once would take the memory of one layer per node.
        z, weight = (t.tolist() for t in gauss_hermite(nodes, mean))
        total = torch.zeros_like(mean)
        for node, share in zip(z, weight, strict=True):
            total = total + share * activation(mean + node * std)
        return total
    safe = std.clamp_min(torch.finfo(std.dtype).tiny)
    ratio = (mean / safe).clamp(-40, 40)
    density = torch.exp(-0.5 * ratio**2) / math.sqrt(2 * math.pi)
    relu = torch.where(ratio.abs() < 40, mean * torch.special.ndtr(ratio) + std * density, 0)
    relu = torch.where(ratio >= 40, mean, relu)
    return activation.slope * mean + (1 - activation.slope) * relu


def pair_kernel(
    p: Tensor,
    q: Tensor,
    c: Tensor,
    activation: Activation,
    *,
    p_bias: Tensor | None = None,
    q_bias: Tensor | None = None,
    nodes: int = _NODES,
) -> Tensor:
    r"""Return :math:`E[\varphi(p\,a + \beta)\,\varphi(q\,b + \gamma)]`, Gaussians of correlation c.

    Args:
        p: standard deviation of the first, any shape.
        q: standard deviation of the second, same shape.
        c: their correlation, same shape.
        activation: φ.
        p_bias: β, the mean of the first, same shape; None is zero.
        q_bias: γ, the mean of the second, same shape; None is zero.
        nodes: number of quadrature nodes where there is no closed form.

    Returns:
        The expectations, of the same shape.
    """
    linear = activation.slope == 1.0
    if activation.slope is not None and (linear or (p_bias is None and q_bias is None)):
        product = p * q * cosine_kernel(c, slope=activation.slope)
        return product if p_bias is None or q_bias is None else product + p_bias * q_bias
    beta = torch.zeros_like(p) if p_bias is None else p_bias
    gamma = torch.zeros_like(q) if q_bias is None else q_bias
    if activation.slope is None:
        z, weight = gauss_hermite(nodes, p)
    else:
        tiny = torch.finfo(p.dtype).tiny
        first = -gamma / q.clamp_min(tiny)
        second = -beta / (p * c).abs().clamp_min(tiny) * c.sign()
        z, weight = _between_kinks(first.detach(), second.detach(), nodes)
    sine = (1 - c * c).clamp_min(torch.finfo(c.dtype).eps ** 2).sqrt()
    mean = beta[..., None] + (p * c)[..., None] * z
    inner = smoothed(mean, (p * sine)[..., None], activation, nodes=nodes)
    outer = activation(gamma[..., None] + q[..., None] * z)
    result: Tensor = (inner * outer * weight).sum(-1)
    return result


def second_moment(
    q: Tensor, activation: Activation, *, bias: Tensor | None = None, nodes: int = _NODES
) -> Tensor:
    r"""Return :math:`E\,\varphi(q\,z + \gamma)^2`, z ~ N(0, 1), of one neuron.

    Args:
        q: standard deviations, any shape.
        activation: φ.
        bias: γ, of that shape; None is zero.
        nodes: number of quadrature nodes where there is no closed form.
    """
    if activation.slope is not None:
        below, linear = activation.slope**2, q * q
        if bias is None:
            return 0.5 * (1 + below) * linear
        linear = linear + bias * bias
        ratio = (bias / q.clamp_min(torch.finfo(q.dtype).tiny)).clamp(-40, 40)
        density = torch.exp(-0.5 * ratio**2) / math.sqrt(2 * math.pi)
        relu = linear * torch.special.ndtr(ratio) + bias * q * density
        mixed: Tensor = below * linear + (1 - below) * relu
        return mixed
    z, weight = gauss_hermite(nodes, q)
    gamma = torch.zeros_like(q) if bias is None else bias
    value = activation(gamma[..., None] + q[..., None] * z)
    return (value * value) @ weight


def activation_kernel(
    w: Tensor,
    v: Tensor,
    *,
    activation: str | Activation | Callable[[Tensor], Tensor] = "relu",
    w_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    nodes: int = _NODES,
) -> Tensor:
    r"""Return the expected product of two neurons on Gaussian inputs.

    .. math:: k(w, v) = E_{x \sim N(0, I)}\bigl[\varphi(w \cdot x + \beta)\,
              \varphi(v \cdot x + \gamma)\bigr]

    For ReLU and leaky ReLU without biases it is the arc-cosine kernel of order 1,

    .. math:: k(w, v) = \frac{|w||v|}{2\pi}\bigl(\sin\theta + (\pi - \theta)\cos\theta\bigr),
              \qquad \cos\theta = \frac{w \cdot v}{|w||v|},

    exact to rounding; for other activations, or with biases, Gauss-Hermite quadrature in the plane
    of w and v, spectrally accurate for smooth φ. The squared distance of two neurons as functions
    is :math:`k(w,w) - 2k(w,v) + k(v,v)`. Gradients are finite everywhere, also at :math:`w = \pm v`
    and at zero (where it is set to zero).

    Args:
        w: first weights, shape ``(..., d)``, real floating point.
        v: second weights, broadcasts with ``w``.
        activation: a name such as ``"relu"``, ``"leaky_relu"``, ``"tanh"``, ``"gelu"``, or an
            elementwise function.
        w_bias: β, shape ``(...)``; None is zero.
        v_bias: γ, shape ``(...)``; None is zero.
        nodes: quadrature nodes in each of the two directions.

    Returns:
        The expectations, shape ``(...)``, dtype of ``w``.

    Raises:
        ValueError: the activation is unknown, or the last dimensions differ.
        TypeError: the weights are not real floating point.

    Reference:
        Cho and Saul (2009), section 2; Vodrahalli et al., "Nonlinear initialization methods
        for low-rank neural networks" (2022), section 3, for its use.
    """
    phi = as_activation(activation)
    if not (w.is_floating_point() and v.is_floating_point()):
        raise TypeError(f"real floating point weights are needed, got {w.dtype=}, {v.dtype=}")
    if w.shape[-1:] != v.shape[-1:]:
        raise ValueError(f"the last dimensions must agree, got {w.shape=}, {v.shape=}")
    p = torch.linalg.vector_norm(w, dim=-1)
    q = torch.linalg.vector_norm(v, dim=-1)
    p, q = torch.broadcast_tensors(p, q)
    # Divided one by one: the product of two small norms could underflow.
    u = w / torch.where(p > 0, p, 1)[..., None]
    c = (u * v).sum(-1) / torch.where(q > 0, q, 1)
    return pair_kernel(p, q, c, phi, p_bias=w_bias, q_bias=v_bias, nodes=nodes)
