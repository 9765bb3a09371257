"""Folding gains: absorbing the positive factor of a layer into its neighbours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ...errors import GraphError
from ...graph import Layer, ModelGraph, trace
from ...graph.isolation import without_weak_references
from ...graph.program import named_tensors, operation
from ..calibration import Batch
from ..recording import same_buffers

__all__ = ["Folding"]

_LINEAR = ("linear", "conv", "conv_transpose")
_WITH_STATISTICS = ("batch_norm", "instance_norm")
_NORMS = (*_WITH_STATISTICS, "group_norm", "layer_norm", "rms_norm")


@dataclass(frozen=True)
class _Norm:
    """A normalisation, as the names of its running statistics, if it has any."""

    mean: str | None
    variance: str | None
    eps: float


class _Potentials:
    """A union-find with the difference of values between any two members of a class."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))
        self._offset = [0.0] * count

    def find(self, i: int) -> tuple[int, float]:
        """Return the root of i and the value of i less that of the root."""
        total = 0.0
        while self._parent[i] != i:
            total += self._offset[i]
            i = self._parent[i]
        return i, total

    def tie(self, i: int, j: int, difference: float) -> bool:
        """Require value(j) - value(i) = difference; False if that contradicts what is required."""
        (a, x), (b, y) = self.find(i), self.find(j)
        if a == b:
            return abs(y - x - difference) <= 1e-9 * max(1.0, abs(difference), abs(x), abs(y))
        first, second = (a, b) if a < b else (b, a)
        shift = x + difference - y
        self._parent[second] = first
        self._offset[second] = shift if second == b else -shift
        return True

    def copy(self) -> _Potentials:
        """Return an independent copy."""
        other = _Potentials(0)
        other._parent, other._offset = list(self._parent), list(self._offset)
        return other


class Folding:
    r"""The gains that can be folded into neighbours, and the folding.

    A layer ``y = g U x + b`` becomes ``U x`` when the scale s of its output space,
    relative to that of its input space, is 1/g: activations in a space with
    scale s are s times what they were, biases are multiplied by the scale of the
    space they are added in, and other weights by that of their output space over that of their
    input space. A closed space has scale one. The scales of all foldable gains solve ``log s_out -
    log s_in = -log g``; gains are taken in order of execution, and one that contradicts those
    before it is not folded.

    The gain of a layer that feeds a normalisation alone is always folded: the normalisation divides
    it out, and running statistics are scaled with it.

    Args:
        model: the traced model.
        tagged: names of the tagged parameters.
        example: arguments of the model's forward, of which only shapes matter; without them they
            are inferred.
    """

    def __init__(self, model: nn.Module, tagged: Iterable[str], example: Batch) -> None:
        self._model = model
        self.reasons: dict[str, str] = {}
        """For each tagged parameter whose gain cannot be folded, why."""
        self.note = ""
        """Why nothing can be folded, if the model cannot be traced."""
        self._graph: ModelGraph | None = None
        self._order: list[str] = []
        self._norms: dict[str, _Norm] = {}
        self._tagged = tagged = list(tagged)
        with without_weak_references(model):
            self._graph = self._read(example)
        if self._graph is None:
            self.reasons = dict.fromkeys(tagged, "the model could not be traced")
            return
        for layer in self._graph.layers:
            if layer.weight in tagged and layer.weight not in self._order:
                self._order.append(layer.weight)
        for name in tagged:
            if name not in self._order:
                self.reasons[name] = "it is not the weight of a linear layer that tracing sees"
        self._norms = {name: norm for name in self._order if (norm := self._norm_behind(name))}
        # Whether constraints agree must not depend on the gains, so unrelated numbers stand for
        # them.
        generic = {name: math.sqrt(2 + i) * math.pi for i, name in enumerate(self._order)}
        self._solve(generic, note=True)

    def _read(self, example: Batch) -> ModelGraph | None:
        """Trace the model, or record why that fails."""
        try:
            with same_buffers(self._model):
                return trace(
                    self._model,
                    *example.args,
                    kwargs=example.kwargs,
                    forward=example.forward,
                    per="tensor",
                )
        except Exception as error:  # the model's own code may raise anything on fake tensors
            kind = "" if isinstance(error, GraphError) else f"{type(error).__name__}: "
            self.note = f"no gain was folded: {kind}{error}"
            return None

    @property
    def foldable(self) -> set[str]:
        """Names of the tagged parameters whose gain can be folded."""
        return {name for name in self._order if name not in self.reasons}

    def _norm_behind(self, name: str) -> _Norm | None:
        """Return the normalisation that alone reads a layer's output, or None."""
        graph = self._graph
        assert graph is not None
        calls = [layer for layer in graph.layers if layer.weight == name]
        nodes = {node.name: node for node in graph.program.graph.nodes}
        if len(calls) != 1 or calls[0].node not in nodes or calls[0].kind not in _LINEAR:
            return None
        bias = calls[0].bias
        users = list(nodes[calls[0].node].users)
        if len(users) != 1 or operation(users[0]) not in _NORMS:
            return None
        if bias is not None and sum(layer.bias == bias for layer in graph.layers) != 1:
            return None
        return self._as_norm(users[0], nodes)

    def _as_norm(self, node: fx.Node, nodes: Mapping[str, fx.Node]) -> _Norm | None:
        """The normalisation of a node, if nothing else uses its running statistics."""
        assert self._graph is not None
        if operation(node) not in _WITH_STATISTICS:
            return _Norm(None, None, 0.0)
        sources = self._graph.program.sources
        given = [node.args[i] if len(node.args) > i else None for i in (3, 4)]
        statistics = [x for x in given if isinstance(x, fx.Node)]
        names = [sources[x.name].name for x in statistics if x.name in sources]
        if len(names) != len(statistics) or any(len(x.users) != 1 for x in statistics):
            return None
        mean, variance = names if len(names) == 2 else (None, None)
        eps = node.args[7] if len(node.args) > 7 else 0.0
        return _Norm(mean, variance, float(eps) if isinstance(eps, (int, float)) else 0.0)

    def _solve(self, logs: Mapping[str, float], *, note: bool = False) -> Tensor:
        """Return the scale of each space for the logarithms of the gains."""
        graph = self._graph
        assert graph is not None
        count = len(graph.reasons)
        ties = _Potentials(count + 1)  # the last stands for all closed spaces
        for i, reason in enumerate(graph.reasons):
            if reason is not None:
                ties.tie(count, i, 0.0)
        for name in self._order:
            if name in self.reasons:
                continue
            trial = ties.copy()
            failed = None
            for layer in graph.layers:
                if layer.weight == name and failed is None:
                    failed = self._tie(trial, layer, logs[name])
            if failed is None:
                ties = trial
            elif note:
                self.reasons[name] = failed
        fixed_root, fixed_offset = ties.find(count)
        scales = torch.ones(count, dtype=torch.float64)
        for i in range(count):
            root, offset = ties.find(i)
            scales[i] = math.exp(offset - (fixed_offset if root == fixed_root else 0.0))
        scales[~graph.free] = 1.0
        return scales

    def _tie(self, ties: _Potentials, layer: Layer, log_gain: float) -> str | None:
        """Require one layer's gain of its spaces; return the reason if that is a contradiction."""
        graph = self._graph
        assert graph is not None
        if layer.kind not in _LINEAR or layer.inputs is None:
            return f"it is the weight of an operation of kind {layer.kind!r}"
        into, out = (sorted(set(x.tolist())) for x in (layer.inputs, layer.outputs))
        if layer.weight in self._norms:
            out = into
            log_gain = 0.0
        agree = all(ties.tie(s[0], i, 0.0) for s in (into, out) for i in s[1:])
        if agree and ties.tie(into[0], out[0], -log_gain):
            return None
        closed = graph.closed(layer.outputs) or graph.closed(layer.inputs)
        return "the scale of its output is settled" + (
            f": {closed}" if closed else " by what it is added to, or by layers before it"
        )

    def scales(self, name: str, gains: Mapping[str, float]) -> tuple[float, float]:
        """Return the scales of the input and the output of a tagged layer, for these gains.

        Their quotient is the remaining gain of a layer whose own cannot be folded; it depends only
        on gains of layers before it.
        """
        if self._graph is not None:
            scales = self._solve({n: math.log(gains.get(n, 1.0)) for n in self._order})
            for layer in self._graph.layers:
                if layer.weight == name and layer.inputs is not None:
                    into = float(scales[layer.inputs].mean())
                    if name in self._norms:
                        return into, into / gains.get(name, 1.0)
                    return into, float(scales[layer.outputs].mean())
        return 1.0, 1.0

    def output_scale(
        self, name: str, module: nn.Module, gains: Mapping[str, float]
    ) -> float | None:
        """Return the scale of the output of the module that holds a tagged weight, if known.

        It is unknown where the weight is used in a function call, since the module may do more.
        """
        if self._graph is None or module is self._model:
            return 1.0
        paths = {layer.module for layer in self._graph.layers if layer.weight == name}
        if any(not path or self._model.get_submodule(path) is not module for path in paths):
            return None
        return self.scales(name, gains)[1]

    @torch.no_grad()
    def fold_(self, gains: Mapping[str, float]) -> dict[str, tuple[float, float]]:
        """Scale the untagged parameters in place for the gains; the caller sets tagged ones.

        Args:
            gains: of the foldable parameters, positive; others count as 1.

        Returns:
            For each parameter that is scaled the smallest and largest factor.
        """
        if self._graph is None or all(g == 1 for g in gains.values()):
            return {}
        scales = self._solve({n: math.log(gains.get(n, 1.0)) for n in self._order})
        named = named_tensors(self._model)
        factors = {}
        for name, scaling in self._graph.scalings.items():
            factor = scaling.factor(scales)
            low, high = float(factor.min()), float(factor.max())
            if name not in self._tagged and max(abs(low - 1), abs(high - 1)) > 1e-12:
                factors[name] = (low, high)
        self._graph.scale_(named, scales)
        for name, norm in self._norms.items():
            _, out = self.scales(name, gains)
            factors.update(self._scale_norm_(name, norm, out, named))
        return factors

    def _scale_norm_(
        self, name: str, norm: _Norm, scale: float, named: Mapping[str, Tensor]
    ) -> dict[str, tuple[float, float]]:
        """Scale a layer's output and the running statistics of the normalisation behind it."""
        assert self._graph is not None
        factors = {}
        bias = next(layer.bias for layer in self._graph.layers if layer.weight == name)
        if scale != 1 and bias is not None:
            named[bias].mul_(scale)
            factors[bias] = (scale, scale)
        if scale != 1 and norm.mean is not None and norm.variance is not None:
            named[norm.mean].mul_(scale)
            named[norm.variance].add_(norm.eps).mul_(scale**2).sub_(norm.eps).clamp_min_(0)
            factors[norm.mean] = (scale, scale)
            factors[norm.variance] = (scale**2, scale**2)
        return factors
