"""The pictures of the optimality benchmark, from results that are made up. Nothing is measured."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from bench.optimality_cells import FULL, Found
from bench.optimality_peers import methods
from bench.optimality_pictures import PICTURES, PROBLEMS, draw, drawn
from bench.readme.pages import DOCS


def test_pictures_show_methods_that_there_are():
    """A method under another name would be missing from its picture."""
    known = {(method.table, method.name) for method in methods()}
    assert drawn() <= known and len(drawn()) >= 14


def test_the_page_shows_what_draw_returns(tmp_path):
    plan = replace(FULL, problems=PROBLEMS[:2])
    names = [(method.table, method.name) for method in methods()]
    results: dict[tuple[object, ...], object] = {
        (key, names.index(name)): Found(gaps=[10.0 ** (-i / (5 + 3 * j)) for i in range(60)])
        for key in plan.problems
        for j, name in enumerate(sorted(drawn()))
        if name != ("SGD", "POGO")  # one that was not measured is left out
    }
    lines = draw(tmp_path, plan, results)
    page = (DOCS / "optimality.md").read_text("utf-8")
    assert [line for line in lines if line and line not in page] == []
    files = re.findall(r"\(images/(.*?)\)", "\n".join(lines))
    assert files == [f"optimality_{name}.png" for name in PICTURES]
    assert all(Path(tmp_path, file).read_bytes()[:4] == b"\x89PNG" for file in files)
