"""The pictures of `bench.optimality`: gaps against gradient evaluations, each line named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from bench.optimality_cells import Found, Plan
from bench.optimality_peers import methods
from bench.problems import MAKERS
from riemann_unn.demo.labels import Label, label_lines
from riemann_unn.demo.style import BLUE, GREEN, GREY, INK, SKY, VERMILION, finish, new_figure

__all__ = ["PROBLEMS", "draw", "drawn"]

PROBLEMS = ("pca", "procrustes20", "joint", "gate")
_LIMIT = 300  # evaluations that are shown


@dataclass(frozen=True)
class Look:
    """How a method is drawn.

    Attributes:
        name: Beside its line; of a line without one the caption tells.
        colour: Of the line and its name.
        style: Of the line.
        width: In points; a broad line is seen on both sides of one that lies on it.
    """

    name: str
    colour: str = GREY
    style: str = "-"
    width: float = 1.0


_T = "`ProjUNNT` rank"
Lines = Mapping[tuple[str, str], Look]
RANKS: Lines = {
    ("SGD", "`Expm` whole"): Look("whole", INK, width=2.4),
    ("SGD", f"{_T} 4"): Look("rank 4", SKY, width=2.4),
    ("SGD", f"{_T} 1"): Look("rank 1", BLUE, width=2.4),
    ("SGD", f"{_T} 1, sketch lsi"): Look("lsi", VERMILION, width=2.4),
    ("Adam", "`Expm` whole"): Look("whole, Adam", INK, "--", 1.2),
    ("Adam", f"{_T} 1"): Look("rank 1, Adam", BLUE, "--", 1.2),
    ("Adam", f"{_T} 1, sketch lsi"): Look("lsi, Adam", VERMILION, "--", 1.2),
}
PEERS: Lines = {
    ("other", "`LBFGS`"): Look("our LBFGS", SKY, width=2.4),
    ("SGD", "`Cayley` whole"): Look("Cayley", GREEN, width=4.5),
    ("SGD", f"{_T} 1"): Look("rank 1", BLUE, width=2.4),
    ("SGD", "geoopt Euclidean"): Look("geoopt", VERMILION, "--", 1.8),
    ("other", "pymanopt conjugate gradient"): Look("pymanopt CG", INK, ":", 2.4),
    ("SGD", "POGO"): Look(""),
    ("Adam", "`Cayley` whole"): Look("Cayley, Adam"),
    ("Adam", "geoopt Euclidean"): Look("geoopt, Adam"),
    ("other", "torch cayley, LBFGS"): Look("torch, LBFGS"),
}
PICTURES: Mapping[str, tuple[str, Lines, str]] = {
    "ranks": (
        "Our optimizers: gap to the optimum",
        RANKS,
        "ProjUNN-T of rank 1 and 4 and whole steps; broken lines: Adam in the place of SGD; lsi: "
        "rank 1 with the sketch of the Euclidean gradient, as published.",
    ),
    "peers": (
        "Beside other packages: gap to the optimum",
        PEERS,
        "ProjUNN-T of rank 1, whole Cayley steps, LBFGS and the nearest peers; in grey others, of "
        "which the one without a name, POGO, lies on Cayley. geoopt refuses the last problem, and "
        "pymanopt does not solve it.",
    ),
}


def drawn() -> frozenset[tuple[str, str]]:
    """Table and name of all methods that the pictures show."""
    return frozenset(key for _, lines, _ in PICTURES.values() for key in lines)


def draw(folder: Path, plan: Plan, results: Mapping[tuple[object, ...], object]) -> list[str]:
    """Draw the gaps against gradient evaluations, and return lines that show the files.

    Args:
        folder: Of the pictures.
        plan: What was measured.
        results: What came of it, by problem and method.
    """
    index = {(method.table, method.name): i for i, method in enumerate(methods())}
    folder.mkdir(parents=True, exist_ok=True)
    shown = []
    for name, (title, lines, caption) in PICTURES.items():
        figure = new_figure(title, width=10, height=7.6)
        problems = [key for key in PROBLEMS if key in plan.problems]
        labels: dict[Axes, list[Label]] = {}
        for axes, key in zip(figure.subplots(2, 2).flat, problems, strict=False):
            found = {look: results.get((key, index[method])) for method, look in lines.items()}
            labels[axes] = _panel(axes, found)
            finish(axes, MAKERS[key]().name, "gradient evaluations", "gap")
        for axes, own in labels.items():
            label_lines(axes, own)
        path = folder / f"optimality_{name}.png"
        figure.savefig(path)
        shown += ["", f"![{title}](images/{path.name})", "", caption]
    return shown


def _panel(axes: Axes, lines: Mapping[Look, Any]) -> list[Label]:
    """Draw the gaps of methods, and return their names."""
    labels = []
    for look, found in lines.items():
        if not isinstance(found, Found) or found.refused or found.least > 0.5:
            continue  # the caption says so
        gaps = [max(gap, 1e-10) for gap in found.gaps[1 : _LIMIT + 1]]  # the first is the start's
        (line,) = axes.plot(
            range(1, len(gaps) + 1), gaps, look.style, color=look.colour, lw=look.width
        )
        if look.name:
            grey = look.colour == GREY
            labels.append(Label(line, look.name, size=8 if grey else 9, bold=not grey))
    axes.set_yscale("log")
    axes.set_ylim(2e-12, 4)  # room for names below the ends
    axes.set_xscale("log")
    axes.set_xlim(1, 1.15 * _LIMIT)
    axes.xaxis.set_major_locator(FixedLocator([1, 3, 10, 30, 100, 300]))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    return labels
