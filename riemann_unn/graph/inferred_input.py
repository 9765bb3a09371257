"""Inferring an input for a model from its first layer's channels, where none was given."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ..errors import GraphError
from .isolation import drop_references, preserved, silenced
from .program import named_tensors

__all__ = ["inferred_input"]

# Sizes of common data sets first; the others matter only to models with one fixed size.
_COMMON = (32, 64, 224, 28, 16, 8, 96, 128, 256)
_SIZES = (*_COMMON, *(n for n in range(1, 321) if n not in _COMMON))
_BATCH = 2
_NORMS = ((nn.BatchNorm1d, 1), (nn.BatchNorm2d, 2), (nn.BatchNorm3d, 3))
_Shape = tuple[tuple[int, ...], torch.dtype | None]


def inferred_input(model: nn.Module) -> Tensor:
    """Return a random input on which a model runs, from a separate generator.

    Raises:
        GraphError: there is none among the common ones, or the forward takes several.
    """
    needed = [
        name
        for name, p in inspect.signature(model.forward).parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(needed) > 1:
        raise GraphError(
            f"the model's inputs are {', '.join(needed)}, whose shapes cannot be inferred; pass "
            "example inputs"
        )
    own = next((p for p in model.parameters() if p.is_floating_point() or p.is_complex()), None)
    device = torch.device("cpu") if own is None else own.device
    first: Exception | None = None
    has_forward = getattr(model.forward, "__func__", None) is not nn.Module.forward
    tried: set[_Shape] = set()
    with silenced():
        for shape, dtype in _shapes(model):
            if (shape, dtype) in tried:
                continue
            tried.add((shape, dtype))
            dtype = dtype or (torch.float32 if own is None else own.dtype)
            try:
                _run_without_values(model, shape, dtype, device)
            except DataDependentOutputException:
                pass  # as far as shapes tell it runs
            except Exception as error:  # the model's own code runs, and may raise anything
                first = first or error
                if not has_forward:  # no input helps
                    break
                continue
            return _random(shape, dtype).to(device)
    why = "" if first is None else f". With the first guess: {type(first).__name__}: {first}"
    raise GraphError(
        "the shape of the model's input cannot be inferred, because no layer tells it; pass "
        f"example inputs{why}"
    ) from first


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.zeros(shape, dtype=dtype)
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def _run_without_values(
    model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        _run_on_fake_tensors(model, shape, dtype, device, mode)
    finally:
        drop_references(mode)


def _run_on_fake_tensors(
    model: nn.Module,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    mode: FakeTensorMode,
) -> None:
    with preserved(model), torch.no_grad(), mode:
        for module in model.modules():  # hooks must not see tensors without values
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        fakes: dict[str, Tensor] = {
            name: mode.from_tensor(t) for name, t in named_tensors(model).items()
        }
        x = torch.empty(shape, dtype=dtype, device=device)
        torch.func.functional_call(model, fakes, (x,))


def _shapes(model: nn.Module) -> Iterator[_Shape]:
    """Yield candidate shapes, the likeliest first, with a dtype where it is not the model's."""
    sizes = _SIZES
    for module in model.modules():
        found = list(_read_by(module, sizes))
        yield from found
        if found:
            sizes = _COMMON  # another layer may come first, but unusual sizes are unlikely
    weight = next((p for p in model.parameters() if p.ndim > 1), None)
    if weight is not None:  # a weight of a function, such as F.conv2d
        for n in _SIZES if weight.ndim > 2 else (0,):
            yield (_BATCH, weight.shape[1], *(n,) * (weight.ndim - 2)), None


def _read_by(module: nn.Module, sizes: Sequence[int]) -> Iterator[_Shape]:
    """Yield input shapes of a layer, by the names of its size attributes."""
    if isinstance(module, nn.Embedding):
        yield (_BATCH, 8), torch.int64
        return
    width = _first_int(module, "input_size", "embed_dim", "d_model")
    if width is not None:  # recurrent layers and attention
        yield (5, _BATCH, width), None
        yield (_BATCH, width), None
        return
    width = _first_int(module, "in_features")
    if width is not None:
        yield (_BATCH, width), None
        yield (_BATCH, 4, width), None
        return
    channels = _first_int(module, "in_channels", "num_features")
    dims = next((dims for kind, dims in _NORMS if isinstance(module, kind)), None)
    kernel = getattr(module, "kernel_size", None)
    dims = len(kernel) if isinstance(kernel, tuple) else dims
    if channels is not None and dims is not None:
        yield from (((_BATCH, channels, *(n,) * dims), None) for n in sizes)


def _first_int(module: nn.Module, *names: str) -> int | None:
    values = (getattr(module, name, None) for name in names)
    return next((v for v in values if isinstance(v, int)), None)
