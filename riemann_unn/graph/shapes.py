"""An input for a model that was given none: the first layer says how many channels it reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..errors import GraphError

__all__ = ["candidate_inputs", "placeholders"]

# Sizes of common data sets first; what follows matters only to models with one fixed size.
_COMMON = (32, 64, 224, 28, 16, 8, 96, 128, 256)
_SIZES = (*_COMMON, *(n for n in range(1, 321) if n not in _COMMON))
_BATCH = 2
# How many dimensions follow the channels of what a layer reads; None: the channels come last.
_DIMENSIONS: dict[Any, int | None] = {
    **dict.fromkeys((nn.Linear, F.linear), None),
    **dict.fromkeys((nn.Conv1d, nn.ConvTranspose1d, F.conv1d), 1),
    **dict.fromkeys((nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, F.conv2d), 2),
    **dict.fromkeys((nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d, F.conv3d), 3),
}


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """Return the inputs of a graph that have no default."""
    return [node for node in graph.nodes if node.op == "placeholder" and not node.args]


def candidate_inputs(graph: fx.Graph, root: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yield inputs on the meta device that may fit, by name, the likeliest first.

    Raises:
        GraphError: no layer that reads an input tells its shape.
    """
    shapes = {node.name: _shapes(node, graph, root) for node in placeholders(graph)}
    for name, options in shapes.items():
        if not options:
            raise GraphError(
                f"the shape of the input '{name}' cannot be inferred, because no layer reads it "
                "directly; pass example inputs"
            )
    dtype = next((p.dtype for p in root.parameters() if p.is_floating_point()), None)
    for i in range(max(map(len, shapes.values()), default=1)):
        yield {
            name: torch.empty(shape, dtype=kind or dtype, device="meta")
            for name, options in shapes.items()
            for shape, kind in [options[min(i, len(options) - 1)]]
        }


def _shapes(
    start: fx.Node, graph: fx.Graph, root: nn.Module
) -> list[tuple[tuple[int, ...], torch.dtype | None]]:
    """The possible shapes, with a dtype where it is not the model's, of one input."""
    reached = {start}
    for node in graph.nodes:
        if not reached.intersection(node.all_input_nodes):
            continue
        module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.Embedding):
            return [((_BATCH, 8), torch.int64)]
        width = _first_int(module, "input_size", "embed_dim", "d_model")
        if width is not None:  # recurrent layers and attention
            return [((5, _BATCH, width), None)]
        kinds = [node.target] if module is None else type(module).__mro__
        kind = next((k for k in kinds if k in _DIMENSIONS), None)
        channels = _channels(node, module, root)
        if kind is not None and channels is not None:
            dims = _DIMENSIONS[kind]
            if dims is None:
                return [((_BATCH, channels), None), ((_BATCH, 4, channels), None)]
            return [((_BATCH, channels, *(size,) * dims), None) for size in _SIZES]
        reached.add(node)
    return []


def _channels(node: fx.Node, module: nn.Module | None, root: nn.Module) -> int | None:
    """How many channels a layer reads; a weight that may be computed is not looked at."""
    if module is not None:
        return _first_int(module, "in_features", "in_channels", "num_features")
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    owner, _, name = str(weight.target).rpartition(".")
    value: Tensor = getattr(root.get_submodule(owner), name)
    groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    return value.shape[1] * groups if isinstance(groups, int) else None


def _first_int(module: nn.Module | None, *names: str) -> int | None:
    values = (getattr(module, name, None) for name in names)
    return next((v for v in values if isinstance(v, int)), None)
