"""Running a model on calibration inputs, and leaving no trace of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..interruption import afterwards, random_states

__all__ = [
    "Batch",
    "Order",
    "Recorder",
    "batches_of",
    "in_double",
    "outputs_of",
    "relative_error",
    "same_buffers",
    "undisturbed",
]


@dataclass(frozen=True)
class Batch:
    """The arguments of one call of a model or a layer, which may write to copies of them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, module: nn.Module) -> Any:
        return module(*_cloned(self.args), **_cloned(self.kwargs))


def _batch(item: Any) -> Batch:
    if isinstance(item, Tensor):
        return Batch((item,), {})
    if isinstance(item, Mapping):
        return Batch((), dict(item))
    if isinstance(item, tuple):
        return Batch(item, {})
    if isinstance(item, list) and item:  # what a DataLoader yields: inputs, then labels
        return Batch((item[0],), {})
    raise TypeError(
        f"a calibration batch is a {type(item).__name__}; give a tensor, a tuple of positional "
        "arguments or a dict of keyword arguments of the model"
    )


def batches_of(calibration: Any) -> list[Batch]:
    """Return calibration inputs as a list of batches.

    Args:
        calibration: a tensor, a tuple of positional arguments or a dict of keyword
            arguments (one batch), or an iterable of these; of a list inside an
            iterable, as a ``DataLoader`` yields, the first element is used.

    Raises:
        TypeError: it is something else.
        ValueError: it is empty.
    """
    if isinstance(calibration, (Tensor, tuple, Mapping)):
        found = [_batch(calibration)]
    elif isinstance(calibration, Iterable):
        found = [_batch(item) for item in calibration]
    else:
        raise TypeError(
            f"calibration is a {type(calibration).__name__}; give a tensor, a tuple of inputs, "
            "or an iterable of batches"
        )
    tensors = [t for b in found for t in _tensors((b.args, b.kwargs))]
    if not found or not tensors or all(t.numel() == 0 for t in tensors):
        raise ValueError("calibration is empty; give at least one batch of inputs")
    for t in tensors:
        if not bool(torch.isfinite(t).all()):
            raise ValueError("calibration holds NaN or infinity; leave such inputs out")
    return found


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in _tensors(v)]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in _tensors(v)]
    return []


def _cloned(value: Any) -> Any:
    """Copy the tensors of some arguments: a later operation in place must not change them."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(_cloned(v) for v in value)
    if type(value) is dict:
        return {k: _cloned(v) for k, v in value.items()}
    return value


def undisturbed(model: nn.Module) -> ExitStack:
    """Evaluation mode inside; afterwards modes and random states are what they were."""
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
        ValueError: the model cannot be run on a batch, or returns NaN or infinity.
    """
    found = []
    for i, batch in enumerate(batches):
        try:
            with same_buffers(model):
                result = batch(model)
        except Exception as error:
            raise ValueError(
                f"the model cannot be run on calibration batch {i}: {type(error).__name__}: "
                f"{error}. A batch holds the arguments of the model's forward and no labels"
            ) from error
        tensors = [t.detach().clone() for t in _tensors(result) if _is_number(t)]
        if any(not bool(torch.isfinite(t).all()) for t in tensors):
            raise ValueError(f"the model returns NaN or infinity on calibration batch {i}")
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


def same_buffers(model: nn.Module) -> ExitStack:
    """Undo what running a model does to its buffers, such as counters and caches."""
    held = [(m, name, b) for m in model.modules() for name, b in m._buffers.items()]
    saved = [None if b is None else b.detach().clone() for _, _, b in held]

    def restore() -> None:
        for (m, name, b), old in zip(held, saved, strict=True):
            m._buffers[name] = b
            if b is not None and old is not None and not torch.equal(b, old):
                b.detach().copy_(old)

    return afterwards(restore)


class _Reached(BaseException):
    """Ends a run early; no exception of the model's, so that no handler of it catches this."""


class Recorder:
    """Runs a model and records the calls of some of its modules.

    Args:
        model: the model.
        batches: what to run it on.
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

        def note(module: nn.Module, args: Any, output: Any) -> None:
            order.add(module)
            if isinstance(output, Tensor):
                found.setdefault(module, []).append(output.detach().clone())

        with _hooked(m.register_forward_hook(note) for m in modules):
            for batch in self.batches:
                order.start()
                with same_buffers(self.model):
                    batch(self.model)
        return found, order

    def inputs(self, module: nn.Module, order: Order) -> list[Batch]:
        """Return the arguments of every call of a module, running no further than its last one."""
        calls: list[Batch] = []
        left = 0

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal left
            calls.append(Batch(_cloned(args), _cloned(kwargs)))
            left -= 1
            if left == 0:
                raise _Reached

        with _hooked([module.register_forward_pre_hook(note, with_kwargs=True)]):
            for batch, counts in zip(self.batches, order.counts, strict=True):
                left = counts.get(module, 0)
                if left:
                    with suppress(_Reached), same_buffers(self.model):
                        batch(self.model)
        return calls


class Order:
    """In which order, and how often in each batch, modules were called."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.counts: list[dict[nn.Module, int]] = []

    def start(self) -> None:
        """Begin a batch."""
        self.counts.append({})

    def add(self, module: nn.Module) -> None:
        """Note a call."""
        if module not in self.modules:
            self.modules.append(module)
        self.counts[-1][module] = self.counts[-1].get(module, 0) + 1


def _hooked(handles: Iterable[Any]) -> ExitStack:
    """Remove hooks afterwards."""
    stack = ExitStack()
    for handle in handles:
        stack.callback(handle.remove)
    return stack
