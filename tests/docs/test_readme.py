"""Parts of README and the pages: found, rewritten, checked without being written, and true."""

from __future__ import annotations

import re

import pytest
from matplotlib.figure import Figure

from bench.readme import __main__ as readme
from bench.readme import demos, pages, tables
from bench.readme.page import Page
from riemann_unn.demo.__main__ import TASKS
from riemann_unn.demo.lowrank import METHODS, RANKS, Results


def test_every_part_stands_on_its_page_once():
    for name, (file, _) in readme.parts().items():
        text = file.read_text(encoding="utf-8")
        page = Page(text, file.name)
        assert page.cell(name) and len(re.findall(rf"<!-- {name}(?:: .*)? -->", text)) == 1
        assert page.with_cell(name, page.cell(name)) == page
    with pytest.raises(SystemExit, match=r"README\.md has no <!-- nothing -->"):
        Page("").cell("nothing")


def test_no_mark_is_left_over():
    known = set(readme.parts())
    for file in {file for file, _ in readme.parts().values()}:
        text = file.read_text(encoding="utf-8")
        assert set(re.findall(r"<!-- /([\w-]+) -->", text)) <= known, file.name


def test_tables_name_their_command_and_have_lines_of_their_own():
    for name, part in tables.TABLES.items():
        text = (pages.DOCS / part.page).read_text(encoding="utf-8")
        if "table" in name:
            assert re.search(rf"\n<!-- {name}: python .* -->\n\n\|", text), name
    page = Page("<!-- a: make it -->\n\n| 1 |\n\n<!-- /a --> b")
    assert page.cell("a") == "| 1 |"
    assert page.with_cell("a", "| 2 |").text == "<!-- a: make it -->\n\n| 2 |\n\n<!-- /a --> b"


def test_readme_lists_every_demo():
    text = readme.README.read_text(encoding="utf-8")
    assert [name for name in TASKS if f"| `{name}` |" not in text] == []


@pytest.mark.parametrize("name", pages.PAGES)
def test_readme_says_what_the_pages_say(name):
    page = Page(readme.README.read_text(encoding="utf-8"))
    assert page.cell(name) == pages.PAGES[name](), 'make readme ARGS="--pages" takes it over'


def test_a_page_that_changes_changes_readme(tmp_path, monkeypatch):
    text = (pages.DOCS / "benchmarks.md").read_text(encoding="utf-8")
    row = re.search(r"^\| geoopt SGD, QR, over .*$", text, re.MULTILINE)[0]
    cells = row.split(" | ")
    cells[3] = f"{2 * float(cells[3]):g}"
    (tmp_path / "benchmarks.md").write_text(text.replace(row, " | ".join(cells)), "utf-8")
    before = float(pages.PAGES["step-geoopt"]())
    monkeypatch.setattr(pages, "DOCS", tmp_path)
    assert float(pages.PAGES["step-geoopt"]()) == pytest.approx(2 * before, rel=0.01)
    cells[3] = "not measured in this run"
    (tmp_path / "benchmarks.md").write_text(text.replace(row, " | ".join(cells)), "utf-8")
    with pytest.raises(SystemExit, match=r"says of geoopt SGD, QR, over .*: not measured"):
        pages.PAGES["step-geoopt"]()
    (tmp_path / "benchmarks.md").write_text("# Nothing\n", "utf-8")
    with pytest.raises(SystemExit, match=r"docs/benchmarks\.md has no table"):
        pages.PAGES["step-geoopt"]()


def test_tables_of_low_rank_hold_medians_over_seeds(monkeypatch):
    run = Results("a task", 8, dense=[0.5, 0.7, 0.9])
    for i, name in enumerate(METHODS):
        for rank in RANKS:
            run.accuracy[name, rank] = [0.1, 0.2 + i / 100, 0.9]
            run.error[name, rank] = [0.5 / (i + 1), 0.5, 0.5]
    monkeypatch.setattr(tables, "result", lambda *arguments: run)
    assert tables.dense() == "70.0 %"
    head, _, row, *_ = tables.compressed().splitlines()
    assert head.count("|") == row.count("|") == 7
    assert row.startswith("| 32 | 20.0 % (0.5000) | 21.0 % (0.5000) | ") and row.endswith(" 1.00 |")


def test_check_says_what_differs_and_writes_nothing(tmp_path, monkeypatch, capsys):
    file = tmp_path / "README.md"
    file.write_text("a <!-- error -->1.0e-7<!-- /error --> b", encoding="utf-8")
    monkeypatch.setattr(readme, "README", file)
    monkeypatch.setattr(readme, "CELLS", {"error": lambda: "2.0e-7"})
    assert readme.main(["--check", "--only", "error"]) == 1
    shown = capsys.readouterr().out
    assert "1.0e-7" in shown and "2.0e-7" in shown and "1.0e-7" in file.read_text()
    assert readme.main(["--only", "error"]) == 0
    assert file.read_text() == "a <!-- error -->2.0e-7<!-- /error --> b"
    assert readme.main(["--check", "--only", "error"]) == 0


def test_pages_alone_run_no_demo(monkeypatch, capsys):
    monkeypatch.setattr(demos, "experiment_of", None)
    assert readme.main(["--check", "--pages"]) == 0
    assert "0 parts differ" in capsys.readouterr().out
    assert readme.main(["--list"]) == 0
    assert "lowrank-training" in capsys.readouterr().out


def test_pictures_are_compared_by_what_is_seen(tmp_path):
    def drawn(name, value):
        figure = Figure(figsize=(1, 1))
        figure.subplots().plot([0, 1], [0, value])
        figure.savefig(tmp_path / name)
        return tmp_path / name

    one = drawn("one.png", 1)
    assert readme.differing(one, drawn("same.png", 1)) == 0
    assert readme.differing(one, drawn("other.png", -1)) > 0.01
