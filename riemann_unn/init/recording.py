"""Running a model on calibration data without changing it, and recording its modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..interruption import afterwards, random_states
from .calibration import Batch, cannot_run, cloned, tensors_of

__all__ = [
    "Order",
    "Recorder",
    "evaluating",
    "in_double",
    "outputs_of",
    "relative_error",
    "rounding_of",
    "same_buffers",
]


def evaluating(model: nn.Module) -> ExitStack:
    """Switch to evaluation mode, and restore modes and random states at exit."""
    modes = [(m, m.training) for m in model.modules()]
    restore_random_states = random_states(model)

    def restore() -> None:
        for m, mode in modes:
            m.training = mode
        restore_random_states()

    for m, _ in modes:
        m.training = False
    return afterwards(restore)


def outputs_of(model: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    """Return all floating point tensors that the model returns, batch after batch.

    Raises:
        ValueError: the model cannot be run on a batch, or returns no number, NaN or infinity.
    """
    found = []
    for batch in batches:
        try:
            with same_buffers(model):
                result = batch(model)
        except Exception as error:  # the model's own code may raise anything
            raise cannot_run(error, batch, model) from error
        tensors = [t.detach().clone() for t in tensors_of(result) if _is_number(t)]
        if not tensors:
            raise ValueError(
                f"the model returns no floating point tensor on calibration batch {batch.number}, "
                "so that nothing can be compared; pass forward=, (model, batch) -> output"
            )
        if any(not bool(torch.isfinite(t).all()) for t in tensors):
            raise ValueError(
                f"the model returns NaN or infinity on calibration batch {batch.number}"
            )
        found += tensors
    return found


def _is_number(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


def in_double(x: Tensor) -> Tensor:
    """Return a tensor in double precision."""
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def relative_error(new: Iterable[Tensor], old: Iterable[Tensor], *, factor: float = 1.0) -> float:
    """Return ‖new / factor - old‖ / ‖old‖ over all tensors, in double precision."""
    off = size = 0.0
    for a, b in zip(new, old, strict=True):
        b = in_double(b)
        off += float((a.to(b.dtype) / factor - b).abs().square().sum())
        size += float(b.abs().square().sum())
    if size > 0:
        return float((off / size) ** 0.5)
    return 0.0 if off == 0 else float("inf")


def rounding_of(outputs: Sequence[Tensor]) -> float:
    """Return the relative error of outputs that rounding may explain.

    A thousand times the unit of the coarsest dtype, but eight times for half precision.
    """
    eps = max(torch.finfo(t.dtype).eps for t in outputs)
    return eps * (1e3 if eps < 1e-5 else 8)


def same_buffers(model: nn.Module) -> ExitStack:
    """Restore the buffers of a model, such as counters and caches, at exit."""
    held = [(m, name, b) for m in model.modules() for name, b in m._buffers.items()]
    saved = [None if b is None else b.detach().clone() for _, _, b in held]

    def restore() -> None:
        for (m, name, b), old in zip(held, saved, strict=True):
            m._buffers[name] = b
            if b is not None and old is not None and not torch.equal(b, old):
                b.detach().copy_(old)

    return afterwards(restore)


class _Reached(BaseException):
    """Ends a run early; a BaseException, so that handlers in the model do not catch it."""


class Recorder:
    """Runs a model and records the calls of some of its modules.

    Args:
        model: the model.
        batches: its inputs.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self.model = model
        self.batches = batches

    def outputs(self, modules: Iterable[nn.Module]) -> tuple[dict[nn.Module, list[Tensor]], Order]:
        """Return each module's output tensors, and the order in which they were called.

        A module that returns no single tensor has no entry.
        """
        found: dict[nn.Module, list[Tensor]] = {}
        order = Order()

        def record(module: nn.Module, args: Any, output: Any) -> None:
            order.add(module)
            if isinstance(output, Tensor):
                found.setdefault(module, []).append(output.detach().clone())

        with _hooked(m.register_forward_hook(record) for m in modules):
            for batch in self.batches:
                order.start()
                with same_buffers(self.model):
                    batch(self.model)
        return found, order

    def inputs(self, module: nn.Module, order: Order) -> list[Batch]:
        """Return the arguments of every call of a module, running no further than its last one."""
        calls: list[Batch] = []
        left = 0

        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal left
            calls.append(Batch(cloned(args), cloned(kwargs)))
            left -= 1
            if left == 0:
                raise _Reached

        with _hooked([module.register_forward_pre_hook(record, with_kwargs=True)]):
            for batch, counts in zip(self.batches, order.counts, strict=True):
                left = counts.get(module, 0)
                if left:
                    with suppress(_Reached), same_buffers(self.model):
                        batch(self.model)
        return calls


class Order:
    """The order in which modules were called, and how often in each batch."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.counts: list[dict[nn.Module, int]] = []

    def start(self) -> None:
        """Begin a batch."""
        self.counts.append({})

    def add(self, module: nn.Module) -> None:
        """Record a call."""
        if module not in self.modules:
            self.modules.append(module)
        self.counts[-1][module] = self.counts[-1].get(module, 0) + 1


def _hooked(handles: Iterable[Any]) -> ExitStack:
    """Remove hooks at exit."""
    stack = ExitStack()
    for handle in handles:
        stack.callback(handle.remove)
    return stack
