"""Circular convolutions with orthogonal or unitary kernels, by the fast Fourier transform."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..linalg import conv_identity, conv_polar
from ..linalg.conv import conv_apply
from ..linalg.conv.local import local_kernel_
from ..manifolds import OrthogonalConv, UnitaryConv
from ..scalars import plain_scalars
from ..tagging import remember_tags_, tag_

__all__ = ["CircularConv1d", "CircularConv2d", "CircularConv3d"]

Downsample = Literal["space_to_depth", "subsample"]
KernelInit = Literal["local", "haar", "identity"]


def lattice(size: int | tuple[int, ...], ndim: int, *, name: str = "size") -> tuple[int, ...]:
    """Return a size for every dimension of the lattice, checked."""
    size = plain_scalars(size)
    sizes = (size,) * ndim if isinstance(size, int) else tuple(size)
    if len(sizes) != ndim or any(isinstance(n, bool) or n < 1 for n in sizes):
        raise ValueError(f"{name}={size!r} must be a positive integer, or {ndim} of them")
    return sizes


@torch.no_grad()
def init_kernel_(weight: Tensor, *, ndim: int, init: KernelInit) -> Tensor:
    """Fill a kernel ``(out, in, *size)`` with a (semi-)unitary one, from torch's global generator.

    ``"local"``: a product of random factors on a window of 3 sites in each dimension, so that it
    acts on neighbours alone, see :func:`~riemann_unn.linalg.conv.local.local_kernel_`; for one
    channel, where such kernels only copy, the nearest one to Gaussian weights on that window.
    ``"haar"``: uniform, not local; ``"identity"``: copies channel i to channel i.
    """
    if init == "identity":
        return weight.copy_(conv_identity(weight.shape[0], weight.shape[1], weight.shape[2:]))
    manifold = UnitaryConv(ndim) if weight.is_complex() else OrthogonalConv(ndim)
    if init == "haar":
        return weight.copy_(manifold.random(weight.shape, dtype=weight.dtype, device=weight.device))
    if max(weight.shape[:2]) > 1:
        return local_kernel_(weight)
    kernel = torch.randn_like(weight)
    for dim in range(2, weight.ndim):
        n = weight.shape[dim]
        ring = torch.arange(n, device=weight.device)
        near = (torch.minimum(ring, n - ring) <= 1).reshape((-1,) + (1,) * (weight.ndim - 1 - dim))
        kernel = kernel * near
    exact = kernel if kernel.dtype.itemsize >= 4 else kernel.float()
    return weight.copy_(conv_polar(exact, ndim=ndim))


def check_dtype(dtype: torch.dtype | None, layer: str) -> torch.dtype:
    """Return the dtype of a layer's weights, torch's default if None."""
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not (dtype.is_floating_point or dtype.is_complex):
        raise ValueError(f"{layer} needs a floating or complex dtype, got {dtype}")
    return dtype


class _CircularConv(nn.Module):
    ndim: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        *,
        bias: bool = True,
        downsample: Downsample = "space_to_depth",
        init: KernelInit = "local",
        padding_mode: str = "circular",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        dtype = check_dtype(dtype, name)
        for argument, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels < 1:
                raise ValueError(f"{argument} must be at least 1, got {channels}")
        if padding_mode != "circular":
            raise ValueError(
                f"{padding_mode=}: only circular padding makes a convolution unitary at every "
                "frequency; use nn.Conv with riemann_unn.Stiefel(flatten=True) for other padding"
            )
        if downsample not in get_args(Downsample):
            raise ValueError(f"{downsample=} is unknown; choose from {get_args(Downsample)}")
        if init not in get_args(KernelInit):
            raise ValueError(f"{init=} is unknown; choose from {get_args(KernelInit)}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.size = lattice(size, self.ndim)
        self.stride = lattice(stride, self.ndim, name="stride")
        if any(n % s for n, s in zip(self.size, self.stride, strict=True)):
            raise ValueError(f"{stride=} must divide the size of the signal, {self.size}")
        self.downsample, self.init = downsample, init
        folded = math.prod(self.stride) if downsample == "space_to_depth" else 1
        self.kernel_size = tuple(
            n // s if folded > 1 else n for n, s in zip(self.size, self.stride, strict=True)
        )
        shape = (out_channels, in_channels * folded, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias: nn.Parameter | None = nn.Parameter(
                torch.empty(out_channels, device=device, dtype=dtype)
            )
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()
        manifold = UnitaryConv if dtype.is_complex else OrthogonalConv
        tag_(self.weight, manifold(self.ndim))
        remember_tags_(self)

    def reset_parameters(self) -> None:
        """Draw the kernel again, by ``init``, and set the bias to zero."""
        init_kernel_(self.weight, ndim=self.ndim, init=self.init)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve a signal.

        Args:
            input: shape ``(N, in_channels, *size)`` or ``(in_channels, *size)``.

        Returns:
            Shape ``(N, out_channels, *size / stride)``, without N if ``input`` has none.

        Raises:
            ValueError: ``input`` has another size or number of channels, or is
                complex where the layer is real.
        """
        expected = (self.in_channels, *self.size)
        if input.ndim not in (self.ndim + 1, self.ndim + 2) or (
            tuple(input.shape[-self.ndim - 1 :]) != expected
        ):
            raise ValueError(
                f"{type(self).__name__} was built for signals (N, {', '.join(map(str, expected))}),"
                f" got {tuple(input.shape)}; its kernel is as large as the signal"
            )
        if input.is_complex() and not self.weight.is_complex():
            raise ValueError(
                f"the input is {input.dtype} but the layer is {self.weight.dtype}: build it with "
                "a complex dtype, or pass real and imaginary parts as channels"
            )
        fold = self.downsample == "space_to_depth" and max(self.stride) > 1
        x = self._space_to_depth(input) if fold else input
        y = conv_apply(self.weight, x, ndim=self.ndim)
        if self.downsample == "subsample":
            for dim, step in enumerate(self.stride, start=-self.ndim):
                y = y.index_select(dim, torch.arange(0, y.shape[dim], step, device=y.device))
        if self.bias is not None:
            y = y + self.bias.reshape(-1, *(1,) * self.ndim)
        return y

    def _space_to_depth(self, x: Tensor) -> Tensor:
        """Move the sites of each stride-sized cell into channels, a permutation."""
        cells = [n for pair in zip(self.kernel_size, self.stride, strict=True) for n in pair]
        x = x.reshape(*x.shape[: -self.ndim], *cells)
        inner = range(-2 * self.ndim + 1, 0, 2)
        start = x.ndim - 2 * self.ndim
        return x.movedim(tuple(inner), tuple(range(start, start + self.ndim))).flatten(
            start - 1, start + self.ndim - 1
        )

    def extra_repr(self) -> str:
        """Show the sizes and every setting that is not the default."""
        parts = [f"{self.in_channels}, {self.out_channels}, size={self.size}"]
        if max(self.stride) > 1:
            parts.append(f"stride={self.stride}, downsample={self.downsample!r}")
        if self.bias is None:
            parts.append("bias=False")
        if self.init != "local":
            parts.append(f"init={self.init!r}")
        if self.weight.dtype != torch.float32:
            parts.append(f"dtype={self.weight.dtype}")
        return ", ".join(parts)


class CircularConv1d(_CircularConv):
    """A circular convolution over sequences; see :class:`CircularConv2d`.

    Shapes: ``(N, in_channels, n)`` to ``(N, out_channels, n / stride)``, N optional.
    """

    ndim = 1


class CircularConv2d(_CircularConv):
    r"""A circular convolution over images whose kernel is orthogonal, or unitary if complex.

    .. math:: y_o(r) = b_o + \sum_i \sum_s K_{oi}(s)\, x_i(r - s \bmod N), \qquad
        \hat K(f)^H \hat K(f) = I

    The kernel ``weight``, of shape ``(out_channels, in_channels, *size)``, is as
    large as the signal. It is tagged with ``OrthogonalConv(2)`` or
    ``UnitaryConv(2)`` and initialised on it, and an optimizer from ``riemann_unn.optim``
    keeps it there. With at least as many channels out as in the layer, without its bias, preserves
    the norm of every signal; with fewer it never increases it. A forward pass costs a Fourier
    transform of signal and kernel, a matrix product at each frequency and the transform back.
    Unlike ``nn.Conv2d``, which correlates, it convolves.

    With a stride there are two ways of downsampling. ``"space_to_depth"`` first moves the
    sites of every cell of ``stride`` sites into channels, so that ``weight`` has
    ``in_channels * prod(stride)`` channels in, on a lattice of ``size / stride``:
    exact, still an isometry where there are enough channels out. ``"subsample"``
    convolves at full size and drops sites, as projUNN does: never an
    expansion, but no isometry.

    Args:
        in_channels: channels of the signal.
        out_channels: channels produced.
        size: of the signal, an integer or one for each dimension.
        stride: an integer or one for each dimension; they must divide ``size``.
        bias: whether to add a bias, zero at first.
        downsample: what a stride does, see above.
        init: the first kernel: ``"local"`` (random, on a window of 3 sites in each
            dimension), ``"haar"`` (uniform) or ``"identity"``.
        padding_mode: only ``"circular"``; for compatibility with ``nn.Conv2d``.
        device: where to create the parameters.
        dtype: their type; a complex one makes the layer unitary.

    Shapes: ``(N, in_channels, h, w)`` to ``(N, out_channels, h / stride, w / stride)``,
    N optional.

    Raises:
        ValueError: an argument is out of range, ``padding_mode`` is not circular,
            or an input is not of the size the layer was built for.

    Reference:
        Kiani et al., "projUNN" (2022), section on convolutional networks; Trockman
        and Kolter, "Orthogonalizing convolutional layers with the Cayley
        transform" (2021), for the layer in the Fourier domain.
    """

    ndim = 2


class CircularConv3d(_CircularConv):
    """A circular convolution over volumes; see :class:`CircularConv2d`.

    Shapes: ``(N, in_channels, d, h, w)`` to ``(N, out_channels, d / stride, ...)``, N optional.
    """

    ndim = 3
