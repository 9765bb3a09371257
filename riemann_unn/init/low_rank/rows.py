"""What the layers of a model are given: inputs gathered by hooks, as rows of a matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..calibration import same_buffers, undisturbed

__all__ = ["Batches", "Rows", "gather", "split_batches"]

_FIT_ROWS = 4096
_HELD_OUT_ROWS = 2048
_HELD_OUT_SHARE = 5  # one in so many


class Rows(NamedTuple):
    """Inputs of one layer: rows to fit to, and rows held out (None if there are too few)."""

    fit: Tensor
    held_out: Tensor | None


class Batches(NamedTuple):
    """Batches to fit to, and batches held out."""

    fit: list[Any]
    held_out: list[Any]


def split_batches(calibration: Any) -> Batches:
    """Hold out one in five examples of a tensor, or one in five batches of several.

    Args:
        calibration: a tensor, one batch of the model's inputs; or an iterable of batches, each
            a tensor, a mapping of keyword arguments, or a sequence that begins with the input.

    Raises:
        TypeError: it is neither.
        ValueError: it is empty.
    """
    if isinstance(calibration, Tensor):
        if calibration.ndim == 0 or len(calibration) == 0:
            raise ValueError(f"calibration holds no example, {calibration.shape=}")
        held = torch.arange(len(calibration)) % _HELD_OUT_SHARE == _HELD_OUT_SHARE - 1
        held = held.to(calibration.device)
        rest = [calibration[held]] if bool(held.any()) else []
        return Batches([calibration[~held]], rest)
    if not isinstance(calibration, Iterable) or isinstance(calibration, (str, bytes, Mapping)):
        raise TypeError(
            "calibration is a tensor of the model's inputs or an iterable of batches such as a "
            f"DataLoader, got a {type(calibration).__name__}"
        )
    batches = list(calibration)
    if not batches:
        raise ValueError("calibration holds no batch")
    share = _HELD_OUT_SHARE if len(batches) >= _HELD_OUT_SHARE else len(batches)
    if share == 1:
        first = batches[0][0] if isinstance(batches[0], (tuple, list)) else batches[0]
        return split_batches(first) if isinstance(first, Tensor) else Batches(batches, [])
    held_out = batches[share - 1 :: share]
    return Batches([b for i, b in enumerate(batches) if i % share != share - 1], held_out)


def _run(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        model(batch[0])
    else:
        model(batch)


def _patches(x: Tensor, conv: nn.Conv2d, rows: int, generator: torch.Generator) -> Tensor:
    """Return some of the patches that a convolution sees, without forming them all."""
    x = x if x.ndim == 4 else x.unsqueeze(0)
    around = list(conv._reversed_padding_repeated_twice)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = functional.pad(x, around, mode=mode) if any(around) else x
    for dim, k, step, gap in zip((2, 3), conv.kernel_size, conv.stride, conv.dilation, strict=True):
        x = x.unfold(dim, gap * (k - 1) + 1, step)
    windows = x[..., :: conv.dilation[0], :: conv.dilation[1]]
    n, _, height, width = windows.shape[:4]
    chosen = _some(n * height * width, rows, generator).to(x.device)
    image, place = chosen // (height * width), chosen % (height * width)
    return windows[image, :, place // width, place % width].flatten(1)


def _some(total: int, most: int, generator: torch.Generator) -> Tensor:
    if total <= most:
        return torch.arange(total)
    return torch.randperm(total, generator=generator)[:most].sort().values


def _pass(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: list[Any], most: int
) -> dict[str, Tensor]:
    """Run the batches and return the rows each layer saw, the layers in the order they ran."""
    seen: dict[str, list[Tensor]] = {}
    quota = -(-most // max(len(batches), 1))
    generator = torch.Generator()

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            parts = seen.setdefault(name, [])
            generator.manual_seed(len(parts))
            if isinstance(module, nn.Conv2d):
                rows = _patches(x.detach(), module, quota, generator)
            else:
                flat = x.detach().reshape(-1, x.shape[-1])
                rows = flat[_some(len(flat), quota, generator).to(x.device)]
            parts.append(rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows)

        return keep

    handles = [
        layer.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        for batch in batches:
            _run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts).clone() for name, parts in seen.items()}


def gather(model: nn.Module, layers: Mapping[str, nn.Module], batches: Batches) -> dict[str, Rows]:
    """Return the inputs of the layers, as rows: vectors for linear layers, patches for others.

    The model runs in evaluation mode and is left as it was. Up to 4,096 rows of each layer are
    kept, and 2,048 held out, drawn evenly over the batches, the same ones every time.

    Args:
        model: the model.
        layers: layers of it by name.
        batches: what it is given.

    Raises:
        ValueError: the model cannot be run on the batches, or an input is not finite.
    """
    with torch.no_grad(), undisturbed(model), same_buffers(model):
        try:
            fit = _pass(model, layers, batches.fit, _FIT_ROWS)
            held = _pass(model, layers, batches.held_out, _HELD_OUT_ROWS)
        except Exception as error:  # the model's own code runs, and may raise anything
            raise ValueError(
                f"the model does not run on the calibration inputs, {_describe(batches.fit[0])}: "
                f"{type(error).__name__}: {error}. The model was not changed"
            ) from error
    for name, rows in fit.items():
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(
                f"layer {name!r} sees NaN or infinity on the calibration inputs; check them and "
                "the weights before it. The model was not changed"
            )
    return {name: Rows(rows, held.get(name)) for name, rows in fit.items()}


def _describe(batch: Any) -> str:
    if isinstance(batch, Sequence) and batch and not isinstance(batch, (str, bytes)):
        batch = batch[0]
    return f"shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
