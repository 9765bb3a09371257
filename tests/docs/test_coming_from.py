"""The "before" of packages that do not install, run from checkouts that the environment names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "coming_from.md"


def snippets(section: str) -> list[str]:
    """The code of a section, "before" first."""
    text = PAGE.read_text("utf-8")
    begin = text.index(f"\n## {section}")
    end = text.find("\n## ", begin + 1)
    return re.findall(r"```(?:\{code-block\} )?python\n(.*?)```", text[begin:end], re.DOTALL)


def common() -> str:
    """What all pairs of the page begin with."""
    return re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)[0]


def run(code: str, place: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(place), *sys.path])},
    )
    assert done.returncode == 0, done.stderr


def checkout(variable: str) -> Path:
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"{variable} names no checkout")
    return Path(path)


def first_side(text: str) -> str:
    """Settle a conflict that was committed: what stands before ``=======`` is kept."""
    return re.sub(
        r"<<<<<<< [^\n]*\n(.*?)=======\n.*?(?:>>>>>>> [^\n]*\n|\Z)", r"\1", text, flags=re.S
    )


def test_the_first_side_of_a_conflict_is_kept():
    assert first_side("a\n<<<<<<< HEAD\nb\n=======\nc\n>>>>>>> x\nd\n") == "a\nb\nd\n"
    assert first_side("<<<<<<< HEAD\nb\n=======\nc\n") == "b\n"


def test_before_and_after_stand_side_by_side():
    for section in ("expRNN", "projUNN, the authors' code"):
        before, after, *_ = snippets(section)
        assert "riemann_unn" not in before and "ru." not in before
        assert "ru.optim" in after


def test_exprnn():
    run(common() + snippets("expRNN")[0], checkout("EXPRNN_REFERENCE"))


def test_projunn(tmp_path):
    source = checkout("PROJUNN_REFERENCE") / "projunn"
    (tmp_path / "projunn").mkdir()
    for file in source.glob("*.py"):
        (tmp_path / "projunn" / file.name).write_text(first_side(file.read_text("utf-8")))
    run(common() + snippets("projUNN, the authors' code")[0], tmp_path)
