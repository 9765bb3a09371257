"""The effect of one layer's error on the outputs of a model."""

from __future__ import annotations

from torch import Tensor, nn

from ..calibration import Split
from ..recording import evaluating, outputs_of, relative_error
from .plan import Candidates, Curve
from .problem import Method, Problem

__all__ = ["Effect"]


class Effect:
    """Runs a model with one layer replaced, on the first batch of its calibration inputs.

    Args:
        model: the model.
        found: its layers.
        data: the inputs.
    """

    def __init__(self, model: nn.Module, found: Candidates, data: Split) -> None:
        self._model, self._found, self._batches = model, found, data.fit[:1]
        self._outputs = self._run()

    def _run(self) -> list[Tensor]:
        with evaluating(self._model):
            return outputs_of(self._model, self._batches)

    def of(self, name: str, problem: Problem, method: Method, curve: Curve) -> float:
        """Return the squared relative error of the outputs over that of the layer.

        Args:
            name: of the layer.
            problem: the layer's.
            method: by which it would be replaced.
            curve: errors by rank; the layer is replaced at the middle rank.
        """
        ranks = sorted(curve)
        rank = ranks[len(ranks) // 2]
        own = curve[rank][1]
        target = self._found.layers[name]
        thin = target.empty(rank, orthonormal=False)
        thin.set_factors_(*problem.without_norm(problem.solve(method, rank, 0)))
        try:
            self._found.put_(self._model, name, thin)
            error = relative_error(self._run(), self._outputs)
        finally:
            self._found.put_(self._model, name, target.module)
        return error**2 / max(own, 1e-12)
