"""The programs of docs/lbfgs.md run as they stand and print what it says; parts of the bench."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

from bench import line_searches
from bench.optimality_peers import searches
from tests.support import parameter

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "lbfgs.md").read_text("utf-8")


def printed(name, capsys):
    runpy.run_path(str(ROOT / "docs" / "examples" / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out.strip().splitlines()


@pytest.mark.parametrize("name", ["qft", "source_separation", "procrustes"])
def test_an_example_prints_what_the_page_shows(name, capsys):
    lines = printed(name, capsys)
    (shown,) = re.findall(rf"examples/{name}\.py\n```\n\n```\n(.*?)\n```", PAGE, re.DOTALL)
    words = [re.sub(r"[\d.e-]+", "", line) for line in lines]
    assert words == [re.sub(r"[\d.e-]+", "", line) for line in shown.splitlines()]


def test_a_circuit_is_found(capsys):
    last = printed("qft", capsys)[-1]
    assert float(re.search(r"infidelity (\S+)", last)[1]) <= 1e-10


def test_signals_are_found(capsys):
    last = printed("source_separation", capsys)[-1]
    assert float(re.search(r"[\d.]+", last)[0]) >= 0.999


def test_the_bench_tells_searches_from_steps():
    found = line_searches.searchers()
    assert next(iter(found)) == "`LBFGS`" and line_searches.ALONG in found
    p = parameter(3, 3)
    assert searches(found["`LBFGS`"].make(torch.nn.ParameterList([p]), 1.0))
    assert not searches(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1))


def test_the_bench_counts_evaluations_of_one_run():
    task = "PCA digits 64×5"
    run = line_searches.run(task, "`LBFGS`", 0)
    assert run.count <= 30 and run.error <= 1e-14
    lines = line_searches.lines({(task, "`LBFGS`"): [run]}, [task])
    assert f"| `LBFGS` | {run.count} |" in lines
