"""Taking over trained weights from a state dict or another model, all of them or none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ...errors import ManifoldError, ManifoldTypeError

__all__ = ["load_"]


def load_(model: nn.Module, source: Any, tagged: Iterable[str]) -> None:
    """Copy the entries of a source into the parameters and buffers of the same names.

    Args:
        model: the model to write to.
        source: a state dict or a model; it must hold every tagged parameter, and
            nothing that the model does not have.
        tagged: names of the tagged parameters.

    Raises:
        ManifoldError: names are missing or unknown, or shapes or kinds of number
            differ; the message lists them all, and nothing was copied.
        ManifoldTypeError: the source is something else.
    """
    if isinstance(source, nn.Module):
        source = source.state_dict()
    if not isinstance(source, Mapping):
        raise ManifoldTypeError(
            f"source is a {type(source).__name__}; give a state dict or a torch.nn.Module"
        )
    own = model.state_dict(keep_vars=True)
    entries = {k: v for k, v in source.items() if isinstance(v, Tensor)}
    problems = []
    missing = [name for name in tagged if name not in entries]
    if missing:
        problems.append(f"it lacks the tagged {_listed(missing)}")
    unknown = [name for name in entries if not isinstance(own.get(name), Tensor)]
    if unknown:
        problems.append(f"the model has no {_listed(unknown)}")
    for name, value in entries.items():
        here = own.get(name)
        if not isinstance(here, Tensor):
            continue
        if value.shape != here.shape:
            problems.append(f"{name!r} is {tuple(value.shape)} there, {tuple(here.shape)} here")
        elif value.is_complex() and not here.is_complex():
            problems.append(f"{name!r} is {value.dtype} there, {here.dtype} here")
    if problems:
        raise ManifoldError(
            f"the source does not fit {type(model).__name__}: {'; '.join(problems)}. "
            "Rename or drop entries of the state dict so that they match; nothing was changed"
        )
    for name, value in entries.items():
        own[name].detach().copy_(value)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
