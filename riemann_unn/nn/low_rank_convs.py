"""Convolutions of any dimension, transposed or not, as one into r channels and a pointwise one."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..linalg.precision import in_full_precision
from .low_rank import LowRankFactors

__all__ = [
    "LowRankConv1d",
    "LowRankConv3d",
    "LowRankConvTranspose1d",
    "LowRankConvTranspose2d",
    "LowRankConvTranspose3d",
    "channel_matrix",
]

T = TypeVar("T", bound="ChannelSplit")
_CONVOLVE = (functional.conv1d, functional.conv2d, functional.conv3d)
_TRANSPOSED = (
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
)


def channel_matrix(conv: _ConvNd) -> Tensor:
    """Return the weight of a convolution as the matrix ``(out, in * prod(kernel))``."""
    weight = conv.weight.detach()
    if isinstance(conv, _ConvTransposeNd):
        weight = weight.transpose(0, 1)
    return weight.flatten(1)


class ChannelSplit(LowRankFactors):
    r"""A drop-in for a convolution, into r channels and then a pointwise one into all.

    The weight is seen as the matrix ``(out, in * prod(kernel))`` of rank r, which is A B; with
    ``orthonormal`` :math:`A\,\mathrm{diag}(s)\,B` with both factors tagged
    :class:`~riemann_unn.Stiefel`. The first convolution has the stride, padding and dilation, and
    is transposed if the layer is.

    Shape:
        Input and output as of the dense layer.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: as of the dense layer.
        rank: r, from 1 to the smaller side of the matrix.
        bias: whether to add a bias.
        orthonormal: orthonormal factors and s.
        device: where to create the parameters.
        dtype: their type.
        options: stride, padding, dilation, padding_mode and output_padding of the dense layer.

    Raises:
        ValueError: the rank or another argument is out of range.
    """

    dense: type[_ConvNd]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        rank: int,
        bias: bool = True,
        *,
        orthonormal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        # A dense layer on the meta device checks the arguments, with torch's messages.
        like = self._dense(in_channels, out_channels, kernel_size, device="meta", **options)
        if like.groups != 1:
            raise ValueError(f"groups={like.groups}: only groups=1 can be split")
        self._options = options
        m, n = channel_matrix(like).shape
        super().__init__(m, n, rank, out_channels, bias, orthonormal, device, dtype)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size: tuple[int, ...] = like.kernel_size
        self.stride, self.dilation = like.stride, like.dilation
        self.padding: Any = like.padding
        self.output_padding = like.output_padding
        self.padding_mode = like.padding_mode
        self.is_transposed = isinstance(like, _ConvTransposeNd)
        self._around = tuple(like._reversed_padding_repeated_twice)
        self.reset_parameters()

    @classmethod
    def _dense(cls, *args: Any, **kwargs: Any) -> _ConvNd:
        layer: _ConvNd = cls.dense(*args, **kwargs)
        return layer

    def reset_parameters(self) -> None:
        """Draw every parameter again, the product with the variance of torch's own weight."""
        fed = self.out_channels if self.is_transposed else self.in_channels
        self._reset(fed * math.prod(self.kernel_size), self.out_channels)

    @property
    def weight(self) -> Tensor:
        """The kernel in the layout of the dense layer, computed on access."""
        kernel = self._matrix().reshape(self.out_channels, self.in_channels, *self.kernel_size)
        return kernel.transpose(0, 1) if self.is_transposed else kernel

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            input: Tensor ``(N, in, *size)`` or ``(in, *size)``.
        """
        dims = len(self.kernel_size)
        first = self.B.reshape(self.rank, self.in_channels, *self.kernel_size)
        if self.is_transposed:
            inner = _TRANSPOSED[dims - 1](
                input,
                first.transpose(0, 1),
                None,
                self.stride,
                self.padding,
                self.output_padding,
                1,
                self.dilation,
            )
        else:
            if any(self._around):
                mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
                input = functional.pad(input, self._around, mode=mode)
            inner = _CONVOLVE[dims - 1](input, first, None, self.stride, 0, self.dilation)
        if self.s is not None:
            inner = inner * self.s.view(-1, *(1,) * dims)
        second = self.A.reshape(self.out_channels, self.rank, *(1,) * dims)
        result: Tensor = _CONVOLVE[dims - 1](inner, second, self.bias)
        return result

    @classmethod
    def from_dense(cls: type[T], conv: _ConvNd, rank: int, *, orthonormal: bool = False) -> T:
        """Return the nearest layer of this rank, by the singular value decomposition.

        It has the device, dtype, training mode and ``requires_grad`` of ``conv``. From the smaller
        side of the matrix on a rank is the full one.

        Args:
            conv: the layer.
            rank: r, at least 1.
            orthonormal: orthonormal factors and s.

        Raises:
            ValueError: the convolution is grouped.
        """
        matrix = channel_matrix(conv)
        layer = cls.empty_like(conv, min(rank, *matrix.shape), orthonormal=orthonormal)
        layer._split(matrix)
        return layer

    @classmethod
    def empty_like(cls: type[T], conv: _ConvNd, rank: int, *, orthonormal: bool = False) -> T:
        """Return a layer with the settings and the bias of ``conv``, its factors uninitialised."""
        options = _options(conv)
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            rank,
            conv.bias is not None,
            orthonormal=orthonormal,
            device="meta",
            dtype=conv.weight.dtype,
            **options,
        )
        return layer._materialise(conv)

    @in_full_precision
    def to_dense(self) -> _ConvNd:
        """Return the dense layer with the product as its weight."""
        dense = self._dense(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            bias=self.bias is not None,
            device="meta",
            dtype=self.A.dtype,
            **self._options,
        ).to_empty(device=self.A.device)
        self._fill(dense, self.weight)
        return dense

    def extra_repr(self) -> str:
        """Show the sizes, and the parameters of the weight."""
        dense = self.out_channels * self.in_channels * math.prod(self.kernel_size)
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"rank={self.rank}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, bias={self.bias is not None}, "
            f"orthonormal={self.orthonormal}, parameters={self.weight_parameters():,} of {dense:,}"
        )


def _options(conv: _ConvNd) -> dict[str, Any]:
    found: dict[str, Any] = {
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "groups": conv.groups,
        "padding_mode": conv.padding_mode,
    }
    if isinstance(conv, _ConvTransposeNd):
        found["output_padding"] = conv.output_padding
    return found


class LowRankConv1d(ChannelSplit):
    """A drop-in for ``nn.Conv1d``, see :class:`.ChannelSplit`."""

    dense = nn.Conv1d


class LowRankConv3d(ChannelSplit):
    """A drop-in for ``nn.Conv3d``, see :class:`.ChannelSplit`."""

    dense = nn.Conv3d


class LowRankConvTranspose1d(ChannelSplit):
    """A drop-in for ``nn.ConvTranspose1d``, see :class:`.ChannelSplit`."""

    dense = nn.ConvTranspose1d


class LowRankConvTranspose2d(ChannelSplit):
    """A drop-in for ``nn.ConvTranspose2d``, see :class:`.ChannelSplit`."""

    dense = nn.ConvTranspose2d


class LowRankConvTranspose3d(ChannelSplit):
    """A drop-in for ``nn.ConvTranspose3d``, see :class:`.ChannelSplit`."""

    dense = nn.ConvTranspose3d
