"""Copying trained weights from a state dict or another model, all of them or none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ManifoldError, ManifoldTypeError
from ...tagging import REMEDY, computed_tensors, original_of_weight, weight_of_original
from ..recording import evaluating

__all__ = ["load_"]


def load_(model: nn.Module, source: Any, tagged: Iterable[str]) -> None:
    """Copy the entries of a source into the parameters and buffers of the same names.

    A weight that the source computes is taken as it is: of a module, whatever parametrizes it; of a
    state dict that of ``parametrizations.weight_norm``, whose entries determine it. Entries of
    others, orthogonal ones among them, do not determine the weight, and are refused.

    Args:
        model: the model to write to.
        source: a state dict or a model; it must hold every tagged parameter, and
            nothing that the model does not have.
        tagged: names of the tagged parameters.

    Raises:
        ManifoldError: names are missing or unknown, or shapes or kinds of number
            differ, or weights are not determined; the message lists them all, and nothing was
            copied.
        ManifoldTypeError: the source is something else.
    """
    own = model.state_dict(keep_vars=True)
    if isinstance(source, nn.Module):
        source = _state_of(source)
    if not isinstance(source, Mapping):
        raise ManifoldTypeError(
            f"source is a {type(source).__name__}; give a state dict or a torch.nn.Module"
        )
    entries = {k: v for k, v in source.items() if isinstance(v, Tensor)}
    for path, part in model.named_modules():
        translate = getattr(
            part, "translate_state_", None
        )  # OrthogonalRNN accepts a state of nn.RNN
        if translate is not None:
            translate(entries, f"{path}." if path else "")
    problems, undetermined = _compute_(entries, own)
    missing = [name for name in tagged if name not in entries and name not in undetermined]
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


def _state_of(source: nn.Module) -> dict[str, Any]:
    """Return the state of a module, with its computed weights."""
    state: dict[str, Any] = dict(source.state_dict())
    with evaluating(source):  # in training mode spectral_norm updates its vectors
        for one in computed_tensors(source):
            path, _, name = one.name.rpartition(".")
            value = getattr(source.get_submodule(path), name)
            if isinstance(value, Tensor):
                state[one.name] = value.detach().clone()
    return state


def _compute_(entries: dict[str, Tensor], own: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Replace originals by their weights; return the names of those that do not determine one."""
    problems, undetermined = [], []
    for name in dict.fromkeys(map(weight_of_original, entries)):
        if name is None or name not in own:
            continue
        start = original_of_weight(name)
        parts = [key for key in entries if key.startswith(start) and key not in own]
        values = {key.removeprefix(start): entries.pop(key) for key in parts}
        if not values or name in entries:  # a module has computed it
            continue
        if values.keys() == {"original0", "original1"} and _are_norms(*values.values()):
            entries[name] = _scaled(values["original0"], values["original1"])
            continue
        undetermined.append(name)
        problems.append(
            f"{name!r} is parametrized there, and {_listed(sorted(values))} do not determine it: "
            "give the model itself as source=, or its state_dict() after "
            + REMEDY.format("module", name.rpartition(".")[2])
        )
    return problems, undetermined


def _are_norms(g: Tensor, v: Tensor) -> bool:
    """Tell whether these have the shapes of a weight norm's lengths and directions."""
    fits = all(a in (1, b) for a, b in zip(g.shape, v.shape, strict=False))
    return g.ndim in (0, v.ndim) and fits and sum(a != 1 for a in g.shape) <= 1


def _scaled(g: Tensor, v: Tensor) -> Tensor:
    r"""Return :math:`g\, v / \|v\|`, with norms over the dimensions that g does not have."""
    dims = [d for d in range(v.ndim) if g.ndim == 0 or g.shape[d] == 1]
    scaled: Tensor = v * (g / torch.linalg.vector_norm(v, dim=dims, keepdim=True))
    return scaled


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
