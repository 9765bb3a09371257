"""README's cells of the demos: found, rewritten, and checked without being written."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from bench import readme
from riemann_unn.demo.__main__ import TASKS


def test_every_cell_stands_in_readme_once():
    text = readme.README.read_text(encoding="utf-8")
    page = readme.Page(text)
    for name in readme.CELLS:
        assert page.cell(name) and text.count(f"<!-- {name} -->") == 1
        assert page.with_cell(name, page.cell(name)) == page
    with pytest.raises(SystemExit, match="has no <!-- nothing -->"):
        page.cell("nothing")


def test_readme_lists_every_demo():
    text = readme.README.read_text(encoding="utf-8")
    assert [name for name in TASKS if f"| `{name}` |" not in text] == []


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


def test_pictures_are_compared_by_what_is_seen(tmp_path):
    def drawn(name, value):
        figure = Figure(figsize=(1, 1))
        figure.subplots().plot([0, 1], [0, value])
        figure.savefig(tmp_path / name)
        return tmp_path / name

    one = drawn("one.png", 1)
    assert readme.differing(one, drawn("same.png", 1)) == 0
    assert readme.differing(one, drawn("other.png", -1)) > 0.01
