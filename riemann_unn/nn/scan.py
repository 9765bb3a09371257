"""The recurrence of one layer as one autograd node with a hand-written adjoint.

Autograd would save several tensors of every step. The derivatives of these activations are
functions of their results, so only the states are saved, which are the output anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .activations import ModReLU

__all__ = ["can_scan", "scan_"]


class _Rule(NamedTuple):
    """The kernels of an activation h = σ(z, b)."""

    # Overwrites z by h; b is None or one number a feature, and two tensors like z are buffers.
    apply_: Callable[[Tensor, Tensor | None, Tensor, Tensor], object]
    # From the gradient at h, and h, to the gradient at z: differentiable, and in place.
    pull: Callable[[Tensor, Tensor], Tensor]
    pull_: Callable[[Tensor, Tensor], object]
    # ∂h/∂b ÷ ∂h/∂z as a function of h, with an argument `out`.
    bias_slope: Callable[..., Tensor] | None = None


def _modrelu_(z: Tensor, bias: Tensor | None, sign: Tensor, modulus: Tensor) -> None:
    torch.sgn(z, out=sign)
    torch.addcmul(cast(Tensor, bias), z, sign, out=modulus)
    torch.mul(sign, modulus.relu_(), out=z)


def _pulls(kernel: Any, *constants: float) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """A kernel of ``torch``'s own backward passes, as a function and in place."""
    there, in_place = kernel.default, kernel.grad_input
    return (
        lambda grad, state: there(grad, state, *constants),
        lambda grad, state: in_place(grad, state, *constants, grad_input=grad),
    )


_aten = torch.ops.aten
_RULES: dict[type[nn.Module], _Rule] = {
    # The sign of h is that of z, and h is zero where the derivative is: hardshrink's at 0.
    ModReLU: _Rule(_modrelu_, *_pulls(_aten.hardshrink_backward, 0.0), torch.sgn),
    nn.ReLU: _Rule(lambda z, *_: z.relu_(), *_pulls(_aten.threshold_backward, 0.0)),
    nn.Tanh: _Rule(lambda z, *_: z.tanh_(), *_pulls(_aten.tanh_backward)),
    nn.Identity: _Rule(lambda z, *_: z, lambda grad, _: grad, lambda grad, _: grad),
}


class _Scan(torch.autograd.Function):
    """Rows of ``drive`` become states, and ``drive`` the output."""

    @staticmethod
    def forward(
        ctx: Any, drive: Tensor, first: Tensor, weight: Tensor, bias: Tensor | None, rule: _Rule
    ) -> Tensor:
        # States are rows, so W h is written h W^T, which is no adjoint.
        recurrence = weight.t()
        room = torch.empty_like(first), torch.empty_like(first)
        state = first
        for step in drive.split(len(first)):
            step.addmm_(state, recurrence)
            rule.apply_(step, bias, *room)
            state = step
        ctx.rule = rule
        ctx.mark_dirty(drive)
        ctx.save_for_backward(drive, first if ctx.needs_input_grad[2] else None, weight)
        ctx.batch = len(first)
        return drive

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        rule: _Rule = ctx.rule
        states, first, weight = ctx.saved_tensors
        for_drive, for_first, for_weight, for_bias, _ = ctx.needs_input_grad
        if torch.is_grad_enabled() or not _is_ordinary(grads[0]):
            adjoint = _adjoint(rule, grads[0], states, weight, ctx.batch)
            bias_grad = None
            if for_bias:
                bias_grad = (adjoint * cast(Any, rule.bias_slope)(states)).sum(0)
        else:
            adjoint, bias_grad = _adjoint_in_place(
                rule, grads[0], states, weight, ctx.batch, for_bias=for_bias
            )
        start, later = adjoint[: ctx.batch], adjoint[ctx.batch :]
        weight_grad = None
        if for_weight:
            weight_grad = torch.addmm(start.t() @ first, later.t(), states[: len(later)])
        return (
            adjoint if for_drive else None,
            start @ weight if for_first else None,
            weight_grad,
            bias_grad,
            None,
        )


def _adjoint(rule: _Rule, grad: Tensor, states: Tensor, weight: Tensor, batch: int) -> Tensor:
    """Return the gradients at z of all steps, by differentiable operations."""
    steps: list[Tensor] = []
    for incoming, state in zip(
        reversed(grad.split(batch)), reversed(states.split(batch)), strict=True
    ):
        total = torch.addmm(incoming, steps[-1], weight) if steps else incoming
        steps.append(rule.pull(total, state))
    return torch.cat(steps[::-1])


def _adjoint_in_place(
    rule: _Rule, grad: Tensor, states: Tensor, weight: Tensor, batch: int, *, for_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """The same in one buffer, with the bias's gradient while a step is in cache."""
    adjoint = torch.empty_like(states, memory_format=torch.contiguous_format)
    room = states.new_empty(batch, states.shape[1]) if for_bias else None
    sums = torch.zeros_like(room) if room is not None else None
    following: Tensor | None = None
    for incoming, state, step in zip(
        reversed(grad.split(batch)),
        reversed(states.split(batch)),
        reversed(adjoint.split(batch)),
        strict=True,
    ):
        if following is None:
            step.copy_(incoming)
        else:
            torch.addmm(incoming, following, weight, out=step)
        rule.pull_(step, state)
        if sums is not None and rule.bias_slope is not None:
            sums.addcmul_(step, rule.bias_slope(state, out=room))
        following = step
    return adjoint, sums.sum(0) if sums is not None else None


def scan_(drive: Tensor, first: Tensor, weight: Tensor, activation: nn.Module) -> Tensor:
    r"""Overwrite the inputs of a recurrence by its states.

    .. math:: h_t = \sigma(u_t + W h_{t-1}), \qquad
              \delta_t = \sigma'(h_t) \circ (g_t + W^T \delta_{t+1}), \qquad
              \nabla_W = \sum_t \delta_t h_{t-1}^T

    with :math:`g_t` the gradient that arrives at step t, and :math:`\nabla_W` one matrix product.
    It can be differentiated any number of times.

    Shape:
        - ``drive``: ``(L N, hidden)``, the N rows of each step one after another.
        - ``first``: ``(N, hidden)``; ``weight``: ``(hidden, hidden)``.
        - Returns ``drive``, overwritten.

    Args:
        drive: u, a tensor without other uses.
        first: The state before the first step.
        weight: W.
        activation: A module that ``can_scan`` accepts.
    """
    bias = activation.bias if isinstance(activation, ModReLU) else None
    rule = _RULES[type(activation)]
    states: Tensor = _Scan.apply(drive, first, weight, bias, rule)  # type: ignore[no-untyped-call]
    return states


def can_scan(drive: Tensor, first: Tensor, weight: Tensor, activation: nn.Module) -> bool:
    """Whether ``scan_`` is equivalent to a loop over ``activation``.

    Not under tracing, transforms or autocast, for tensor subclasses, and for activations of other
    classes or with hooks.

    Args:
        drive: As in ``scan_``, like the others.
        first: The state before the first step.
        weight: W.
        activation: Any module.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if type(activation) not in _RULES or _is_altered(activation):
        return False
    tensors = [drive, first, weight]
    if isinstance(activation, ModReLU):
        if activation.bias.shape != drive.shape[1:]:
            return False
        tensors.append(activation.bias)
    return (
        drive.is_floating_point()
        and drive.device.type in ("cpu", "cuda")  # other devices may lack these kernels
        and len(first) > 0
        and len({(tensor.dtype, tensor.device) for tensor in tensors}) == 1
        and all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
        and not torch.is_autocast_enabled(drive.device.type)
        and all(map(_is_ordinary, tensors))
    )


def _is_altered(activation: nn.Module) -> bool:
    """Whether a call does more than the forward of its class."""
    return bool(
        "forward" in vars(activation)
        or activation._compiled_call_impl is not None
        or activation._forward_hooks
        or activation._forward_pre_hooks
        or activation._backward_hooks
        or activation._backward_pre_hooks
        or hooks._has_any_global_hook()
    )


def _is_ordinary(tensor: Tensor) -> bool:
    """Whether operations on it only compute, so that they may write into buffers."""
    kind = type(tensor)
    return (
        not torch.compiler.is_compiling()
        and (
            kind is Tensor
            or (
                # Tagged parameters, but no subclasses that override operations.
                issubclass(kind, nn.Parameter)
                and kind.__torch_function__ is nn.Parameter.__torch_function__
                and kind.__torch_dispatch__ is Tensor.__torch_dispatch__
            )
        )
        and tensor.layout == torch.strided
        and _get_current_dispatch_mode() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and not torch._C._functorch.is_legacy_batchedtensor(tensor)  # of is_grads_batched
        and forward_ad.unpack_dual(tensor).tangent is None
    )
