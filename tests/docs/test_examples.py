"""The programs of docs/examples run as they stand, learn what they are about, and fit a page."""

from __future__ import annotations

import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
# By tests/parallel/test_examples.py, tests/demo/test_sequences.py and tests/docs/test_lbfgs.py.
ELSEWHERE = {"ddp", "fsdp2", "own_sequences", "procrustes", "qft", "source_separation"}
# What each prints in the end, as a pattern with numbers, and what is asked of them.
EXPECTED = {
    "accelerate_loop": (r"loss ([\d.]+)\n.*error (\S+)", lambda loss, e: loss < 0.95 and e < 1e-6),
    "closed_forms": (
        r"spans differ by (\S+)\n.*rotations differ by (\S+)\n.*bases differ by (\S+)",
        lambda *differences: max(differences) < 1e-6,
    ),
    "hf_trainer": (r"loss ([\d.]+) at first\n.*error (\S+)", lambda loss, e: loss < 5 and e < 1e-6),
    "lightning_rnn": (r"loss ([\d.]+)\n.*error (\S+)", lambda loss, e: loss < 0.3 and e < 1e-6),
    "oft": (
        r"side: ([\d.]+)% right\n.* ([\d.]+)% right\n.* ([\d.]+)% right",
        lambda before, turned, merged: before < 40 and turned > 80 and merged == turned,
    ),
    "own_images": (r"epoch 5: (\d+)% of 48", lambda right: right >= 90),
    "rotations": (
        r"exact: ([\d.]+), turned ([\d.]+)\n.*: ([\d.]+), turned ([\d.]+)",
        lambda exact, turned, before, after: abs(exact - turned) < 2e-3 and after < before - 0.03,
    ),
}
NEEDS = {
    "accelerate_loop": ("accelerate",),
    "hf_trainer": ("transformers", "accelerate"),
    "lightning_rnn": ("lightning",),
}


def words(text: str) -> str:
    return re.sub(r"[\d.e-]+", "", text)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # other packages' own
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_an_example_runs_and_learns(name, tmp_path, monkeypatch, capsys):
    missing = [p for p in NEEDS.get(name, ()) if importlib.util.find_spec(p) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed")
    file = ROOT / "docs" / "examples" / f"{name}.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(file)])
    with torch.random.fork_rng():
        runpy.run_path(str(file), run_name="__main__")
    pattern, holds = EXPECTED[name]
    printed = capsys.readouterr().out
    found = re.findall(pattern, printed)
    assert found, printed
    numbers = found[-1] if isinstance(found[-1], tuple) else found[-1:]
    assert holds(*map(float, numbers)), printed
    for page in (ROOT / "docs").glob("*.md"):
        shown = rf"examples/{name}\.py\n```\n\n```\n(.*?)\n```"
        for output in re.findall(shown, page.read_text("utf-8"), re.DOTALL):
            assert words(output) == words(printed.strip()), page.name


def test_every_example_is_run():
    assert {file.stem for file in EXAMPLES} == set(EXPECTED) | ELSEWHERE


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_fits_a_page_and_says_how_to_run_it(file):
    text = file.read_text("utf-8")
    assert len(text.splitlines()) <= 60
    assert file.name in text.split('"""')[1]


def test_the_pages_show_and_list_every_example():
    pages = [page.read_text("utf-8") for page in (ROOT / "docs").glob("*.md")]
    listed = (ROOT / "docs" / "examples.md").read_text("utf-8")
    for file in EXAMPLES:
        whole = rf"{{literalinclude}} examples/{file.name}\n(?!:pyobject:)"
        assert sum(len(re.findall(whole, page)) for page in pages) == 1, file.name
        assert f"(examples/{file.name})" in listed
