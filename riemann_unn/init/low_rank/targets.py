"""Adapters of dense layers: their matrices, inputs and low-rank counterparts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ...nn import (
    LowRankConv1d,
    LowRankConv2d,
    LowRankConv3d,
    LowRankConvTranspose1d,
    LowRankConvTranspose2d,
    LowRankConvTranspose3d,
    LowRankLinear,
)
from ...nn.low_rank import LowRankFactors
from ...nn.low_rank_convs import ChannelSplit, channel_matrix

__all__ = ["Target", "has_counterpart", "is_dense_layer", "target_of"]

_SPLITS: dict[type[nn.Module], type[ChannelSplit]] = {
    nn.Conv1d: LowRankConv1d,
    nn.Conv3d: LowRankConv3d,
    nn.ConvTranspose1d: LowRankConvTranspose1d,
    nn.ConvTranspose2d: LowRankConvTranspose2d,
    nn.ConvTranspose3d: LowRankConvTranspose3d,
}


class Target:
    """A linear layer.

    Args:
        module: the layer.
    """

    kernel: torch.Size | None = None
    """Shape of the weight of a convolution that is split in space."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.weight: nn.Parameter = module.get_parameter("weight")
        self.bias: nn.Parameter | None = module._parameters.get("bias")

    def matrix(self) -> Tensor:
        """Return the weight as the matrix ``(out, in)``, or ``(out, in * prod(kernel))``."""
        return self.weight.detach().flatten(1)

    def blank(self) -> Tensor:
        """Return a tensor for a new weight, in the layout that torch's initialisers expect."""
        return torch.empty_like(self.weight)

    def set_weight_(self, value: Tensor) -> None:
        """Set the weight, given in that layout."""
        self.weight.copy_(value)

    def rows(self, x: Tensor, most: int, generator: torch.Generator) -> Tensor:
        """Return at most so many of the rows that the matrix is multiplied with, drawn evenly."""
        flat = x.reshape(-1, x.shape[-1])
        return flat[some(len(flat), most, generator).to(x.device)]

    def empty(self, rank: int, *, orthonormal: bool) -> LowRankFactors:
        """Return the low-rank layer with the settings of this one, its factors uninitialised."""
        assert isinstance(self.module, nn.Linear)
        return LowRankLinear.empty_like(self.module, rank, orthonormal=orthonormal)


class _Transposed(Target):
    """The linear layer of transformers' GPT-2, ``Conv1D``, whose weight is ``(in, out)``."""

    def matrix(self) -> Tensor:
        return self.weight.detach().mT

    def blank(self) -> Tensor:
        return torch.empty_like(self.weight.mT)

    def set_weight_(self, value: Tensor) -> None:
        self.weight.copy_(value.mT)

    def empty(self, rank: int, *, orthonormal: bool) -> LowRankFactors:
        into, out = self.weight.shape
        layer = LowRankLinear(
            into,
            out,
            rank,
            self.bias is not None,
            orthonormal=orthonormal,
            device="meta",
            dtype=self.weight.dtype,
        )
        return layer._materialise(self.module)  # type: ignore[arg-type]


class _Convolution(Target):
    """A convolution, whose rows are patches."""

    module: _ConvNd

    def matrix(self) -> Tensor:
        return channel_matrix(self.module)

    def rows(self, x: Tensor, most: int, generator: torch.Generator) -> Tensor:
        dims = len(self.module.kernel_size)
        windows = self._windows(x if x.ndim == dims + 2 else x.unsqueeze(0))
        places = windows.shape[2 : 2 + dims]
        chosen = some(windows.shape[0] * places.numel(), most, generator).to(x.device)
        index: list[Tensor] = []
        for n in reversed(places):
            index.insert(0, chosen % n)
            chosen = chosen // n
        moved = windows.movedim(1, 1 + dims)  # (N, *places, in, *kernel)
        found: Tensor = moved[(chosen, *index)]
        return found.flatten(1)

    def _windows(self, x: Tensor) -> Tensor:
        """All patches, as a view ``(N, in, *places, *kernel)``."""
        conv = self.module
        around = list(conv._reversed_padding_repeated_twice)
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = functional.pad(x, around, mode=mode) if any(around) else x
        return _unfolded(x, conv.kernel_size, conv.stride, conv.dilation)

    def empty(self, rank: int, *, orthonormal: bool) -> LowRankFactors:
        kind = _SPLITS[type(self.module)]
        return kind.empty_like(self.module, rank, orthonormal=orthonormal)


class _TransposedConvolution(_Convolution):
    """A transposed convolution: a convolution with a flipped kernel on dilated inputs."""

    def _windows(self, x: Tensor) -> Tensor:
        conv = self.module
        lengths = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], conv.stride, strict=True)]
        spread = x.new_zeros(*x.shape[:2], *lengths)
        places: Any = (..., *(slice(None, None, s) for s in conv.stride))
        spread[places] = x
        around: list[int] = []
        sides = zip(conv.kernel_size, conv.padding, conv.dilation, conv.output_padding, strict=True)
        for k, p, d, more in sides:
            assert isinstance(p, int)
            around = [d * (k - 1) - p, d * (k - 1) - p + more, *around]
        windows = _unfolded(
            functional.pad(spread, around), conv.kernel_size, (1,) * len(lengths), conv.dilation
        )
        return windows.flip([d - len(lengths) for d in range(len(lengths))])


class _Convolution2d(_Convolution):
    """A plain convolution of images, which may be split in space too."""

    def __init__(self, module: nn.Module, split: str) -> None:
        super().__init__(module)
        self._split = split
        self.kernel = self.weight.shape if split == "spatial" else None

    def empty(self, rank: int, *, orthonormal: bool) -> LowRankFactors:
        assert isinstance(self.module, nn.Conv2d)
        return LowRankConv2d.empty_like(
            self.module, rank, split=self._split, orthonormal=orthonormal
        )


def _unfolded(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    for i, (k, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + i, gap * (k - 1) + 1, step)
    places: Any = (..., *(slice(None, None, gap) for gap in dilation))
    return x[places]


def some(total: int, most: int, generator: torch.Generator) -> Tensor:
    """Return at most so many indices, in order."""
    if total <= most:
        return torch.arange(total)
    return torch.randperm(total, generator=generator)[:most].sort().values


def _is_transposed_linear(module: nn.Module) -> bool:
    """Whether it is transformers' ``Conv1D``, by name, since transformers may not be installed."""
    kind: Any = type(module)
    weight = module._parameters.get("weight")
    named = kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
    return named and weight is not None and weight.ndim == 2


def is_dense_layer(module: nn.Module) -> bool:
    """Whether a module is a linear layer or a convolution, or a subclass of one."""
    return isinstance(module, (nn.Linear, _ConvNd)) or _is_transposed_linear(module)


def has_counterpart(module: nn.Module) -> bool:
    """Whether there is a low-rank counterpart; not for subclasses, which may do more."""
    return type(module) in (nn.Linear, nn.Conv2d, *_SPLITS) or _is_transposed_linear(module)


def target_of(module: nn.Module, *, split: str = "channel") -> Target | None:
    """Return the adapter of a layer; None if there is no low-rank counterpart.

    Args:
        module: the layer.
        split: of plain convolutions of images, ``"channel"`` or ``"spatial"``.
    """
    if type(module) is nn.Linear:
        return Target(module)
    if type(module) is nn.Conv2d:
        return _Convolution2d(module, split)
    if type(module) in _SPLITS:
        transposed = isinstance(module, _ConvTransposeNd)
        return (_TransposedConvolution if transposed else _Convolution)(module)
    return _Transposed(module) if _is_transposed_linear(module) else None
