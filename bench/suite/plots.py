"""The pictures, drawn from the tables of the page: a few lines that matter, the rest in grey."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from riemann_unn.demo.labels import Label, label_lines, make_room
from riemann_unn.demo.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    SKY,
    VERMILION,
    finish,
    new_figure,
)

from .page import figure
from .stored import Table, tables

__all__ = ["ERRORS", "SKETCHES", "TIMES", "Picture", "draw"]

Line = Mapping[float, float]  # from a size
Look = tuple[str, str]  # colour and line style


@dataclass(frozen=True, eq=False)
class Picture:
    """What is drawn from which table.

    Attributes:
        file: Its name.
        title: Above all.
        x: Label of the horizontal axis.
        y: Label of the vertical axis.
        looks: Of the lines that matter.
        caption: What is not said by the names beside lines.
        named: Grey lines that have a name, and what is written.
        room: For names at the right, as a share of the width of the lines.
        width: In inches; letters are read at 400 pixels, too, if it is small.
        height: In inches.
    """

    file: str
    title: str
    x: str
    y: str
    looks: Mapping[str, Look]
    caption: str
    named: Mapping[str, str] = field(default_factory=dict)
    room: float = 0.3
    width: float = 6.8
    height: float = 5.4

    def markdown(self) -> list[str]:
        return [*figure(self.file, self.title), "", self.caption]


TIMES = Picture(
    "bench_steps.png",
    "One optimizer step on one n × n matrix, float32",
    "n",
    "mean time of a step (ms)",
    {
        "ProjUNN-T, rank 1": (BLUE, "-"),
        "ProjUNN-T, rank 8": (SKY, "-"),
        "Cayley, dense": (GREEN, "-"),
        "geoopt SGD, QR": (VERMILION, "--"),
        "POGO": (ORANGE, "--"),
        "torch Adam, fused": (INK, ":"),
    },
    "In grey the other rows of the table. ProjUNN-D and Cayley of a rank lie under ProjUNN-T, "
    "geotorch under `matrix_exp`; the unnamed ones between `matrix_exp` and Cayley are geoopt's "
    "other two, torch's Cayley parametrization, and Expm and ProjUNN-D on whole gradients.",
    {
        "torch SGD": "torch SGD, no constraint",
        "torch Adam": "torch Adam",
        "ProjUNN-T, rank 32": "rank 32",
        "parametrization, matrix_exp": "torch, matrix_exp",
    },
)
ERRORS = Picture(
    "bench_error.png",
    "How far from orthogonal after the run, float32",
    "n",
    r"$\|X^{H}X - I\|_F\,/\,\sqrt{n}$",
    {
        "ProjUNN-T, rank 1": (BLUE, "-"),
        "Cayley, dense": (GREEN, "-"),
        "geoopt SGD, QR": (VERMILION, "--"),
    },
    "After the steps that were timed. In grey the other rows of the table: our other optimizers "
    "and ranks between ProjUNN-T and Cayley, POGO on Cayley, geoopt's Adam on its SGD, geotorch "
    "on `matrix_exp`.",
    {
        "geoopt SGD, canonical": "geoopt SGD, canonical",
        "parametrization, cayley": "torch, cayley",
        "parametrization, matrix_exp": "torch, matrix_exp",
    },
    height=4.8,
)
SKETCHES = Picture(
    "bench_sketches.png",
    "What sketches miss of the best energy of rank 2k",
    "rank k",
    "1 − captured / best",
    {'`"tangent"`': (BLUE, "-"), '`"column"`': (GREEN, "--"), '`"lsi"`': (VERMILION, ":")},
    "Means over consecutive gradients of a recurrent matrix, at the left of an RNN that learns "
    'digits, at the right copying memory. `"svd"` misses nothing.',
    room=0.3,
    width=7.6,
    height=4.2,
)


def draw(text: str, images: Path) -> list[Path]:
    """Draw the pictures whose tables a page has, and return their files.

    Args:
        text: The page.
        images: Folder of the pictures.
    """
    images.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Table]] = {}
    for table in tables(text):
        found.setdefault(table.heading, []).append(table)
    drawn = []
    for picture, (heading, place) in {
        TIMES: ("Time of a step against n", 0),
        ERRORS: ("Time of a step against n", 1),
    }.items():
        if heading in found:
            table = found[heading][place]
            lines = {name: table.line(name, "n=") for name in table.rows}
            drawn.append(_picture(images, picture, {"": lines}))
    if "What sketches capture" in found:
        panels = {}
        for task, table in zip(
            ("digits", "copying memory"), found["What sketches capture"], strict=False
        ):
            captured = {name: table.line(name, "rank ") for name in table.rows}
            del captured['`"svd"`']
            panels[task] = {
                name: {k: max(1 - share, 1e-4) for k, share in line.items()}
                for name, line in captured.items()
            }
        drawn.append(_picture(images, SKETCHES, panels))
    return drawn


def _picture(images: Path, picture: Picture, panels: Mapping[str, Mapping[str, Line]]) -> Path:
    canvas = new_figure(picture.title, width=picture.width, height=picture.height)
    row = canvas.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    labels = [
        _panel(axes, picture, title, {name: line for name, line in lines.items() if line})
        for axes, (title, lines) in zip(row, panels.items(), strict=True)
    ]
    for axes, own in zip(row, labels, strict=True):
        axes.set_ylabel(picture.y if axes is row[0] else "")
        label_lines(axes, own)
    canvas.savefig(images / picture.file, dpi=190)
    return images / picture.file


def _panel(axes: Axes, picture: Picture, title: str, lines: Mapping[str, Line]) -> list[Label]:
    """Draw lines and return their names, those that matter first."""
    labels = []
    for name, line in lines.items():
        matters = name in picture.looks
        colour, style = picture.looks.get(name, (GREY, "-"))
        (drawn,) = axes.plot(
            sorted(line),
            [line[size] for size in sorted(line)],
            style,
            color=colour,
            zorder=3 if matters else 2,
            lw=2.6 if matters else 0.8,
            marker="o" if matters else "",
            ms=4.5,
        )
        if matters:
            labels.append(Label(drawn, name.strip("`")))
        elif name in picture.named:
            labels.append(Label(drawn, picture.named[name], size=8.5, bold=False))
    sizes = sorted({size for line in lines.values() for size in line})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.set_xticklabels([f"{size:g}" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    make_room(axes, picture.room)
    finish(axes, title, picture.x, picture.y)
    return sorted(labels, key=lambda label: not label.bold)
