"""Maps between kernels: skew part, and the exponential, Cayley and polar maps to unitary ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..hermitian import hermitian_function
from ..maps import cayley, exp_skew, polar, skew
from .algebra import conv_adjoint
from .spectrum import conv_from_spectrum, conv_spectrum, hat, unhat, with_channels

__all__ = ["conv_cayley", "conv_exp", "conv_log", "conv_polar", "conv_skew"]

# A generator this far from skew, relative to its size, is a mistake and not rounding.
_SKEW_TO = 1e-4
_UNITARY_TO = 1e-3


def _check_square(kernel: Tensor, ndim: int, name: str) -> None:
    out_channels, in_channels = kernel.shape[-ndim - 2 : -ndim]
    if out_channels != in_channels:
        raise ValueError(
            f"{name} needs as many channels out as in, got a kernel {tuple(kernel.shape)}"
        )


def _check_skew(wrong: Tensor, largest: Tensor, name: str) -> None:
    if not bool(wrong <= _SKEW_TO * largest):
        raise ValueError(
            f"{name} needs a skew-Hermitian generator, A(-x) = -A(x)^H; this one is "
            f"{float(wrong):.1e} off, with entries to {float(largest):.1e} in its spectrum; "
            "take riemann_unn.linalg.conv_skew of it"
        )


def _generator(kernel: Tensor, ndim: int, name: str) -> Tensor:
    """Return the matrices of a generator, after a check, exactly skew-Hermitian."""
    matrices = conv_spectrum(kernel, ndim=ndim)
    generator = skew(matrices)
    with torch.no_grad():
        if matrices.numel() > 0:
            wrong = (matrices - generator).abs().amax()
            _check_skew(wrong, matrices.abs().amax(), name)
    return generator


def _kernel(matrices: Tensor, like: Tensor, ndim: int, *, bare: bool) -> Tensor:
    size = tuple(like.shape[-ndim:])
    kernel = conv_from_spectrum(matrices, size=size, real=not like.is_complex()).to(like.dtype)
    return kernel[0, 0] if bare else kernel


def _unhat(spectrum: Tensor, like: Tensor, ndim: int) -> Tensor:
    return unhat(spectrum, size=tuple(like.shape[-ndim:]), real=not like.is_complex())


class _OneChannelExp(torch.autograd.Function):
    """exp of a one-channel generator and its derivative, D exp(A)[H] = exp(A) * H.

    Kernels of one channel commute, so the derivative is a product with the result, and nothing else
    is saved for it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(generator: Tensor, ndim: int) -> Tensor:
        spectrum = hat(generator, ndim=ndim)
        angle = spectrum.imag.contiguous()
        wrong, largest = spectrum.real.abs().amax(), angle.abs().amax()
        _check_skew(wrong, torch.maximum(wrong, largest), "conv_exp")
        # torch.polar and a complex exp take ten times as long, not being vectorised.
        return _unhat(torch.complex(angle.cos(), angle.sin()), generator, ndim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.ndim = inputs[1]
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (u,), (grad,) = ctx.saved_tensors, grads
        product = hat(u, ndim=ctx.ndim).conj() * hat(grad, ndim=ctx.ndim)
        return _unhat(1j * product.imag, u, ctx.ndim), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (u,), tangent = ctx.saved_tensors, tangents[0]
        derivative = hat(u, ndim=ctx.ndim) * (1j * hat(tangent, ndim=ctx.ndim).imag)
        return _unhat(derivative, u, ctx.ndim)


def conv_skew(kernel: Tensor, *, ndim: int | None = None) -> Tensor:
    r"""Return the skew-Hermitian part of a kernel, a generator of unitary ones.

    .. math:: \operatorname{skew}(K) = \tfrac12 (K - K^H), \qquad A(-x) = -A(x)^H

    Args:
        kernel: shape ``(..., n, n, *size)``, or ``(*size)`` for one channel.
        ndim: dimensions of the lattice; by default all but the first two.

    Raises:
        ValueError: the shape is not that of a square kernel.
    """
    full, count, _ = with_channels(kernel, ndim=ndim)
    _check_square(full, count, "conv_skew")
    return 0.5 * (kernel - conv_adjoint(kernel, ndim=ndim))


def conv_exp(generator: Tensor, *, ndim: int | None = None) -> Tensor:
    r"""Return the convolutional exponential of a skew-Hermitian kernel, a unitary kernel.

    .. math:: \exp(A) = \delta + A + \tfrac12 A * A + \dots, \qquad
        \widehat{\exp(A)}(f) = \exp\bigl(\hat A(f)\bigr)

    A matrix exponential at each frequency, for one channel a complex number of
    modulus 1. For real generators the result is real. A generator that is skew
    to within 1e-4 of its size counts as one and its skew part is used.

    Args:
        generator: shape ``(..., n, n, *size)``, or ``(*size)`` for one channel,
            with :math:`A(-x) = -A(x)^H`, see :func:`conv_skew`.
        ndim: dimensions of the lattice; by default all but the first two.

    Returns:
        The unitary kernel, shape and dtype of ``generator``; differentiable.

    Raises:
        ValueError: the shape is not that of a square kernel, or it is not skew.

    Reference:
        Magnasco, "Convolutional unitary or orthogonal recurrent neural networks"
        (2023), for the exponential and its derivative on one channel;
        Hoogeboom et al., "The convolution exponential" (2020), for many.
    """
    kernel, ndim, bare = with_channels(generator, ndim=ndim)
    _check_square(kernel, ndim, "conv_exp")
    if kernel.numel() == 0:
        return generator.clone()
    if kernel.shape[-ndim - 1] == 1 and torch.finfo(kernel.dtype).bits >= 32:
        result: Tensor = _OneChannelExp.apply(kernel, ndim)  # type: ignore[no-untyped-call]
        return result[0, 0] if bare else result
    return _kernel(exp_skew(_generator(kernel, ndim, "conv_exp")), kernel, ndim, bare=bare)


def conv_cayley(generator: Tensor, *, ndim: int | None = None) -> Tensor:
    r"""Return the Cayley transform of a skew-Hermitian kernel, a unitary kernel.

    .. math:: U = (\delta - \tfrac12 A)^{-1} * (\delta + \tfrac12 A)

    Args:
        generator: shape ``(..., n, n, *size)``, or ``(*size)`` for one channel, skew.
        ndim: dimensions of the lattice; by default all but the first two.

    Returns:
        The unitary kernel, shape and dtype of ``generator``; differentiable.

    Raises:
        ValueError: the shape is not that of a square kernel, or it is not skew.

    Reference:
        Trockman and Kolter, "Orthogonalizing convolutional layers with the
        Cayley transform" (2021), section 4.
    """
    kernel, ndim, bare = with_channels(generator, ndim=ndim)
    _check_square(kernel, ndim, "conv_cayley")
    return _kernel(cayley(_generator(kernel, ndim, "conv_cayley")), kernel, ndim, bare=bare)


def conv_log(kernel: Tensor, *, ndim: int | None = None) -> Tensor:
    r"""Return the principal logarithm of a unitary kernel near the identity, a generator.

    .. math:: \log U = 2 \operatorname{artanh}\bigl((U - \delta) * (U + \delta)^{-1}\bigr)

    Its matrices have eigenvalues in :math:`(-i\pi, i\pi)`; so it undoes
    :func:`conv_exp` of generators whose norm at each frequency is below π.

    Args:
        kernel: unitary, shape ``(..., n, n, *size)``, or ``(*size)`` for one channel.
        ndim: dimensions of the lattice; by default all but the first two.

    Returns:
        The skew-Hermitian generator, shape and dtype of ``kernel``; differentiable.

    Raises:
        ValueError: the shape is not that of a square kernel, it is not unitary,
            or it has the eigenvalue -1 at some frequency, where no logarithm is nearest.
    """
    full, ndim, bare = with_channels(kernel, ndim=ndim)
    _check_square(full, ndim, "conv_log")
    if full.numel() == 0:
        return kernel.clone()
    u = conv_spectrum(full, ndim=ndim)
    eye = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
    with torch.no_grad():
        error = float((u.mH @ u - eye).abs().amax())
        if not error <= _UNITARY_TO:
            raise ValueError(
                f"conv_log needs a unitary kernel; this one is {error:.1e} off; take "
                "riemann_unn.linalg.conv_polar of it"
            )
    tangent, info = torch.linalg.solve_ex(u + eye, u - eye)
    limit = torch.finfo(u.dtype).eps ** -0.5
    if bool(info.any()) or not bool(tangent.detach().abs().amax() < limit):
        raise ValueError(
            "conv_log: the kernel has the eigenvalue -1 at some frequency, too far from the "
            "identity for a principal logarithm (a real kernel has it wherever the determinant "
            "at a frequency that is its own mirror image is -1)"
        )
    angles = hermitian_function(
        1j * skew(tangent), lambda w: 2 * torch.atan(w), lambda w: 2 / (1 + w * w)
    )
    return _kernel(-1j * angles, full, ndim, bare=bare)


def conv_polar(kernel: Tensor, *, ndim: int | None = None) -> Tensor:
    r"""Return the nearest unitary kernel: the polar factor at each frequency.

    .. math:: \hat U(f) = \hat K(f)\,\bigl(\hat K(f)^H \hat K(f)\bigr)^{-1/2}

    For more channels out than in the result is an isometry, for fewer a co-isometry.

    Args:
        kernel: shape ``(..., out, in, *size)``, or ``(*size)`` for one channel.
        ndim: dimensions of the lattice; by default all but the first two.

    Returns:
        The (semi-)unitary kernel, shape and dtype of ``kernel``; differentiable
        where no matrix of the spectrum is singular.

    Raises:
        ValueError: the shape is no kernel's.

    Reference:
        Kiani et al., "projUNN" (2022), section on convolutions; Higham,
        "Functions of Matrices" (2008), chapter 8.
    """
    full, ndim, bare = with_channels(kernel, ndim=ndim)
    return _kernel(polar(conv_spectrum(full, ndim=ndim)), full, ndim, bare=bare)
