"""The second half of a warm start: gains, matching, folding, and the errors of the function."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...diagnostics import orthogonality_error
from ...parallel import as_whole, local_part, scattered
from ..calibration import Batch
from ..recording import Recorder, in_double, outputs_of, relative_error, rounding_of
from .folding import Folding
from .matching import Placed, match_layers_, own_gains, owners, remaining_gain
from .report import WarmStart, WarmStartReport

__all__ = ["Conversion"]

_MATCHED = "matched layers"
_FOLDED = "nearest points with gains folded"
_NEAREST = "nearest points alone"
_WAYS = (_MATCHED, _FOLDED, _NEAREST)


class Conversion:
    """The second half of a warm start: gains, matching, folding, and the errors of the function.

    Args:
        model: with its trained weights, in evaluation mode.
        placed: the tagged parameters with their points.
        folding: which gains can be folded; None to fold none.
        batches: calibration inputs; may be none.
    """

    def __init__(
        self,
        model: nn.Module,
        placed: dict[str, Placed],
        folding: Folding | None,
        batches: Sequence[Batch],
    ) -> None:
        self.model, self.placed, self.folding, self.batches = model, placed, folding, batches
        self.gains: dict[str, float] = {}
        self.folded: dict[str, tuple[float, float]] = {}
        self.fitted: list[str] = []
        self.notes = [folding.note] if folding is not None and folding.note else []
        self.errors: dict[str, list[float]] = {}
        self.total: list[float] = []
        self._modules = self._measurable() if batches else {}

    def _measurable(self) -> dict[str, nn.Module]:
        held = owners(self.model)
        found = {name: held[item.parameter] for name, item in self.placed.items()}
        return {name: owner[0][0] for name, owner in found.items() if len(owner) == 1}

    def _run(self) -> tuple[list[Tensor], dict[nn.Module, list[Tensor]]]:
        outputs = outputs_of(self.model, self.batches)
        return outputs, Recorder(self.model, self.batches).outputs(set(self._modules.values()))[0]

    def convert_(self, *, match: bool, refit: bool) -> None:
        """Convert the model in place, by the way that preserves its outputs best."""
        if not self.batches:
            self._finish_()
            return
        saved = {p: p.detach().clone() for p in self.model.parameters()}
        original = self._run()
        for item in self.placed.values():
            item.parameter.copy_(item.point)
        self._record_errors(original, {})
        _restore_(saved)
        self._choose_(original[0], saved, match=match, refit=refit)
        self._finish_()
        self._record_errors(original, self.gains)

    def _choose_(
        self,
        original: list[Tensor],
        saved: dict[nn.Parameter, Tensor],
        *,
        match: bool,
        refit: bool,
    ) -> None:
        """Match the layers, take the nearest points, or fold no gain, whichever is best.

        Later ways are chosen only if they are better by more than rounding.
        """
        errors = {_NEAREST: self.total[0]}
        plain = {name: (item.point, item.gain) for name, item in self.placed.items()}
        if self.folding is not None and self.folding.foldable:
            # gain * point gives the same outputs as the points with folded gains.
            gains = own_gains(self.placed, self.folding)
            for name, item in self.placed.items():
                gain = gains.get(name) or remaining_gain(name, self.folding, gains)
                item.parameter.copy_(gain * item.point)
            errors[_FOLDED] = self._error(original)
            _restore_(saved)
        if match:
            self.fitted = match_layers_(
                self.model, self.placed, self.batches, self.folding, refit=refit
            )
            errors[_MATCHED] = self._error(original)
        rounding = rounding_of(original)
        best = min(errors.values())
        way = next(w for w in _WAYS if w in errors and errors[w] <= max(best, rounding))
        if way == next(w for w in _WAYS if w in errors):
            return
        compared = ", ".join(f"{w} {errors[w]:.3g}" for w in _WAYS if w in errors)
        self.notes.append(f"function errors: {compared}; {way} were taken")
        _restore_(saved)
        self.fitted = []
        for name, item in self.placed.items():
            item.point, item.gain = plain[name]
            item.method = "polar" if match else item.method
        if way == _NEAREST:
            self.folding = None

    def _error(self, original: list[Tensor]) -> float:
        """Return the relative error of the model's outputs, infinite where they are not finite."""
        try:
            return relative_error(outputs_of(self.model, self.batches), original)
        except ValueError:
            return math.inf

    def _finish_(self) -> None:
        self.gains = own_gains(self.placed, self.folding)
        if self.folding is not None:
            self.folded = self.folding.fold_(self.gains)
        for item in self.placed.values():
            local_part(item.parameter).copy_(scattered(item.point, item.parameter))

    def _record_errors(
        self, original: tuple[list[Tensor], dict[nn.Module, list[Tensor]]], gains: dict[str, float]
    ) -> None:
        outputs, layers = self._run()
        self.total.append(relative_error(outputs, original[0]))
        for name, module in self._modules.items():
            scale: float | None = 1.0
            if self.folding is not None:
                scale = self.folding.output_scale(name, module, gains)
            if scale is not None and module in layers and module in original[1]:
                error = relative_error(layers[module], original[1][module], factor=scale)
                self.errors.setdefault(name, []).append(error)

    def report(self, conditions: Mapping[str, float]) -> WarmStartReport:
        """Return the report."""
        records = {}
        reasons = self.folding.reasons if self.folding is not None else {}
        for name, item in self.placed.items():
            point = as_whole(item.parameter).as_subclass(Tensor)
            w, u = in_double(item.weight), in_double(point)
            size = torch.linalg.vector_norm(w).clamp_min(torch.finfo(torch.float64).tiny)
            before, after = self.errors.get(name, (None, None))
            folded = name in self.gains
            why = reasons.get(name, "")
            if self.folding is not None and not folded and not why:
                why = "its gain is not positive"
            notes = [item.note] if item.note else []
            if why and item.gain != 1:
                notes.append(f"gain not folded: {why}")
            records[name] = WarmStart(
                distance=float(torch.linalg.vector_norm(w - u) / size),
                error_before=float(orthogonality_error(item.weight, item.manifold)),
                error_after=float(orthogonality_error(point, item.manifold)),
                gain=item.gain,
                condition=conditions[name],
                method=item.method,
                folded=folded,
                note="; ".join(notes),
                function_error_before=before,
                function_error_after=after,
                loss=item.loss,
            )
        first, last = self.total if self.total else (None, None)
        return WarmStartReport(
            records,
            folded=self.folded,
            fitted=tuple(self.fitted),
            function_error_before=first,
            function_error_after=last,
            notes=tuple(self.notes),
        )


def _restore_(saved: Mapping[nn.Parameter, Tensor]) -> None:
    for p, value in saved.items():
        p.copy_(value)
