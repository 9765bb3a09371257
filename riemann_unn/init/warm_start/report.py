"""The report of a warm start: a dict by parameter name, with a table and a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from os import PathLike
from typing import IO, Any

from ..table import Report, Table, change, plain

__all__ = ["WarmStart", "WarmStartReport"]


@dataclass(frozen=True)
class WarmStart:
    """The result of :func:`warm_start_` for one parameter; W are the weights before, U after.

    Attributes:
        distance: relative distance moved, ‖W - U‖ / ‖W‖.
        error_before: orthogonality error before.
        error_after: orthogonality error after.
        gain: the g for which g U approximates W.
        condition: largest over smallest singular value of W, the worst matrix of a batch.
        method: the method that found it: ``"polar"``, ``"lie"`` or ``"procrustes"``.
        folded: whether the gain was folded into neighbours; where it was not, the layer is U.
        note: why the gain was not folded or another method was taken, or an empty string.
        function_error_before: relative error of the layer's output on the calibration inputs if
            every tagged weight were replaced by its nearest point and nothing else were done;
            None without calibration, where no module owns the parameter alone, or where its module
            does more with the output than return it.
        function_error_after: the same for the model as it is now.
        loss: relative squared distance after every step of ``"lie"``.
    """

    distance: float
    error_before: float
    error_after: float
    gain: float = 1.0
    condition: float = math.nan
    method: str = "polar"
    folded: bool = False
    note: str = ""
    function_error_before: float | None = None
    function_error_after: float | None = None
    loss: tuple[float, ...] = field(default=(), repr=False)


_COLUMNS = ("parameter", "method", "distance", "gain", "folded", "condition", "function error")


class WarmStartReport(Report, dict[str, WarmStart]):
    """The report of :func:`warm_start_`: a dict from parameter name to :class:`WarmStart`.

    ``print`` shows a table, :meth:`plot` a picture, :meth:`as_dict` plain values.

    Attributes:
        folded: the factor that each parameter was multiplied by when gains were folded, the
            smallest and the largest where its entries differ. Tagged ones are not listed.
        fitted: names of the biases and the linear layer that were fitted to the calibration data.
        function_error_before: relative error of the model's outputs on the calibration inputs if
            every tagged weight were replaced by its nearest point and nothing else were done.
        function_error_after: the same for the model as it is now.
        notes: on the model as a whole, such as why it could not be traced.
    """

    def __init__(
        self,
        records: dict[str, WarmStart],
        *,
        folded: dict[str, tuple[float, float]] | None = None,
        fitted: tuple[str, ...] = (),
        function_error_before: float | None = None,
        function_error_after: float | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(records)
        self.folded = folded or {}
        self.fitted = fitted
        self.function_error_before = function_error_before
        self.function_error_after = function_error_after
        self.notes = notes

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain nested values, for a log or a JSON file."""
        return {
            "parameters": plain(self),
            "folded": plain(self.folded),
            "fitted": plain(self.fitted),
            "function_error_before": self.function_error_before,
            "function_error_after": self.function_error_after,
            "notes": plain(self.notes),
        }

    def _parts(self) -> list[str | Table]:
        rows = [list(_COLUMNS)]
        for name, r in self.items():
            rows.append(
                [
                    name,
                    r.method,
                    f"{r.distance:.3g}",
                    f"{r.gain:.4g}",
                    "yes" if r.folded else "no",
                    f"{r.condition:.3g}",
                    change((r.function_error_before, r.function_error_after), ".2g"),
                ]
            )
        lines: list[str | Table] = [Table(rows, right=range(2, len(_COLUMNS)))]
        if self.function_error_after is not None:
            pair = change((self.function_error_before, self.function_error_after), ".2g")
            lines.append(f"function error of the model, nearest weights alone -> now: {pair}")
        if self.folded:
            factors = ", ".join(f"{name} x{_range(f)}" for name, f in self.folded.items())
            lines.append(f"folded: {factors}")
        if self.fitted:
            lines.append(f"fitted: {', '.join(self.fitted)}")
        reasons: dict[str, list[str]] = {}
        for name, r in self.items():
            if r.note:
                reasons.setdefault(r.note, []).append(name)
        lines += [f"{', '.join(names)}: {note}" for note, names in reasons.items()]
        return [*lines, *self.notes]

    def plot(self, path: str | PathLike[str] | IO[bytes]) -> None:
        """Draw distance, gain and function error of every parameter into a picture.

        Args:
            path: file to write, its format by its suffix, or an open binary file.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        names = list(self)
        measured = any(r.function_error_after is not None for r in self.values())
        figure = Figure(figsize=(9, 1.4 + 0.32 * max(len(names), 3)), layout="constrained")
        axes = figure.subplots(1, 3 if measured else 2, sharey=True)
        places = range(len(names))
        axes[0].barh(places, [r.distance for r in self.values()], color=_BLUE)
        axes[0].set(title="distance ‖W − U‖ / ‖W‖", yticks=places, yticklabels=names)
        colours = [_BLUE if r.folded else _GREY for r in self.values()]
        axes[1].barh(places, [r.gain for r in self.values()], color=colours)
        axes[1].axvline(1, color=_INK, lw=0.8, ls=":")
        axes[1].set(title="gain (grey: not folded)")
        if measured:
            before = [_or_nan(r.function_error_before) for r in self.values()]
            after = [_or_nan(r.function_error_after) for r in self.values()]
            axes[2].hlines(places, after, before, color="#CCCCCC", zorder=1)
            axes[2].plot(
                before, places, "o", color=_GREY, clip_on=False, label="nearest weights alone"
            )
            axes[2].plot(after, places, "o", color=_BLUE, clip_on=False, label="now")
            axes[2].set(title="function error", xlim=(0, None))
            figure.legend(loc="outside lower right", ncols=2, fontsize="small", frameon=False)
        axes[0].invert_yaxis()
        for ax in axes:
            ax.grid(axis="x", color="#E6E6E6")
            ax.set_axisbelow(True)
            ax.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=130)


_BLUE, _GREY, _INK = "#0072B2", "#767676", "#222222"


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _range(factors: tuple[float, float]) -> str:
    low, high = (f"{f:.4g}" for f in factors)
    return low if low == high else f"{low}..{high}"
