"""A convolution layer split into two thin ones."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.utils import _pair

from ..linalg import fold_kernel, unfold_kernel
from ..linalg.precision import in_full_precision
from .low_rank import LowRankFactors

__all__ = ["LowRankConv2d"]


class LowRankConv2d(LowRankFactors):
    r"""A drop-in for ``nn.Conv2d`` that is split into two thin convolutions.

    ``"channel"``: a h × w convolution into r channels and then a 1 × 1 one, the weight seen as the
    matrix ``(out, in*h*w)`` of rank r. ``"spatial"``: a h × 1 convolution into r channels and then
    a 1 × w one, the weight seen as the matrix ``(out*w, in*h)``. Either matrix is A B, or with
    ``orthonormal`` :math:`A\,\mathrm{diag}(s)\,B` with both factors tagged
    :class:`~riemann_unn.Stiefel`. That the matrix is well conditioned does not make the
    convolution an isometry.

    Shape:
        Input ``(N, in, H, W)`` or ``(in, H, W)``, output as of ``nn.Conv2d``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: h, or (h, w).
        rank: r, from 1 to the smaller side of the matrix.
        stride: as of ``nn.Conv2d``.
        padding: as of ``nn.Conv2d``, ``"same"`` and ``"valid"`` included.
        dilation: as of ``nn.Conv2d``.
        bias: whether to add a bias.
        padding_mode: as of ``nn.Conv2d``.
        split: ``"channel"`` or ``"spatial"``.
        orthonormal: orthonormal factors and s.
        device: where to create the parameters.
        dtype: their type.

    Raises:
        ValueError: the rank is out of range, or the split or the padding is unknown.

    Reference:
        Jaderberg, Vedaldi and Zisserman, "Speeding up convolutional neural networks with low
        rank expansions" (2014), for both splits.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        rank: int,
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        split: str = "channel",
        orthonormal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if split not in ("channel", "spatial"):
            raise ValueError(f"{split=} must be 'channel' or 'spatial'")
        # A dense layer on the meta device checks the other arguments, with torch's messages.
        like = nn.Conv2d(
            in_channels,
            out_channels,
            cast(Any, kernel_size),
            cast(Any, stride),
            cast(Any, padding),
            cast(Any, dilation),
            padding_mode=cast(Any, padding_mode),
            device="meta",
        )
        m, n = unfold_kernel(like.weight, split=split).shape
        super().__init__(m, n, rank, out_channels, bias, orthonormal, device, dtype)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = cast("tuple[int, int]", _pair(kernel_size))
        self.stride = cast("tuple[int, int]", _pair(stride))
        self.padding = padding if isinstance(padding, str) else _pair(padding)
        self.dilation = cast("tuple[int, int]", _pair(dilation))
        self.padding_mode = padding_mode
        self.split = split
        # Left, right, top, bottom, in the order of functional.pad.
        self._around = tuple(like._reversed_padding_repeated_twice)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter again, the product with the variance of ``nn.Conv2d``'s weight."""
        self._reset(self.in_channels * math.prod(self.kernel_size), self.out_channels)

    @property
    def weight(self) -> Tensor:
        """The kernel ``(out, in, h, w)``, computed on access."""
        shape = torch.Size((self.out_channels, self.in_channels, *self.kernel_size))
        return fold_kernel(self._matrix(), shape=shape, split=self.split)

    def macs(self) -> int:
        """Return the number of multiplications for one position of the output.

        In the spatial split the first convolution runs at every column of the input, also at those
        that the stride skips.
        """
        inner = self.rank if self.s is not None else 0
        columns = 1 if self.split == "channel" else self.stride[1]
        return (self.B.numel() + inner) * columns + self.A.numel()

    def _padded(self, input: Tensor) -> Tensor:
        if not any(self._around):
            return input
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return functional.pad(input, self._around, mode=mode)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            input: Tensor ``(N, in, H, W)`` or ``(in, H, W)``.
        """
        (h, w), r = self.kernel_size, self.rank
        if self.split == "channel":
            first = self.B.reshape(r, self.in_channels, h, w)
            second = self.A.reshape(self.out_channels, r, 1, 1)
            steps = (self.stride, self.dilation), ((1, 1), (1, 1))
        else:
            first = self.B.reshape(r, self.in_channels, h, 1)
            second = self.A.reshape(self.out_channels, w, r).permute(0, 2, 1).unsqueeze(2)
            (down, across), (rows, columns) = self.stride, self.dilation
            steps = ((down, 1), (rows, 1)), ((1, across), (1, columns))
        inner = functional.conv2d(self._padded(input), first, None, steps[0][0], 0, steps[0][1])
        if self.s is not None:
            inner = inner * self.s.view(-1, 1, 1)
        return functional.conv2d(inner, second, self.bias, steps[1][0], 0, steps[1][1])

    @classmethod
    def from_dense(
        cls, conv: nn.Conv2d, rank: int, *, split: str = "channel", orthonormal: bool = False
    ) -> LowRankConv2d:
        """Return the nearest layer of this rank, by the singular value decomposition.

        It has the device, dtype, training mode and ``requires_grad`` of ``conv``. From the
        smaller side of the matrix on a rank is the full one.

        Args:
            conv: the layer.
            rank: r, at least 1.
            split: ``"channel"`` or ``"spatial"``.
            orthonormal: orthonormal factors and s.

        Raises:
            ValueError: the convolution is grouped.
        """
        if conv.groups != 1:
            raise ValueError(
                f"a convolution with groups={conv.groups} is block diagonal already; "
                "only groups=1 can be split"
            )
        if split not in ("channel", "spatial"):
            raise ValueError(f"{split=} must be 'channel' or 'spatial'")
        matrix = unfold_kernel(conv.weight.detach(), split=split)
        full = min(rank, *matrix.shape)
        layer = cls.empty_like(conv, full, split=split, orthonormal=orthonormal)
        layer._split(matrix)
        return layer

    @classmethod
    def empty_like(
        cls, conv: nn.Conv2d, rank: int, *, split: str = "channel", orthonormal: bool = False
    ) -> LowRankConv2d:
        """Return a layer with the settings and the bias of ``conv``, its factors uninitialised."""
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            cast("tuple[int, int]", conv.kernel_size),
            rank,
            cast("tuple[int, int]", conv.stride),
            cast("str | tuple[int, int]", conv.padding),
            cast("tuple[int, int]", conv.dilation),
            conv.bias is not None,
            conv.padding_mode,
            split=split,
            orthonormal=orthonormal,
            device="meta",
            dtype=conv.weight.dtype,
        )
        return layer._materialise(conv)

    @in_full_precision
    def to_dense(self) -> nn.Conv2d:
        """Return the ``nn.Conv2d`` with the product as its weight."""
        dense = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            cast(Any, self.padding),
            self.dilation,
            bias=self.bias is not None,
            padding_mode=cast(Any, self.padding_mode),
            device="meta",
            dtype=self.A.dtype,
        ).to_empty(device=self.A.device)
        self._fill(dense, self.weight)
        return dense

    def extra_repr(self) -> str:
        """Show the sizes, and the parameters and multiplications of the weight."""
        dense = self.out_channels * self.in_channels * math.prod(self.kernel_size)
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"rank={self.rank}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, bias={self.bias is not None}, "
            f"padding_mode={self.padding_mode!r}, split={self.split!r}, "
            f"orthonormal={self.orthonormal}, parameters={self.weight_parameters():,} of "
            f"{dense:,}, MACs={self.macs():,} per output position"
        )
