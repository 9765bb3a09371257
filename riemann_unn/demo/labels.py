"""Names beside lines, where they cover neither a line nor one another."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import cast

import numpy
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator
from matplotlib.transforms import IdentityTransform
from numpy.typing import NDArray

__all__ = ["Label", "label_lines", "make_room", "spread"]

_Array = NDArray[numpy.float64]
_PAD = 3.0  # points between a name and the edge of its line
_STEP = 4.0  # points between the places that are tried
_CLEAR = 2.0  # points that stay free around a name
_OVER_LABEL, _OVER_LINE, _OVER_OWN = (
    1e4,
    50.0,
    30.0,
)  # what covering costs, a place each
_NEAR, _NEAR_LINE = 8.0, 0.25  # points from another line, and what each of its places costs there
_GROWN = numpy.array([-1, -1, 1, 1])  # a box on all sides
_SLOTS = 41  # heights that are tried beside the end of a line
_SHUFFLED = 20  # other orders that are tried
_ELSEWHERE = 8.0  # what a name costs that does not stand beside the end of its line
_AWAY = 0.06  # and each point that it is away


@dataclass(frozen=True)
class Label:
    """A line and its name.

    Attributes:
        line: What is named; the name has its colour.
        text: The name.
        size: Of its letters, in points.
        bold: Whether they are bold.
    """

    line: Line2D
    text: str
    size: float = 10
    bold: bool = True


def spread(values: Sequence[float], *, gap: float) -> list[float]:
    """Heights for labels close to some values, in the same order, at least a gap apart.

    Args:
        values: Of the labels; equal ones keep their order.
        gap: In the unit of the values.
    """
    order = sorted(range(len(values)), key=lambda i: (values[i], -i))
    heights = list(values)
    for below, above in pairwise(order):
        heights[above] = max(heights[above], heights[below] + gap)
    shift = max(heights[order[-1]] - max(values), 0) / 2 if order else 0
    return [height - shift for height in heights]


def make_room(axes: Axes, share: float) -> None:
    """Let the horizontal axis go on behind the lines, without ticks, for names at their ends.

    Args:
        axes: Where all is drawn.
        share: Of the width that the lines have.
    """
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(
        FixedLocator([tick for tick in axes.get_xticks() if low <= tick <= high])
    )
    logarithmic = axes.get_xscale() == "log"
    wide = high * (high / low) ** share if logarithmic else high + share * (high - low)
    axes.set_xlim(low, wide)


def label_lines(axes: Axes, labels: Sequence[Label]) -> None:
    """Write each name beside its line, as near to its right end as there is room in the axes.

    Args:
        axes: Where all is drawn; limits and scales are set before. Every line on it is left free.
        labels: The names, those that matter most first.
    """
    figure = axes.figure.figure  # the whole of a part, too
    figure.draw_without_rendering()  # the layout is only known then
    unit = figure.dpi / 72
    paths = {line: _path(line, axes, _STEP * unit / 2) for line in axes.lines}
    taken = [numpy.array(text.get_window_extent().extents) for text in axes.texts]
    labels = [label for label in labels if len(paths[label.line])]  # the rest is out of sight
    if not labels:
        return
    sizes = [_size(label, axes) for label in labels]
    wanted = _heights([paths[label.line][-1] for label in labels], sizes, unit)
    choices = [
        _choices(label, size, height, axes, paths, unit)
        for label, size, height in zip(labels, sizes, wanted, strict=True)
    ]
    indices = range(len(labels))
    orders = [  # large names first: from below, from above, or as they come
        sorted(indices, key=lambda i: (-labels[i].size, sign * wanted[i])) for sign in (1, -1, 0)
    ]
    shuffle = random.Random(0)
    orders += [shuffle.sample(indices, len(indices)) for _ in range(_SHUFFLED)]
    found = [_arrange(choices, order, taken, unit) for order in orders]
    chosen = min(found, key=lambda one: one[0])[1]
    back = axes.transData.inverted()
    for label, (boxes, _, anchors), k in zip(labels, choices, chosen, strict=True):
        x, y = anchors[k]
        left, low, right, high = boxes[k]
        text = axes.annotate(
            label.text,
            tuple(back.transform((x, y))),
            xytext=(((left + right) / 2 - x) / unit, ((low + high) / 2 - y) / unit),
            textcoords="offset points",
            ha="center",
            va="center",
            color=label.line.get_color(),
            fontsize=label.size,
            fontweight="bold" if label.bold else "normal",
            annotation_clip=False,
        )
        text.set_in_layout(False)  # it was placed in the layout that there is


def _arrange(
    choices: Sequence[tuple[_Array, _Array, _Array]],
    order: Sequence[int],
    taken: Sequence[_Array],
    unit: float,
) -> tuple[float, list[int]]:
    """Choose one after another, and what that costs."""
    wide = unit * numpy.array([-8, -0.5, 8, 0.5])  # more between names in one row
    chosen: dict[int, int] = {}
    total = 0.0
    for _ in range(3):  # a name that came early may give way to a later one
        total = 0.0
        for i in order:
            boxes, costs, _ = choices[i]
            names = [choices[j][0][k] + wide for j, k in chosen.items() if j != i]
            costs = costs + _OVER_LABEL * _overlaps(boxes, [*taken, *names])
            chosen[i] = int(costs.argmin())
            total += float(costs[chosen[i]])
    return total, [chosen[i] for i in sorted(chosen)]


def _path(line: Line2D, axes: Axes, step: float) -> _Array:
    """Places along a line inside its axes, in pixels."""
    points = line.get_transform().transform(line.get_xydata())
    points = points[numpy.isfinite(points).all(1)]
    if not len(points):
        return numpy.zeros((0, 2))
    if points[0, 0] > points[-1, 0]:  # it ends at the right, however it was drawn
        points = points[::-1]
    found = [points[:1]]
    for a, b in pairwise(points):
        count = min(max(int(numpy.hypot(*(b - a)) / step), 1), 10_000)
        found.append(a + (b - a) * numpy.linspace(0, 1, count + 1)[1:, None])
    path = numpy.concatenate(found)
    box = axes.bbox
    inside = (path >= (box.x0 - 1, box.y0 - 1)) & (path <= (box.x1 + 1, box.y1 + 1))
    return cast(_Array, path[inside.all(1)])


def _size(label: Label, axes: Axes) -> _Array:
    """Width and height of a name, in pixels."""
    probe = axes.text(0, 0, label.text, fontsize=label.size, transform=IdentityTransform())
    probe.set_fontweight("bold" if label.bold else "normal")
    extent = probe.get_window_extent()
    probe.remove()
    return numpy.array([extent.width, extent.height])


def _heights(ends: Sequence[_Array], sizes: Sequence[_Array], unit: float) -> list[float]:
    """Where the middle of each name should be if it stands beside its line's end."""
    found = [float(end[1]) for end in ends]
    for x in {round(end[0] / (4 * unit)) for end in ends}:
        same = [i for i, end in enumerate(ends) if round(end[0] / (4 * unit)) == x]
        gap = max(float(sizes[i][1]) for i in same) + unit
        for i, height in zip(same, spread([found[i] for i in same], gap=gap), strict=True):
            found[i] = height
    return found


def _choices(
    label: Label,
    size: _Array,
    wanted: float,
    axes: Axes,
    paths: dict[Line2D, _Array],
    unit: float,
) -> tuple[_Array, _Array, _Array]:
    """Boxes that a name may fill, what each costs, and the place of the line it is beside."""
    own = paths[label.line]
    pad = (_PAD + _breadth(label.line) / 2) * unit
    # Beside, above and below a place of the line, and at the corners; beside its end higher or
    # lower, too, where it reads best.
    sides = numpy.array([s for s in product((-1, -0.5, 0), (-1, -0.5, 0)) if s != (-0.5, -0.5)])
    shifts = sides * size + numpy.sign(sides + 0.5) * pad
    anchors = numpy.repeat(own[::-2], len(shifts), 0)
    corners = anchors + numpy.tile(shifts, (len(own[::-2]), 1))
    costs = _ELSEWHERE + _AWAY * numpy.hypot(*(anchors - own[-1]).T) / unit
    heights = numpy.linspace(-3, 2, _SLOTS) * size[1]
    beside = own[-1] + numpy.stack([numpy.full(_SLOTS, pad + 2 * unit), heights], 1)
    corners = numpy.concatenate([beside, corners])
    anchors = numpy.concatenate([numpy.repeat(own[-1:], _SLOTS, 0), anchors])
    off = (beside[:, 1] + size[1] / 2 - wanted) / size[1]
    costs = numpy.concatenate([2 * off**2 + 0.5 * (heights / size[1] + 0.5) ** 2, costs])
    boxes = numpy.concatenate([corners, corners + size], 1)
    costs += _OVER_OWN * _inside(boxes, own)
    for line, path in paths.items():
        if line is not label.line:
            clear = boxes + _GROWN * (_CLEAR + _breadth(line) / 2) * unit
            costs += _OVER_LINE * _inside(clear, path)
            costs[_SLOTS:] += _NEAR_LINE * _inside(clear[_SLOTS:] + _GROWN * _NEAR * unit, path)
    frame = axes.bbox
    out = (boxes[:, :2] < frame.p0).any(1) | (boxes[:, 2:] > frame.p1).any(1)
    return boxes, costs + 1e6 * out, anchors


def _breadth(line: Line2D) -> float:
    """How broad a line is with its marks, in points."""
    marked = line.get_marker() not in ("", "None", None)
    return max(line.get_linewidth(), line.get_markersize() if marked else 0.0)


def _inside(boxes: _Array, points: _Array) -> _Array:
    """How many of the points lie in each box."""
    x, y = points[:, 0], points[:, 1]
    left, low, right, high = (boxes[:, i, None] for i in range(4))
    return cast(_Array, ((x > left) & (x < right) & (y > low) & (y < high)).sum(1).astype(float))


def _overlaps(boxes: _Array, others: Sequence[_Array]) -> _Array:
    """How many other boxes each box covers a part of."""
    found = numpy.zeros(len(boxes))
    for left, low, right, high in others:
        found += (
            (boxes[:, 0] < right)
            & (boxes[:, 2] > left)
            & (boxes[:, 1] < high)
            & (boxes[:, 3] > low)
        )
    return found
