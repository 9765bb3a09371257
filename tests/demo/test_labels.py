"""Names beside lines: each near its own, none over another name or over a line."""

from __future__ import annotations

from itertools import pairwise

import numpy
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from riemann_unn.demo.labels import Label, label_lines, make_room

CASES = {
    "apart": [[1, 2, 3], [3, 4, 5], [7, 6, 7]],
    "one end": [[1, 2, 5], [9, 7, 5], [5, 5, 5], [4, 8, 5.01]],
    "one line": [[1, 4, 2], [1, 4, 2]],
}


def drawn(heights, *, log=False) -> tuple[Axes, list[Label]]:
    axes = Figure(figsize=(6, 4), layout="constrained").subplots()
    lines = [axes.plot([1, 2, 4], ys, color=f"C{i}", lw=2)[0] for i, ys in enumerate(heights)]
    if log:
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.set_ylim(0.5, 12)
    make_room(axes, 0.3)
    return axes, [Label(line, f"name {i}") for i, line in enumerate(lines)]


def covered(axes: Axes) -> tuple[int, int]:
    """How many pairs of names overlap, and how many places of lines are under names."""
    axes.figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    pairs = sum(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    under = 0
    for line in axes.lines:
        corners = line.get_transform().transform(line.get_xydata())
        for one, other in pairwise(corners):
            places = one + (other - one) * numpy.linspace(0, 1, 200)[:, None]
            under += sum(bool(box.contains(*place)) for box in boxes for place in places)
    return pairs, under


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_names_cover_nothing(case, log):
    axes, labels = drawn(CASES[case], log=log)
    label_lines(axes, labels)
    assert covered(axes) == (0, 0)
    frame = axes.get_window_extent()
    for label, text in zip(labels, axes.texts, strict=True):
        assert text.get_text() == label.text and text.get_color() == label.line.get_color()
        box = text.get_window_extent()
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1
        assert frame.y0 <= box.y0 and box.y1 <= frame.y1


def test_what_is_checked_is_seen_to_fail_for_names_at_the_bare_ends():
    axes, labels = drawn(CASES["one end"])
    for label in labels:
        axes.annotate(label.text, label.line.get_xydata()[-1], ha="right", va="center")
    pairs, under = covered(axes)
    assert pairs == 6 and under > 0


def test_names_at_one_end_keep_the_order_of_their_lines():
    axes, labels = drawn([[1, 2, 5.1], [9, 7, 5], [5, 5, 5.2], [4, 8, 4.9]])
    label_lines(axes, labels)
    axes.figure.draw_without_rendering()
    heights = [text.get_window_extent().y0 for text in axes.texts]
    assert sorted(range(4), key=heights.__getitem__) == [3, 1, 0, 2]
    end = axes.transData.transform((4, 5))[0]
    assert all(end < text.get_window_extent().x0 < end + 15 for text in axes.texts)


def test_the_end_of_a_line_is_at_the_right_however_it_was_drawn():
    axes, labels = drawn([[1, 2, 3]])
    backwards = axes.plot([4, 2, 1], [9, 8, 7], color="C3")[0]
    label_lines(axes, [*labels, Label(backwards, "backwards")])
    axes.figure.draw_without_rendering()
    end = axes.transData.transform((4, 9))
    box = axes.texts[-1].get_window_extent()
    assert end[0] < box.x0 < end[0] + 15 and box.y0 < end[1] < box.y1


def test_a_line_out_of_sight_has_no_name():
    axes, labels = drawn([[1, 2, 3], [100, 200, 300]])
    label_lines(axes, labels)
    assert [text.get_text() for text in axes.texts] == ["name 0"]
    label_lines(axes, labels[1:])
    assert len(axes.texts) == 1


def test_room_has_no_ticks():
    axes, _ = drawn([[1, 2, 3]])
    low, high = axes.get_xlim()
    assert high > 4.9 and max(axes.get_xticks()) <= 4.2 and low < 1
