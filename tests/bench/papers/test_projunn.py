"""projUNN's experiments: runs that resume, equal sizes, and reports from results."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.papers import projunn
from bench.papers.experiment import Experiment, Options, Place, Plan, Result
from bench.papers.histories import first_below
from bench.papers.readout import readout
from bench.papers.sequences import DEFAULTS, build, parameters, train

EXPERIMENTS = {experiment.name: experiment for experiment in projunn.EXPERIMENTS}
PIXELS = {"name": "pixels", "source": "digits", "order": "permuted", "batch_size": 400}


def place(folder: Path, every: float = 1e9) -> Place:
    return Place(folder / "run.pt", lambda share, text: None, every=every)


class StoppedError(Exception):
    pass


class Stopping(Place):
    """Saves every batch, and stops after some."""

    left = 4

    def tell(self, share: float, text: str) -> None:  # type: ignore[override]
        self.left -= 1
        if not self.left:
            raise StoppedError


def stopping(folder: Path) -> Place:
    found = Stopping.__new__(Stopping)
    found.checkpoint, found.every, found._saved = folder / "run.pt", 0.0, 0.0
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"task": PIXELS, "lr": 1e-3, "decay": 0.5, "head": 4, "weight_decay": 1e-3},
        {"task": {"name": "adding", "length": 9, "batches": 3}, "lr": 1e-3, "clip": 1.0}
        | {"nonlinearity": "relu", "init": "slow", "gates": 2.0, "input_slowdown": 4},
        {"task": {"name": "copy", "delay": 9, "batches": 3}, "lr": 1e-3, "model": "LSTM"},
    ],
    ids=["pixels", "adding", "copy"],
)
def test_a_run_that_was_interrupted_ends_with_the_same_numbers(
    options: Options, tmp_path: Path
) -> None:
    options = {"hidden": 6, "epochs": 2, **options}
    whole = train(options, place(tmp_path))
    with pytest.raises(StoppedError):
        train(options, stopping(tmp_path))
    torch.manual_seed(99)
    other = train({**options, "epochs": 1}, place(tmp_path))  # whose state it is not
    assert len(other["train_loss"]) == len(whole["train_loss"]) / 2
    resumed = train(options, place(tmp_path))
    for found in (whole, resumed):
        found.pop("seconds_train")
    assert len(whole["loss"]) == 2
    assert resumed == whole


def test_a_run_stops_early_only_after_two_checks_below(tmp_path: Path) -> None:
    options = {"task": {"name": "adding", "length": 4, "batches": 1}, "lr": 1e-3, "hidden": 4}
    options |= {"epochs": 6, "stop": math.inf}
    assert len(train(options, place(tmp_path))["loss"]) == 2
    assert len(train({**options, "stop": 0.0}, place(tmp_path))["loss"]) == 6


def test_baselines_have_as_many_parameters_but_hardly_more() -> None:
    for task in (PIXELS, {"name": "copy"}, {"name": "adding"}):
        options = DEFAULTS | {"task": task, "hidden": 40, "lr": 1e-3}
        least = parameters(options)
        for model in ("orthogonal", "LSTM", "RNN"):
            net, _ = build(options | {"model": model})
            count = sum(parameter.numel() for parameter in net.parameters())
            assert least <= count <= 1.15 * least


def test_rates_go_to_the_recurrence_to_the_inputs_and_to_the_head() -> None:
    options = DEFAULTS | {"task": PIXELS, "hidden": 6, "lr": 1.0, "weight_decay": 0.1}
    for slowdown in (1, 8):
        net, optimizer = build(options | {"input_slowdown": slowdown})
        rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
        decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
        assert len(rates) == len(list(net.parameters()))
        for name, parameter in net.named_parameters():
            inner = name.startswith("rnn")
            asked = 1 / 32 if "weight_hh" in name else 1 / slowdown if inner else 1.0
            assert rates[id(parameter)] == asked
            assert decays[id(parameter)] == (0.0 if "weight_hh" in name else 0.1)


def test_the_first_check_from_which_on_a_bound_holds() -> None:
    assert first_below([3, 1, 3, 1, 1], 2) == 100
    assert first_below([1, 1], 2) == 25
    assert first_below([3, math.nan], 2) is None
    assert first_below([1, 3], 2) is None


def result(value: float, count: int = 3) -> Result:
    losses = [value] * count
    found: Result = {"train_loss": losses, "loss": losses, "score": losses, "off": 1e-7}
    return found | {"seconds_train": [1.0] * count, "parameters": 100, "seconds": 3.0}


def results(experiment: Experiment, plan: Plan, ours: float, others: float) -> dict[str, Any]:
    return {
        run.name: result(ours if run.name.startswith("orthogonal") else others)
        for run in experiment.runs(plan)
        if "epochs" in run.options
    }


@pytest.mark.parametrize(
    ("name", "ours", "others", "met"),
    [
        ("copy", 0.001, 0.02, [True, False]),
        ("copy", 0.99, 0.02, [False, True]),
        ("adding", 0.001, 0.16, [True, True]),
        ("adding", 0.005, 0.16, [False, True]),
        ("pixels", 0.90, 0.80, [True]),
        ("pixels", 0.90, 0.87, [False]),
        ("pixels", 0.87, 0.50, [False]),
        ("fashion", 0.70, 0.50, [True]),
    ],
)
def test_claims_are_judged_by_the_results(
    name: str,
    ours: float,
    others: float,
    met: list[bool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    drawn: list[Path] = []
    for module in ("copying", "adding", "pixels"):
        monkeypatch.setattr(f"bench.papers.{module}.curves", lambda file, *_: drawn.append(file))
    plan = Plan(seeds=2, data="digits")
    experiment = EXPERIMENTS[name]
    found = results(experiment, plan, ours, others)
    report = experiment.report(plan, found, tmp_path)
    assert [claim.met for claim in report.claims] == met
    assert all(f"images/{file.name}" in "".join(report.lines) for file in drawn)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_report_is_made_of_whatever_is_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    experiment, plan = EXPERIMENTS[name], Plan(seeds=1, data="digits")
    found = results(experiment, plan, 0.5, 0.4)
    for run in list(found)[-2:]:  # baselines, without ours
        report = experiment.report(plan, {run: found[run]}, tmp_path)
        assert any(line.startswith("| ") for line in report.lines)


def test_fashion_is_left_out_where_its_files_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASHION_MNIST", "nowhere")
    monkeypatch.setattr("bench.papers.pixels.DEBIAN", "nowhere")
    assert not EXPERIMENTS["fashion"].runs(Plan())


def test_a_readout_of_an_untrained_recurrence_recalls_what_it_keeps() -> None:
    task = {"name": "copy", "delay": 20, "batch_size": 200, "batches": 2}
    options = {"task": task, "hidden": 190, "lr": 1.0, "thresholds": 0.0}
    assert readout(options)["score"] > 0.95
    assert readout({**options, "hidden": 10})["score"] < 0.6
    task = {"name": "adding", "length": 30, "batch_size": 400, "batches": 2}
    options = {"task": task, "hidden": 100, "lr": 1.0, "nonlinearity": "relu", "init": "slow"}
    assert readout({**options, "gates": 8.0})["loss"] < 0.5 * readout(options)["loss"]


def test_ranks_are_timed_in_turn(tmp_path: Path) -> None:
    plan = Plan("quick")
    experiment = EXPERIMENTS["ranks"]
    (run,) = (run for run in experiment.runs(plan) if run.name == "time")
    variants = {n: v for n, v in run.options["variants"].items() if "rank 1" in n}
    found = experiment.train({**run.options, "variants": variants, "steps": 2}, place(tmp_path))
    assert found["step"].keys() == variants.keys()
    assert all(seconds > 0 for seconds in found["step"].values()) and found["passes"] > 0
