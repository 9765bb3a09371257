"""Converting a fresh model to the structure of a low-rank state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...graph.program import unwrapped
from ...interruption import undoing
from ...nn.low_rank import LowRankFactors
from ..snapshot import ModelSnapshot
from .targets import has_counterpart, target_of

__all__ = ["low_rank_like_"]


def low_rank_like_(model: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """Replace the layers of a fresh model that a state dict has low-rank factors for, in place.

    The ranks, the split and whether the factors are orthonormal are those of the state, which is
    not loaded::

        ru.init.low_rank_like_(model, state)
        model.load_state_dict(state)

    Args:
        model: a model as it was before :func:`low_rank_`.
        state: the state dict of the converted one.

    Returns:
        The names of the replaced layers.

    Raises:
        TypeError: the state is no mapping.
        ValueError: the factors of a layer do not fit the model, or there are none. The model is
            then as it was.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"a state dict is needed, got a {type(state).__name__}")
    model = unwrapped(model)
    factors = {
        key[:-2]: (value, state[f"{key[:-2]}.B"])
        for key, value in state.items()
        if key.endswith(".A") and f"{key[:-2]}.B" in state
    }
    record = ModelSnapshot(model)

    def work() -> list[str]:
        shared: dict[int, LowRankFactors] = {}
        for name, (a, b) in factors.items():
            dense = _dense(model, name)
            layer = shared.get(id(dense))
            if layer is None and not isinstance(dense, LowRankFactors):
                layer = shared[id(dense)] = _counterpart(dense, name, a, b, f"{name}.s" in state)
            if layer is not None:
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, layer)
        if not factors:
            raise ValueError(
                "the state holds no low-rank factors, entries such as 'layer.A' beside 'layer.B'; "
                "give the state dict of a model that low_rank_ converted"
            )
        return list(factors)

    return undoing(work, record.restore)


def _dense(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"the state has low-rank factors of {name!r}, which {type(model).__name__} does not "
            "have. The model was not changed"
        ) from None


def _counterpart(
    dense: nn.Module, name: str, a: Tensor, b: Tensor, orthonormal: bool
) -> LowRankFactors:
    """Return the low-rank layer with the shapes of these factors."""
    rank = a.shape[1]
    for split in ("channel", "spatial") if has_counterpart(dense) else ():
        target = target_of(dense, split=split)
        assert target is not None
        try:
            layer = target.empty(rank, orthonormal=orthonormal)
        except ValueError:  # the rank is above the full one of the layer
            continue
        if layer.A.shape == a.shape and layer.B.shape == b.shape:
            return layer
    raise ValueError(
        f"the factors of {name!r}, {tuple(a.shape)} and {tuple(b.shape)}, do not fit its "
        f"{type(dense).__name__}. The model was not changed"
    )
