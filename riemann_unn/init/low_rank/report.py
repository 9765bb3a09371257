"""The report of :func:`riemann_unn.init.low_rank_`: a mapping, a table and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

from ..table import Report, Table, change, plain

__all__ = ["LowRank", "LowRankReport"]


@dataclass(frozen=True)
class LowRank:
    """The result for one layer.

    Attributes:
        shape: (m, n) of the matrix that was split.
        rank: its new rank.
        activation: name of the activation that the function error is measured after.
        parameters: of the weight, before and after.
        macs: multiplications of the weight, before and after; for one input, of a convolution
            for one position of the output.
        gaussian: relative function error on Gaussian inputs, of the truncated singular value
            decomposition and of the factors chosen.
        held_out: the same on held-out calibration inputs, None without: from the layer's current
            inputs to the original model's outputs, so that it includes the errors of earlier
            layers.
        curve: by rank, the same pair for the layer by itself, before any refinement, on the inputs
            fitted to (Gaussian ones without calibration); of large layers on a subset.
        notes: further remarks.
    """

    shape: tuple[int, int]
    rank: int
    activation: str
    parameters: tuple[int, int]
    macs: tuple[int, int]
    gaussian: tuple[float, float]
    held_out: tuple[float, float] | None
    curve: dict[int, tuple[float, float]]
    notes: tuple[str, ...]


class LowRankReport(Report, Mapping[str, LowRank]):
    """What was done, by layer name; prints as a table.

    Attributes:
        method: the method that chose the factors.
        skipped: layers that matched and were not replaced, with the reason.
    """

    def __init__(self, method: str, layers: dict[str, LowRank], skipped: dict[str, str]) -> None:
        self.method = method
        self.skipped = skipped
        self._layers = layers

    def __getitem__(self, name: str) -> LowRank:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def parameters(self) -> tuple[int, int]:
        """Parameters of the replaced weights, before and after."""
        each = [layer.parameters for layer in self.values()]
        return sum(e[0] for e in each), sum(e[1] for e in each)

    @property
    def macs(self) -> tuple[int, int]:
        """Multiplications of the replaced weights, before and after (see :class:`LowRank`)."""
        each = [layer.macs for layer in self.values()]
        return sum(e[0] for e in each), sum(e[1] for e in each)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain nested values, for a log or a JSON file."""
        return {"method": self.method, "layers": plain(self), "skipped": plain(self.skipped)}

    def __repr__(self) -> str:
        return (
            f"<LowRankReport: {len(self)} layers by {self.method!r}, {len(self.skipped)} skipped, "
            f"{self.parameters[0]:,} -> {self.parameters[1]:,} parameters>"
        )

    def _parts(self) -> list[str | Table]:
        data = any(layer.held_out for layer in self.values())
        head = ["layer", "matrix", "rank", "φ", "parameters", "MACs", "Gaussian error"]
        rows = [head + (["held-out error"] if data else [])]
        for name, layer in self.items():
            row = [
                name,
                "{}x{}".format(*layer.shape),
                str(layer.rank),
                layer.activation,
                _saved(layer.parameters),
                _saved(layer.macs),
                change(layer.gaussian, ".4f"),
            ]
            if data:
                row.append(change(layer.held_out, ".4f"))
            rows.append(row)
        total = ["total", "", "", "", _saved(self.parameters), _saved(self.macs)]
        rows.append(total + [""] * (len(rows[0]) - len(total)))
        caption = f"errors: spectral -> {self.method}"
        if data and len(self) > 1:
            caption += "; held-out ones include what the layers ahead have lost"
        parts: list[str | Table] = [Table(rows), caption]
        for name, layer in self.items():
            parts += [f"{name}: {note}" for note in layer.notes]
        return parts + [f"{name}: left alone, {why}" for name, why in self.skipped.items()]

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw error against rank for each layer, the chosen rank marked, and save the picture.

        Args:
            path: the file, in a format that matplotlib writes.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: no layer was replaced.
        """
        from matplotlib.figure import Figure

        if not len(self):
            raise ValueError("no layer was replaced, so there is nothing to draw")
        columns = 2 if len(self) == 4 else min(len(self), 3)
        rows = -(-len(self) // columns)
        figure = Figure(figsize=(0.8 + 3.6 * columns, 0.9 + 2.9 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        lines = (("spectral", "#767676", "--"), (self.method, "#0072B2", "-"))
        for place, (axes, (name, layer)) in enumerate(zip(panels, self.items(), strict=False)):
            ranks = sorted(layer.curve)
            for i, (label, colour, line) in enumerate(lines):
                # Zero errors cannot be drawn on a logarithmic scale.
                errors = [max(layer.curve[rank][i], 1e-12) for rank in ranks]
                axes.plot(ranks, errors, line, color=colour, lw=2, marker="o", ms=3, label=label)
            axes.axvline(layer.rank, color="#D55E00", lw=1.2, ls=":", label="rank taken")
            axes.set_xscale("log", base=2)
            powers = [2**k for k in range(ranks[-1].bit_length())]
            axes.set_xticks(powers, [str(power) for power in powers])
            axes.set_yscale("log")
            axes.set_title(name, loc="left", fontsize=10)
            axes.set_xlabel("rank")
            if place % columns == 0:
                axes.set_ylabel("relative function error")
            axes.grid(True, color="#E6E6E6", lw=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        for axes in panels[len(self) :]:
            axes.set_axis_off()
        handles = panels[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper right", ncols=3, frameon=False)
        figure.savefig(path, dpi=130)


def _saved(pair: tuple[int, int]) -> str:
    before, after = pair
    share = f" ({after / before - 1:+.0%})" if before else ""
    return change(pair, ",") + share
