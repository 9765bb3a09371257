"""Batches of parameters whose matrices are a transform of their memory, as with kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..linalg.step.polish import newton_schulz_, polishes_at
from ..linalg.step.products import CACHED
from ..retractions import Directions, Retraction
from .batch import Batch

__all__ = ["TransformedBatch"]


# Number of entries that are polished at a time.
_BLOCK = 2**18


class TransformedBatch(Batch):
    """Parameters to which a low-rank step adds the inverse transform of its low-rank change.

    The points themselves are not transformed back, so they do not take on its rounding, and may be
    transformed in their own precision to compute a step, of which the error is then a small part.
    A polish needs the exact transform.
    """

    _is_added = _polishes = False

    def _as_matrices(
        self, values: list[Tensor], grads: list[Any], retraction: Retraction
    ) -> tuple[Tensor, Tensor]:
        *batch, n, p = self._manifold.matrices_shape(values[0].shape)
        self._is_added = not retraction.is_whole_for(torch.Size((*batch, p, n)))
        if not self._is_added:
            return super()._as_matrices(values, grads, retraction)
        is_inexact = any(member.is_inexact for member in self.members)
        self._polishes = is_inexact or polishes_at(p, step=self._step)
        x = self._transform("points", values, exact=self._polishes)
        return x, self._transform("moves", grads)

    def read_(self) -> None:
        """Set the move from the displacement that the base has written into the zeros."""
        if not self._is_added:
            super().read_()
            return
        assert self.tangent is not None
        moves = self._transform("moves", self._buffers["zeros"][1])
        self._set_move(self.tangent.read(self._x, moves))

    def _scatter(self, x: Tensor, whole: Tensor, parts: list[Tensor]) -> None:
        if self._is_added:  # a displacement may be rounded to its precision
            self._manifold.write_point(self._tall(x).reshape(self._shape), whole)
        else:
            super()._scatter(x, whole, parts)

    def _rotate_(self, moved: Tensor | None, polish: bool, *, is_inexact: bool) -> None:
        if not self._is_added:
            super()._rotate_(moved, polish, is_inexact=is_inexact)
            return
        assert isinstance(self.tangent, Directions)
        values = [member.value for member in self.members]
        shape = torch.Size((len(values), *values[0].shape))
        if polish and self._polishes:
            whole = self._polished(shape, is_inexact=is_inexact)
        else:
            whole = self._added(shape)
        parts = list(whole.unbind(0))
        if moved is None and not self.members[0].is_half:
            torch._foreach_add_(values, parts)
            return
        torch._foreach_add_(parts, values)
        if moved is not None:
            whole.copy_(torch.where(self._flags(moved, whole), whole, torch.stack(values)))
        self._commit(parts, moved)

    def _added(self, shape: torch.Size) -> Tensor:
        """Return the change of all members by a step."""
        assert isinstance(self.tangent, Directions)
        left, right, self.angle = self.tangent.factors(self._x, self._move)
        if left.shape[-2] != right.shape[-1]:
            left, right = right.mH, left.mH
        left, right = (x.reshape(*self._shape[:-2], *x.shape[-2:]) for x in (left, right))
        whole = self._memory("moves", shape, self.members[0].value.dtype)
        self._manifold.write_product(left, right, whole)
        return whole

    def _polished(self, shape: torch.Size, *, is_inexact: bool) -> Tensor:
        """Return the change of all members by a step and a polish."""
        assert isinstance(self.tangent, Directions)
        x = self._x
        memory = self._memory("moves", torch.Size((x.numel(),)), x.dtype)
        new = memory.as_strided(x.shape, x.stride()).copy_(x)
        self.angle = self.tangent.rotate_(new, self._move)
        for part in new.split(max(_BLOCK // x[0].numel(), 1)):
            self.tangent.polish_(part, step=self._step)
            if is_inexact:
                newton_schulz_(newton_schulz_(self._tall(part)))
        difference = self._tall(new.sub_(x)).reshape(self._shape)
        # The buffer of the points' matrices is free now.
        whole = self._memory("points", shape, self.members[0].value.dtype)
        self._manifold.write_point(difference, whole)
        return whole

    @property
    def _is_cached(self) -> bool | None:
        # All matrices of a point are read before the first is read again.
        return self._manifold.matrices_shape(self.members[0].value.shape).numel() <= CACHED

    def _transform(self, name: str, tensors: list[Tensor], *, exact: bool = False) -> Tensor:
        """Return all members' matrices, square or wide, with one batch dimension."""
        like = tensors[0]
        shape = torch.Size((len(tensors), *self._manifold.matrices_shape(like.shape)))
        memory = self._memory(name, shape, torch.promote_types(like.dtype, torch.complex64))
        matrices = self._manifold.write_matrices(tensors, memory, exact=exact)
        self._shape = matrices.shape
        return self._tall(matrices.reshape(-1, *matrices.shape[-2:]))

    def _memory(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return memory, kept between steps on CPUs, where new pages cost more than a transform."""
        device, size = self.members[0].value.device, math.prod(shape) * dtype.itemsize
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        kept = self._buffers.get(name)
        if kept is None or kept[0].numel() < size:
            kept = self._buffers[name] = torch.empty(size, dtype=torch.uint8), []
        return kept[0][:size].view(dtype).view(shape)
