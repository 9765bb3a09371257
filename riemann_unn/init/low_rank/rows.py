"""The inputs of a model's layers, gathered by hooks, as rows of a matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..calibration import Batch, Split, cannot_run
from ..recording import evaluating, same_buffers
from .targets import Target

__all__ = ["Rows", "gather"]

_FIT_ROWS = 4096
_HELD_OUT_ROWS = 2048


class Rows(NamedTuple):
    """Inputs of one layer: rows to fit to, and rows held out (None if there are too few)."""

    fit: Tensor
    held_out: Tensor | None


def _pass(
    model: nn.Module, layers: Mapping[str, Target], batches: Sequence[Batch], most: int
) -> dict[str, Tensor]:
    """Run the batches and return the rows of each layer, in the order in which they ran."""
    seen: dict[str, list[Tensor]] = {}
    quota = -(-most // max(len(batches), 1))
    generator = torch.Generator()

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            parts = seen.setdefault(name, [])
            generator.manual_seed(len(parts))
            rows = layers[name].rows(x.detach(), quota, generator)
            parts.append(rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows)

        return keep

    handles = [
        layer.module.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        for batch in batches:
            try:
                batch(model)
            except Exception as error:  # the model's own code may raise anything
                raise cannot_run(error, batch, model) from error
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts).clone() for name, parts in seen.items()}


def gather(model: nn.Module, layers: Mapping[str, Target], batches: Split) -> dict[str, Rows]:
    """Return the inputs of the layers, as rows: vectors for linear layers, patches for others.

    The model runs in evaluation mode and does not change. Up to 4,096 rows of each layer are
    kept, and 2,048 held out, drawn evenly over the batches, the same ones every time.

    Args:
        model: the model.
        layers: layers of it by name.
        batches: its inputs.

    Raises:
        ValueError: the model cannot be run on the batches, or an input is not finite.
    """
    with torch.no_grad(), evaluating(model), same_buffers(model):
        fit = _pass(model, layers, batches.fit, _FIT_ROWS)
        held = _pass(model, layers, batches.held_out, _HELD_OUT_ROWS)
    for name, rows in fit.items():
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(
                f"layer {name!r} sees NaN or infinity on the calibration inputs; check them and "
                "the weights before it. The model was not changed"
            )
    return {name: Rows(rows, held.get(name)) for name, rows in fit.items()}
