"""Runs are stored, done once, go on where they stopped; what fails is told and the rest goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from bench.papers import __main__ as papers
from bench.papers.experiment import Claim, Experiment, Options, Place, Plan, Report, Result, Run
from bench.papers.store import Store
from bench.papers.workers import do


def runs(plan: Plan) -> list[Run]:
    return [Run(f"Of {n}!", {"n": n, "pair": (1, 2)}, minutes=n) for n in range(3)]


def train(options: Options, place: Place) -> Result:
    if options["n"] == 1:
        raise ValueError("one is too few")
    state = place.load() or {"count": 0}
    place.tell(0.5, "half")
    return {"square": options["n"] ** 2, "count": state["count"]}


def report(plan: Plan, results: Mapping[str, Result], images: Path) -> Report:
    squares = [result["square"] for result in results.values()]
    return Report([f"{squares}"], [Claim("squares", "0, 1, 4", str(squares), "4", 4 in squares)])


SQUARES = Experiment("squares", "chang", "Squares", runs, train, report)


def test_a_result_is_found_for_the_same_options_only(tmp_path):
    store = Store(tmp_path)
    run = runs(Plan())[2]
    assert store.find(SQUARES, run) is None
    store.checkpoint(SQUARES, run).write_bytes(b"state")
    store.put(SQUARES, run, {"square": 4})
    assert store.find(SQUARES, run) == {"square": 4}
    assert not store.checkpoint(SQUARES, run).exists()
    other = Run(run.name, {**run.options, "n": 5})
    assert store.find(SQUARES, other) is None
    assert store.checkpoint(SQUARES, other) != store.checkpoint(SQUARES, run)
    assert not list(tmp_path.rglob("*.part"))


def test_a_place_keeps_the_state_of_an_interrupted_run(tmp_path):
    place = Place(tmp_path / "run.pt", lambda share, text: None, every=1000)
    place.save(lambda: {"count": 1})
    assert place.load() is None
    place.save(lambda: {"count": 2}, now=True)
    assert place.load() == {"count": 2}


@pytest.mark.slow
def test_jobs_are_done_in_processes_and_failures_are_told(tmp_path, capfd):
    store = Store(tmp_path)
    Place(store.checkpoint(SQUARES, runs(Plan())[2]), print).save(lambda: {"count": 7}, now=True)
    failed = do([(SQUARES, run) for run in runs(Plan())], store, workers=2, quiet=True)
    assert failed == ["squares: Of 1!: ValueError: one is too few"]
    found = [store.find(SQUARES, run) for run in runs(Plan())]
    assert found[1] is None
    assert (found[0]["square"], found[2]["square"], found[2]["count"]) == (0, 4, 7)
    assert found[2]["seconds"] >= 0
    assert "in train" in capfd.readouterr().err


def main(tmp_path: Path, *words: str) -> int:
    out = ["--store", str(tmp_path / "store"), "--out", str(tmp_path), "--data", "digits"]
    return papers.main([*out, *words])


def test_the_page_is_written_from_what_is_stored(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(papers, "EXPERIMENTS", {"squares": SQUARES})
    asked = []

    def instead(jobs, store, **_):
        asked.append([run.options["n"] for _, run in jobs])
        for experiment, run in jobs:
            store.put(experiment, run, {"square": run.options["n"] ** 2, "seconds": 60})
        return []

    monkeypatch.setattr(papers, "do", instead)
    assert main(tmp_path, "--draw") == 0
    assert "squares" not in (tmp_path / "papers.md").read_text()
    assert main(tmp_path) == 0
    assert main(tmp_path, "--only", "squares") == 0
    assert main(tmp_path, "--quick") == 0
    assert main(tmp_path, "--again") == 0
    assert asked == [[], [0, 1, 2], [], [0, 1, 2], [0, 1, 2]]
    page = (tmp_path / "papers.md").read_text()
    assert "| [squares](#squares) | squares | 0, 1, 4 | [0, 1, 4] | 4: met |" in page
    assert 'make papers ARGS="--only squares"' in page
    assert "asked: 4, met" in capsys.readouterr().out
    stored = json.loads(next((tmp_path / "store/usual/squares").glob("*2.json")).read_text())
    assert stored["run"] == "Of 2!"


def test_the_page_names_what_was_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(papers, "EXPERIMENTS", {"squares": SQUARES})
    Store(tmp_path / "store/usual").put(SQUARES, runs(Plan())[1], {"square": 1, "seconds": 60})
    assert main(tmp_path, "--draw") == 0
    page = (tmp_path / "papers.md").read_text()
    assert "*Not run, so not counted below: Of 0!; Of 2!.*" in page
    assert "| 4: **missed** |" in page


def test_the_page_says_what_an_experiment_is_without(tmp_path, monkeypatch, capsys):
    idle = Experiment("idle", "chang", "Idle", lambda plan: [], train, report, "a folder")
    monkeypatch.setattr(papers, "EXPERIMENTS", {"idle": idle})
    assert main(tmp_path, "--draw") == 0
    assert "Without a folder nothing was run of: Idle." in (tmp_path / "papers.md").read_text()
    assert "idle: nothing to run without a folder" in capsys.readouterr().out


def test_data_that_is_not_there_is_said_before_anything_runs(tmp_path, capsys):
    assert papers.main(["--data", str(tmp_path / "none")]) == 1
    assert "there is no folder" in capsys.readouterr().err


def test_every_experiment_can_be_called_by_another_process():
    for name, experiment in papers.EXPERIMENTS.items():
        assert experiment.name == name
        assert experiment.train.__qualname__ == experiment.train.__name__
        for scale in ("quick", "usual", "full"):
            planned = experiment.runs(Plan(scale, 2))
            assert len({run.name for run in planned}) == len(planned)
            assert planned or name == "fashion"  # left out where its files are not
            json.dumps([run.options for run in planned])
