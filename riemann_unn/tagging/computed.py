"""Computed tensors: weights that parametrizations compute from other parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

__all__ = [
    "REMEDY",
    "Computed",
    "computed_tensors",
    "is_of_parametrization",
    "original_of_weight",
    "weight_of_original",
]

_FOLDER = "parametrizations"
REMEDY = (
    "torch.nn.utils.parametrize.remove_parametrizations({}, {!r}, leave_parametrized=True), which "
    "keeps the weight"
)
# torch's older, hook-based functions: suffixes of the parameters they keep, and the remedy.
_OLDER = (
    ("_v", "_g", "torch.nn.utils.remove_weight_norm({}, {!r})"),
    ("_orig", "_mask", "torch.nn.utils.prune.remove({}, {!r})"),
    ("_orig", "_u", "torch.nn.utils.remove_spectral_norm({}, {!r})"),
)


class Computed(NamedTuple):
    """A tensor that its module computes.

    Attributes:
        name: its path from the searched module.
        by: what computes it.
        remedy: the call after which it is a parameter of the same value.
    """

    name: str
    by: str
    remedy: str


def is_of_parametrization(name: str) -> bool:
    """Tell whether a parameter's name is that of an original, which a weight is computed from."""
    return _FOLDER in name.split(".")


def original_of_weight(name: str) -> str:
    """Return the prefix of the names of a weight's originals and of their parametrizations."""
    path, _, own = name.rpartition(".")
    return f"{path}.{_FOLDER}.{own}." if path else f"{_FOLDER}.{own}."


def weight_of_original(name: str) -> str | None:
    """Return the name of the weight that an original belongs to; None for other names."""
    path, folder, rest = f".{name}".rpartition(f".{_FOLDER}.")
    return f"{path}.{rest.partition('.')[0]}".lstrip(".") if folder else None


def computed_tensors(module: nn.Module) -> Iterator[Computed]:
    """Yield the computed weights of a module and its submodules."""
    for path, part in module.named_modules():
        here = f"model.get_submodule({path!r})" if path else "model"
        start = f"{path}." if path else ""
        if is_parametrized(part):
            for name, chain in part.parametrizations.items():
                by = " and ".join(type(one).__name__.lstrip("_") for one in chain)
                yield Computed(start + name, f"parametrized by {by}", REMEDY.format(here, name))
        for kept in part._parameters:
            for suffix, other, remedy in _OLDER:
                name = kept.removesuffix(suffix)
                is_replaced = name != kept and name not in part._parameters
                if is_replaced and hasattr(part, name) and hasattr(part, name + other):
                    yield Computed(
                        start + name, f"computed from {kept!r}", remedy.format(here, name)
                    )
