"""What tracing a model gives: its layers, their spaces, and how its parameters scale with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from ..errors import GraphError
from .propagate import Layer, Role, Walk
from .shapes import candidate_inputs, placeholders
from .spaces import Spaces, compact
from .tracing import symbolic_trace, untouched

__all__ = ["ModelGraph", "Scaling", "trace"]


@dataclass(frozen=True)
class Scaling:
    r"""How one parameter changes when the activations of space i are multiplied by :math:`s_i`.

    .. math:: w' = w \cdot s_{\text{gain}} / s_{\text{loss}}

    entry by entry, on the parameter seen in the shape ``view``.

    Attributes:
        name: canonical name of the parameter.
        view: shape that the parameter is reshaped to.
        gain: int64, broadcasts with ``view``: the space each entry feeds.
        loss: the space each entry reads, likewise; None for biases, norms and embeddings.
    """

    name: str
    view: tuple[int, ...]
    gain: Tensor
    loss: Tensor | None

    def factor(self, scales: Tensor) -> Tensor:
        """Return what the parameter, reshaped to ``view``, is to be multiplied by.

        Args:
            scales: ``(spaces,)``, positive, and one for fixed spaces.
        """
        gain = scales[self.gain.to(scales.device)]
        return gain if self.loss is None else gain / scales[self.loss.to(scales.device)]

    def matrices(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Sum over entries that feed and read the same spaces.

        Args:
            values: anything that the parameter has an entry of, of the parameter's shape.

        Returns:
            Sums ``(batch, rows, columns)``, the space each row feeds ``(batch, rows)``, and the
            space each column reads ``(batch, columns)``; None and one column where nothing is read.
        """
        if self.loss is None:
            summed = values.reshape(self.view).reshape(-1, self.gain.numel()).sum(0)
            return summed.reshape(1, -1, 1), self.gain.reshape(1, -1), None
        if len(self.view) == 2:
            return values.unsqueeze(0), self.gain.reshape(1, -1), self.loss.reshape(1, -1)
        summed = values.reshape(*self.view[:3], -1).sum(-1)
        gain, loss = (x.reshape(x.shape[:3]) for x in (self.gain, self.loss))
        if gain.shape[1] != self.view[1] or loss.shape[2] != self.view[2]:  # transposed
            summed = summed.mT
        return summed, gain.reshape(len(gain), -1), loss.reshape(len(loss), -1)


@dataclass(frozen=True)
class ModelGraph:
    """The view of a model that :func:`trace` gives.

    Attributes:
        layers: the calls of layers in the order in which they run. Those that run only in the
            other of training and evaluation mode come last.
        scalings: how each parameter that touches a space scales, by canonical name.
        reasons: for each space why it is fixed, or None where it is free.
        graph: the fx graph, in the mode the model is in.
        inputs: the inputs by placeholder name, tensors on the meta device.
        opaque: paths of submodules that torch.fx could not enter.
        rules: by node, the name of the rule that its operation went by.
        constants: tensors that the forward made while it was traced, by the name of their node.
        closings: by node, what came out of an operation that is not homogeneous, as meta tensors.
    """

    layers: tuple[Layer, ...]
    scalings: Mapping[str, Scaling]
    reasons: tuple[str | None, ...]
    graph: fx.Graph
    inputs: Mapping[str, Any]
    opaque: tuple[str, ...]
    rules: Mapping[str, str]
    closings: Mapping[str, Any]
    constants: Mapping[str, Tensor]

    @property
    def free(self) -> Tensor:
        """Bool ``(spaces,)``: which may be scaled."""
        return torch.tensor([reason is None for reason in self.reasons], dtype=torch.bool)

    def closed(self, spaces: Tensor) -> str | None:
        """Why some of these spaces are fixed, or None if all of them are free."""
        found = (self.reasons[i] for i in spaces.unique().tolist())
        return next((reason for reason in found if reason is not None), None)

    @torch.no_grad()
    def scale_(self, parameters: Mapping[str, Tensor], scales: Tensor) -> None:
        """Scale parameters in place so that the model's function stays as it is.

        Args:
            parameters: at least those named in ``scalings``, by canonical name.
            scales: float64 ``(spaces,)``, positive, and one for fixed spaces.
        """
        for name, scaling in self.scalings.items():
            p = parameters[name]
            own = scales.to(p.device)
            factors = [own[scaling.gain.to(p.device)]]
            if scaling.loss is not None:
                factors.append(own[scaling.loss.to(p.device)].reciprocal())
            factors = [f for f in factors if bool((f != 1).any())]
            if factors:
                scaled = p.reshape(scaling.view)
                for factor in factors:
                    scaled = scaled * factor  # in double precision, whatever the parameter's
                p.copy_(scaled.reshape(p.shape))


def trace(
    model: nn.Module,
    *example_inputs: Any,
    rigid: Mapping[str, str] | None = None,
    per: Literal["channel", "tensor"] = "channel",
) -> ModelGraph:
    r"""Find which activations of a model can be scaled without changing its function.

    The scales :math:`s > 0` of the free spaces leave every output as it is when each parameter
    becomes :math:`w \cdot s_{\text{out}} / s_{\text{in}}`, in training and in evaluation mode.
    Between two layers the channels have one space each; sums join them, concatenation, reshapes and
    permutations move them, and whatever is not positively homogeneous fixes them. The model is not
    run and not changed: mode, buffers and the global random state stay as they are.

    Args:
        model: the model.
        example_inputs: arguments of its forward, of which only shapes and dtypes matter. Without
            them they are guessed from the first layers.
        rigid: parameters that must not be scaled, by name, each with the reason to report.
        per: one space for each channel of a layer's output, or one for all of them.

    Returns:
        The layers, the spaces and the scalings.

    Raises:
        GraphError: the model cannot be traced, or an operation cannot be followed; the message
            names the node.
        TypeError: ``model`` is no module, or its parameters have no values yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a torch.nn.Module is needed, got a {type(model).__name__}")
    named = dict(model.named_parameters(remove_duplicate=False))
    for name, p in named.items():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise TypeError(f"'{name}' has no shape yet; run the model once, then trace it")
    canonical: dict[Any, str] = {}
    for name, p in named.items():
        canonical.setdefault(_memory(p), name)
    reasons = {canonical[_memory(named[n])]: why for n, why in (rigid or {}).items()}
    spaces = Spaces(per_channel=per == "channel")

    def walk() -> Walk:
        return Walk(model, lambda p: canonical.get(_memory(p)), reasons, spaces)

    with untouched(model):
        graph, opaque = symbolic_trace(model)
        constants = _constants(graph, model)
        inputs, main = _walk_inputs(graph, model, example_inputs, walk)
        walks = [main]
        for mode in {True, False} - {m.training for m in model.modules()} or {True, False}:
            for module in model.modules():
                module.training = mode
            other, more = symbolic_trace(model)
            if str(other) != str(graph):
                opaque |= more
                walks.append(walk())
                walks[-1].run(other, inputs)
    merged = walk()
    for part in walks:
        for name, roles in part.roles.items():
            merged.roles.setdefault(name, []).extend(roles)
        merged.frozen.update(part.frozen)
    merged.share()
    return _result(merged, walks, graph, inputs, opaque, constants)


def _constants(graph: fx.Graph, model: nn.Module) -> dict[str, Tensor]:
    """Tensors that tracing keeps as attributes of the model, which are gone after it."""
    found = {}
    for node in graph.nodes:
        value = vars(model).get(str(node.target)) if node.op == "get_attr" else None
        if isinstance(value, Tensor):
            found[node.name] = value.clone()
    return found


def _memory(p: Tensor) -> Any:
    """What two names of one parameter have in common."""
    if p.device.type == "meta" or p.numel() == 0:
        return id(p)
    return p.device, p.data_ptr(), tuple(p.shape), p.stride()


def _walk_inputs(
    graph: fx.Graph, model: nn.Module, examples: Sequence[Any], walk: Callable[[], Walk]
) -> tuple[Mapping[str, Any], Walk]:
    """Walk a graph with the given inputs, or with the first guess that fits."""
    names = [node.name for node in graph.nodes if node.op == "placeholder"]
    if examples:
        if len(examples) > len(names) or len(examples) < len(placeholders(graph)):
            raise GraphError(
                f"the model's inputs are {', '.join(names)}; got {len(examples)} example inputs"
            )
        inputs = dict(zip(names, tree_map(_to_meta, tuple(examples)), strict=False))
        main = walk()
        main.run(graph, inputs)
        return inputs, main
    first: GraphError | None = None
    for guess in candidate_inputs(graph, model):
        trial = walk()
        trial.spaces = Spaces(per_channel=False)
        try:
            trial.run(graph, guess)
        except GraphError as error:
            first = first or error
            continue
        main = walk()
        main.run(graph, guess)
        return guess, main
    raise GraphError(
        "the shape of the model's input cannot be inferred; pass example inputs. "
        f"With the first guess: {first}"
    ) from first


def _to_meta(x: Any) -> Any:
    return x.detach().to("meta") if isinstance(x, Tensor) else x


def _result(
    merged: Walk,
    walks: Sequence[Walk],
    graph: fx.Graph,
    inputs: Mapping[str, Any],
    opaque: set[str],
    constants: Mapping[str, Tensor],
) -> ModelGraph:
    """Number the spaces that parameters touch, and write everything in these numbers."""
    spaces = merged.spaces
    number: dict[int, int] = {}

    def numbered(ids: Tensor) -> Tensor:
        short = compact(ids)
        distinct, place = short.unique(return_inverse=True)
        found = [number.setdefault(spaces.find(i), len(number)) for i in distinct.tolist()]
        return torch.tensor(found, dtype=torch.int64)[place].expand(ids.shape)

    def scaling(name: str, role: Role) -> Scaling:
        loss = None if role.loss is None else numbered(role.loss)
        return Scaling(name, role.view, numbered(role.gain), loss)

    def renumbered(use: Layer) -> Layer:
        read = None if use.inputs is None else numbered(use.inputs)
        return replace(use, inputs=read, outputs=numbered(use.outputs))

    uses = list(walks[0].uses)
    seen = {(use.module, use.weight) for use in uses}
    for walk in walks[1:]:
        uses += [use for use in walk.uses if (use.module, use.weight) not in seen]
    layers = tuple(renumbered(use) for use in uses)
    scalings = {name: scaling(name, roles[0]) for name, roles in merged.roles.items()}
    reasons = tuple(spaces.reason(root) for root in number)
    return ModelGraph(
        layers,
        scalings,
        reasons,
        graph,
        inputs,
        tuple(sorted(opaque)),
        walks[0].rules,
        walks[0].closed,
        constants,
    )
