"""What the layers of a model are given: inputs gathered by hooks, as rows of a matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..calibration import Batch, Split, cannot_run
from ..recording import same_buffers, undisturbed

__all__ = ["Rows", "gather"]

_FIT_ROWS = 4096
_HELD_OUT_ROWS = 2048


class Rows(NamedTuple):
    """Inputs of one layer: rows to fit to, and rows held out (None if there are too few)."""

    fit: Tensor
    held_out: Tensor | None


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
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Batch], most: int
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
            try:
                batch(model)
            except Exception as error:  # the model's own code runs, and may raise anything
                raise cannot_run(error, batch, model) from error
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts).clone() for name, parts in seen.items()}


def gather(model: nn.Module, layers: Mapping[str, nn.Module], batches: Split) -> dict[str, Rows]:
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
        fit = _pass(model, layers, batches.fit, _FIT_ROWS)
        held = _pass(model, layers, batches.held_out, _HELD_OUT_ROWS)
    for name, rows in fit.items():
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(
                f"layer {name!r} sees NaN or infinity on the calibration inputs; check them and "
                "the weights before it. The model was not changed"
            )
    return {name: Rows(rows, held.get(name)) for name, rows in fit.items()}
