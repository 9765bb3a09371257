"""A layer as an affine function of its weight, on recorded inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from ..calibration import Batch

__all__ = ["AffineLayer", "NotAffineError", "widened"]

# In units of the dtype's epsilon.
_ROUNDING = 1e3
_HALF = (torch.float16, torch.bfloat16)
# The largest number of calls for a Gram matrix, no more than the steps that it saves.
_CALLS = 32


class NotAffineError(Exception):
    """A layer's output is not affine in its weight, so that least squares does not apply."""


class AffineLayer:
    r"""The map :math:`A: W \mapsto` the part of a layer's outputs that depends on W.

    Works for any kind of layer: the module is called with its weight replaced, and automatic
    differentiation gives the adjoint. Whether outputs are affine in the weight is checked by
    calls. A layer in half precision is called in single, where sums over all inputs neither
    overflow nor underflow.

    Args:
        module: the layer.
        name: its weight.
        bias: name of a bias that may be fitted, or None.
        calls: the arguments of its calls.

    Raises:
        NotAffineError: the outputs are not affine in the weight, or ignore it.
    """

    def __init__(
        self, module: nn.Module, name: str, bias: str | None, calls: Sequence[Batch]
    ) -> None:
        self.module, self.name, self.bias = module, name, bias
        self.calls = [Batch(_widened(c.args), _widened(c.kwargs)) for c in calls]
        tensors = (*module.named_parameters(), *module.named_buffers())
        self._state = {key: widened(t.detach()) for key, t in tensors if t.dtype in _HALF}
        weight = widened(module.get_parameter(name).detach())
        self._zero = torch.zeros_like(weight)
        self._rest = self._outputs(self._zero)
        self._dim = None if bias is None else self._bias_dim()
        self._check(weight)

    def _outputs(self, weight: Tensor, bias: Tensor | None = None) -> list[Tensor]:
        state = self._state | {self.name: weight}
        if self.bias is not None:
            value = widened(self.module.get_parameter(self.bias).detach())
            state[self.bias] = torch.zeros_like(value) if bias is None else bias
        found = []
        for call in self.calls:
            try:
                out = functional_call(self.module, state, call.args, call.kwargs)
            except Exception as error:
                if not self._state:
                    raise
                raise NotAffineError from error  # it works in half precision only
            if not isinstance(out, Tensor):
                raise NotAffineError
            found.append(out)
        return found

    def _bias_dim(self) -> int | None:
        """Return the output dimension along which the bias is added, if it is only added."""
        assert self.bias is not None
        value = widened(self.module.get_parameter(self.bias).detach())
        if value.ndim != 1:
            return None
        probe = torch.arange(1, value.numel() + 1, device=value.device).to(value.dtype)
        added = [a - r for a, r in zip(self._outputs(self._zero, probe), self._rest, strict=True)]
        dims = range(-1, -min(a.ndim for a in added) - 1, -1)
        for dim in dims:
            shape = [probe.numel()] + [1] * (-dim - 1)
            if all(
                a.shape[dim] == probe.numel() and torch.equal(a, probe.reshape(shape).expand_as(a))
                for a in added
            ):
                return dim
        return None

    def _check(self, weight: Tensor) -> None:
        other = _noise(weight) * weight.abs().mean().clamp_min(1e-30)
        both = self(weight + 2 * other)
        size = off = 0.0
        for a, b, c in zip(both, self(weight), self(other), strict=True):
            size += float(b.abs().double().square().sum() + 4 * c.abs().double().square().sum())
            off += float((a - b - 2 * c).abs().double().square().sum())
        eps = torch.finfo(weight.dtype).eps
        if size == 0 or off > (_ROUNDING * eps) ** 2 * size:
            raise NotAffineError

    @torch.no_grad()
    def __call__(self, weight: Tensor) -> list[Tensor]:
        """Return A(W)."""
        return [a - r for a, r in zip(self._outputs(weight), self._rest, strict=True)]

    def target(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the target for A(W) plus bias, for the layer to give these outputs."""
        return [y - r for y, r in zip(outputs, self._rest, strict=True)]

    def bias_of(self, residual: Sequence[Tensor]) -> Tensor | None:
        """Return the bias that fits a residual best, its mean; None if there is no bias to fit."""
        if self._dim is None:
            return None
        total: Tensor | float = 0.0
        count = 0
        for r in residual:
            channels = r.movedim(self._dim, -1).reshape(-1, r.shape[self._dim])
            total = total + channels.to(_double(r)).sum(0)
            count += channels.shape[0]
        assert isinstance(total, Tensor)
        return (total / max(count, 1)).to(residual[0].dtype)

    def centred(self, residual: Sequence[Tensor]) -> list[Tensor]:
        """Return a residual less the bias that fits it."""
        bias = self.bias_of(residual)
        if bias is None or self._dim is None:
            return list(residual)
        shaped = bias.reshape([-1] + [1] * (-self._dim - 1))
        return [r - shaped for r in residual]

    def adjoint(self, residual: Sequence[Tensor]) -> Tensor:
        """Return the gradient in W of the real inner product of A(W) and a residual."""
        return self._pull(self._zero, lambda _: list(residual))[0]

    def normal(self, weight: Tensor) -> Tensor:
        """Return the adjoint of the centred A(W): the normal equations' left side."""
        grad, _ = self._pull(
            weight,
            lambda outs: self.centred([o - r for o, r in zip(outs, self._rest, strict=True)]),
        )
        return grad

    def normal_map(self) -> Callable[[Tensor], Tensor]:
        """Return :meth:`normal`, as one matrix product where the layer treats all rows alike.

        Linear layers and convolutions do: the map is then U -> U G with a Gram matrix G, whose
        rows are :meth:`normal` of unit vectors, several in each call.
        """
        shape = self._zero.shape
        rows, width = shape[0], shape[1:].numel()
        if width > _CALLS * rows:
            return self.normal
        parts = []
        for units in torch.eye(width, dtype=self._zero.dtype, device=self._zero.device).split(rows):
            probe = functional.pad(units, (0, 0, 0, rows - len(units)))
            parts.append(self.normal(probe.reshape(shape)).reshape(rows, width)[: len(units)])
        gram = torch.cat(parts)
        gram = 0.5 * (gram + gram.mH)

        def product(u: Tensor) -> Tensor:
            return (u.reshape(rows, width) @ gram).reshape(shape)

        probe = _noise(self._zero)
        off = torch.linalg.vector_norm(product(probe) - (want := self.normal(probe)))
        alike = float(off) <= _ROUNDING * torch.finfo(probe.dtype).eps * float(want.norm())
        return product if alike else self.normal

    def _pull(self, weight: Tensor, residual: object) -> tuple[Tensor, list[Tensor]]:
        with torch.enable_grad():
            at = weight.detach().clone().requires_grad_()
            outs = self._outputs(at)
        with torch.no_grad():
            pulled = residual([o.detach() for o in outs])  # type: ignore[operator]
        (grad,) = torch.autograd.grad(outs, at, pulled)
        return grad, outs


def widened(x: Tensor) -> Tensor:
    """Convert half precision to single; other tensors are returned unchanged."""
    return x.float() if x.dtype in _HALF else x


def _widened(value: Any) -> Any:
    """Widen the tensors of arguments."""
    if isinstance(value, Tensor):
        return widened(value)
    if type(value) in (tuple, list):
        return type(value)(_widened(v) for v in value)
    if type(value) is dict:
        return {k: _widened(v) for k, v in value.items()}
    return value


def _noise(like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


def _double(x: Tensor) -> torch.dtype:
    return torch.complex128 if x.is_complex() else torch.float64
