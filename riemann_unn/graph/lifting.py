"""Path energies: the squared weights of all paths through each weight, by one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from .model import ModelGraph
from .program import operation
from .regions import boundaries, keeps_statistics
from .walk import run_on_constants
from .writes import Aliases, writes_to

__all__ = ["path_energies"]


@dataclass(frozen=True)
class _Squares:
    """An activation of the lifted network, or the squares of a weight beside the weight."""

    value: Tensor
    weight: Tensor | None = None


def path_energies(
    view: ModelGraph,
    inputs: Sequence[Any] | None = None,
    *,
    tensors: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    r"""Return the diagonal of the path kernel: the squared paths through each weight without it.

    .. math:: g_i = (\partial\Phi^T \partial\Phi)_{ii}
        = \sum_{\text{paths } p \ni i} \; \prod_{j \in p,\, j \ne i} \theta_j^2

    It is the gradient, with respect to :math:`\theta^2`, of the sum of outputs of the network whose
    weights are squared, on an input of ones. Batch normalisation is taken as the affine map of
    evaluation mode. At an operation that is not homogeneous the network ends, and another one with
    an input of ones begins: each region of the model is a network of its own, see
    :func:`riemann_unn.graph.regions.regions`.

    Args:
        view: from :func:`riemann_unn.graph.trace`.
        inputs: the leaves of the model's arguments, of the traced shapes, whose squares replace the
            ones.
        tensors: values that replace the model's weights, by name.

    Returns:
        By canonical name, for each weight that touches a space, a float64 tensor of its shape,
        for one example: the mean over the first dimension of the first input.

    Reference:
        Lebeurrier, Vayer, Gribonval, "Path-conditioned training" (2026); Gonon, Brisebarre,
        Riccietti, Gribonval, "A path-norm toolkit for modern networks" (2024), for the lifting.
    """
    values = {**view.tensors, **(tensors or {})}
    squares = {name: _square(values[name]).requires_grad_() for name in view.scalings}
    sources = view.program.sources.values()
    examples = [s.value for s in sources if s.kind == "input" and isinstance(s.value, Tensor)]
    batch = next((max(x.shape[0], 1) for x in examples if x.ndim), 1)
    with torch.enable_grad():
        total = _Lifted(view, squares, inputs).run() / batch
    found: Sequence[Tensor | None] = [None] * len(squares)
    if total.requires_grad:
        found = torch.autograd.grad(total, list(squares.values()), allow_unused=True)
    return {
        name: torch.zeros_like(squares[name]) if g is None else g.clamp_min_(0)
        for name, g in zip(squares, found, strict=True)
    }


class _Lifted:
    """The network with squared weights, as a walk over the same graph."""

    def __init__(
        self, view: ModelGraph, squares: Mapping[str, Tensor], inputs: Sequence[Any] | None
    ) -> None:
        self.view, self.of_inputs = view, inputs is not None
        self.inputs = iter(inputs or ())
        self.squares = squares
        self.device = next((s.device for s in squares.values()), torch.device("cpu"))
        self.ends: list[Tensor] = []

    def run(self) -> Tensor:
        """Return the sum of the outputs of all regions, or a part of it."""
        values: dict[fx.Node, Any] = {}
        graph = self.view.program.graph
        aliases, ends = Aliases(graph), boundaries(self.view)
        for node in graph.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "output":
                self._end((args, kwargs))
                continue
            if node.op == "placeholder":
                values[node] = self._placeholder(node)
            else:
                values[node] = self._operation(node, args, dict(kwargs))
                aliases.write_(node, values, self._overwritten)
            if node in ends:
                self._end(values[node])
                values[node] = tree_map(self._restarted, values[node])
        return sum(self.ends, torch.zeros((), dtype=torch.float64, device=self.device))

    def _placeholder(self, node: fx.Node) -> Any:
        source = self.view.program.sources[node.name]
        value = source.value
        if source.kind == "input" and self.of_inputs:
            value = next(self.inputs)
        if not isinstance(value, Tensor) or not _is_number(value):
            return value
        if source.kind == "constant":
            return value.clone()
        if source.kind == "input":
            return _Squares(_square(value)) if self.of_inputs else self._ones(value)
        own = value.detach()
        squares = self.squares.get(self.view.weights[node.name])
        return _Squares(_square(own) if squares is None else squares, own)

    def _ones(self, like: Any) -> Any:
        """Return the input of a region that starts at a tensor."""
        if not isinstance(like, Tensor):
            return like
        if not _is_number(like):
            return torch.zeros(like.shape, dtype=like.dtype, device=self.device)
        return _Squares(torch.ones(like.shape, dtype=torch.float64, device=self.device))

    def _restarted(self, x: Any) -> Any:
        return self._ones(x.value) if isinstance(x, _Squares) else x

    def _overwritten(self, node: fx.Node, values: list[Any]) -> Callable[[Any], Any]:
        self._end(values)
        return lambda shape: self._ones(torch.empty(shape, device="meta"))

    def _end(self, values: Any) -> None:
        for x in tree_leaves(values):
            if isinstance(x, _Squares) and x.weight is None:
                self.ends.append(x.value.sum())

    def _operation(self, node: fx.Node, args: Any, kwargs: dict[str, Any]) -> Any:
        name = node.name
        rule = self.view.rules.get(name)
        if name in self.view.opaque_results:
            return self._opaque_result(node)
        if rule is None:
            copy = writes_to(node)  # not into the model's tensors

            def real(x: Any) -> Any:
                return (_weight(x).clone() if copy else _weight(x)) if _is_tracked(x) else x

            return run_on_constants(node, *tree_map(real, (args, kwargs)))
        own = _RULES.get(rule)
        if own is not None:
            return own(self, node, args, kwargs)
        kwargs.pop("dtype", None)
        weights = [x for x in tree_leaves(args) if isinstance(x, _Squares) and x.weight is not None]
        lifted = tree_map(_factor if rule in _LINEAR else _value, (args, kwargs))
        squares = _run(node, *lifted)
        if rule in _VIEWS and weights and args[0] is weights[0]:
            views = _run(node, *tree_map(_weight, (args, kwargs)))
            return tree_map(_Squares, squares, views)
        return tree_map(lambda x: _Squares(x) if _is_number(x) else x, squares)

    def _opaque_result(self, node: fx.Node) -> Any:
        found = tree_map(self._ones, self.view.opaque_results[node.name])
        if operation(node) in ("softmax", "_softmax") and isinstance(found, _Squares):
            dim = node.args[1]  # weights of a mean
            found = _Squares(found.value / found.value.shape[int(dim)])  # type: ignore[arg-type]
        return found


def _run(node: fx.Node, args: Any, kwargs: Any) -> Any:
    result = node.meta.get("val")
    if operation(node) in ("view", "_unsafe_view") and isinstance(result, Tensor):
        return args[0].reshape(result.shape)
    assert callable(node.target)
    if operation(node).endswith("_"):
        args = (args[0].clone(), *args[1:])
    return node.target(*args, **kwargs)


def _is_tracked(x: Any) -> bool:
    return isinstance(x, _Squares)


def _value(x: Any) -> Any:
    if isinstance(x, _Squares):
        return x.value
    return x.double() if _is_number(x) and not x.is_complex() else x


def _factor(x: Any) -> Any:
    """A factor of a product: constants are squared too."""
    return _squared(x) if _is_tracked(x) or _is_number(x) else x


def _weight(x: Any) -> Any:
    return x.weight if isinstance(x, _Squares) else x


def _is_number(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def _square(x: Tensor) -> Tensor:
    x = x.detach().abs() if x.is_complex() else x.detach()
    return x.square() if x.dtype == torch.float64 else x.double().square_()


def _squared(x: Any) -> Any:
    if isinstance(x, _Squares):
        return x.value
    return _square(x) if isinstance(x, Tensor) else abs(x) ** 2


# -- operations that differ on squares ------------------------------------------------------------


def _same(lifted: _Lifted, node: fx.Node, args: Any, kwargs: Any) -> Any:
    return args[0]


def _item(lifted: _Lifted, node: fx.Node, args: Any, kwargs: Any) -> Any:
    return args[0][args[1]]


def _expanded(lifted: _Lifted, node: fx.Node, args: Any, kwargs: Any) -> _Squares:
    shape = node.meta["val"].shape
    x = args[0].value
    return _Squares(x.reshape(shape) if x.numel() == shape.numel() else x.expand(shape))


def _add(lifted: _Lifted, node: fx.Node, args: Any, kwargs: Any) -> _Squares:
    """Differences too: a path keeps its energy when its sign changes."""
    a, b = _squared(args[0]), _squared(args[1] if len(args) > 1 else kwargs["other"])
    kind = operation(node).rstrip("_")
    if kind in ("maximum", "fmax", "max"):
        return _Squares(torch.maximum(a, b))
    if kind in ("minimum", "fmin", "min"):
        return _Squares(torch.minimum(a, b))
    alpha = args[2] if len(args) > 2 else kwargs.get("alpha", 1)
    scaled = alpha**2 * (a if kind == "rsub" else b)
    return _Squares(scaled + (b if kind == "rsub" else a))


def _reduce(lifted: _Lifted, node: fx.Node, args: Any, kwargs: Any) -> Any:
    second = args[1] if len(args) > 1 else kwargs.get("other")
    if isinstance(second, (_Squares, Tensor)):
        return _add(lifted, node, args, kwargs)
    kwargs.pop("dtype", None)
    found = _run(node, *tree_map(_value, (args, kwargs)))
    return tree_map(lambda x: _Squares(x) if _is_number(x) else x, found)


def _where(lifted: _Lifted, node: fx.Node, args: Any, kwargs: Any) -> _Squares:
    """The choice depends on signs, which squares do not have."""
    a, b = (_squared(x) for x in args[1:3])
    largest = torch.maximum(*(torch.as_tensor(x, dtype=torch.float64) for x in (a, b)))
    return _Squares(largest.expand(node.meta["val"].shape))


def _multiply(lifted: _Lifted, node: fx.Node, args: Any, kwargs: Any) -> _Squares:
    return _Squares(_squared(args[0]) * _squared(args[1] if len(args) > 1 else kwargs["other"]))


def _multiply_add(lifted: _Lifted, node: fx.Node, args: Any, kwargs: Any) -> _Squares:
    x, a, b = map(_squared, args[:3])
    return _Squares(x + float(kwargs.get("value", 1)) ** 2 * a * b)


def _divide(lifted: _Lifted, node: fx.Node, args: Any, kwargs: Any) -> _Squares:
    return _Squares(_squared(args[0]) / _squared(args[1] if len(args) > 1 else kwargs["other"]))


def _signs(lifted: _Lifted, node: fx.Node, args: Any, kwargs: Any) -> _Squares:
    shape = node.meta["val"].shape
    return _Squares(torch.ones(shape, dtype=torch.float64, device=lifted.device))


def _constants(lifted: _Lifted, node: fx.Node, args: Any, kwargs: Any) -> _Squares:
    made = _signs(lifted, node, args, kwargs)
    return _Squares(torch.zeros_like(made.value)) if "zeros" in str(node.target) else made


def _overwrite(lifted: _Lifted, node: fx.Node, args: Any, kwargs: Any) -> _Squares:
    return _Squares(_squared(args[1]).expand(node.meta["val"].shape))


def _join(lifted: _Lifted, node: fx.Node, args: Any, kwargs: Any) -> _Squares:
    parts, *rest = args if args else (kwargs.pop("tensors"),)
    assert callable(node.target)
    return _Squares(node.target([_squared(x) for x in parts], *rest, **kwargs))


def _attention(lifted: _Lifted, node: fx.Node, args: Any, kwargs: Any) -> _Squares:
    """A mean over all positions, as with equal attention weights."""
    shape = node.meta["val"].shape
    mean = _squared(args[2]).mean(-2, keepdim=True)
    if mean.ndim > 2 and mean.shape[-3] not in (1, shape[-3]):
        mean = mean.repeat_interleave(shape[-3] // mean.shape[-3], dim=-3)
    return _Squares(mean.expand(shape))


def _norm(lifted: _Lifted, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Normalisation as an affine map with constant statistics, squared."""
    x, channels_last = _squared(args[0]), operation(node) in _CHANNELS_LAST
    at = 1 if operation(node) in ("batch_norm", "instance_norm", "native_batch_norm") else 2
    weight = args[at].value
    bias = args[at + 1] if len(args) > at + 1 else kwargs.get("bias")
    constant = torch.zeros_like(weight)
    if keeps_statistics(node):
        mean, variance = (x.weight.double() for x in args[3:5])
        epsilon = args[7] if len(args) > 7 else kwargs.get("eps", 1e-5)
        weight = weight / (variance + epsilon)
        constant = weight * mean.square()
    else:
        lifted._end(args[0])
        x = torch.ones_like(x)
    if isinstance(bias, _Squares):
        constant = constant + bias.value
    shape = weight.shape if channels_last else (-1, *(1,) * (x.ndim - 2))
    made = _Squares(x * weight.reshape(shape) + constant.reshape(shape))
    result = node.meta["val"]
    if isinstance(result, Tensor):
        return made
    return (made, *(lifted._ones(y) for y in result[1:]))


_CHANNELS_LAST = ("layer_norm", "rms_norm", "native_layer_norm")


def _embedding(lifted: _Lifted, node: fx.Node, args: Any, kwargs: Any) -> _Squares:
    weight, indices = args[0].value, args[1]
    if isinstance(indices, Tensor) and lifted.of_inputs:
        return _Squares(torch.nn.functional.embedding(indices, weight))
    return _Squares(weight.mean(0).expand(node.meta["val"].shape))


_LINEAR = ("convolution", "linear", "matmul", "addmm", "einsum")
_VIEWS = ("move", "same", "cast", "like", "getitem")
_RULES: dict[str, Callable[[_Lifted, fx.Node, Any, Any], Any]] = {
    **dict.fromkeys(("same", "cast", "clamp", "threshold"), _same),
    "getitem": _item,
    "like": _expanded,
    "masked": _expanded,
    "add": _add,
    "reduce": _reduce,
    "where": _where,
    "multiply": _multiply,
    "multiply_add": _multiply_add,
    "divide": _divide,
    "compare": _signs,
    "constants": _constants,
    "overwrite": _overwrite,
    "join": _join,
    "attention": _attention,
    "norm": _norm,
    "embedding": _embedding,
}
