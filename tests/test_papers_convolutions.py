"""The experiment of orthogonal convolutions: fair pairs, resumable, honest about misses."""

from __future__ import annotations

import pytest

from bench.papers.convolutions import EXPERIMENTS, NETS, learners, runs, train_nets
from bench.papers.experiment import Place, Plan

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

OPTIONS = {
    **runs(Plan("quick", data="digits"))[0].options,
    "width": 2,
    "epochs": 2,
    "batch": 300,
}


def place(tmp_path, tell=lambda share, text: None):
    return Place(tmp_path / "run.pt", tell)


def stop_after_an_epoch(share, text):
    if share == 0.5:
        raise InterruptedError


def told(result):
    return {name: (result[name]["accuracy"], result[name]["loss"]) for name in NETS}


def test_an_interrupted_run_ends_like_any_other(tmp_path):
    whole = train_nets(OPTIONS, place(tmp_path))
    (tmp_path / "run.pt").unlink()
    with pytest.raises(InterruptedError):
        train_nets(OPTIONS, place(tmp_path, stop_after_an_epoch))
    assert told(train_nets(OPTIONS, place(tmp_path))) == told(whole)
    values = whole["orthogonal"]["values"]
    assert len(values) == 8
    assert all(abs(value - 1) < 1e-5 for layer in values for value in layer)
    assert max(map(max, whole["ordinary"]["values"])) > 1.1
    other = train_nets({**OPTIONS, "epochs": 1}, place(tmp_path))  # beside an old checkpoint
    assert len(other["ordinary"]["accuracy"]) == 1


def test_the_networks_differ_in_their_convolutions_alone():
    nets = {net.name: net.model for net in learners(OPTIONS, 28)}
    channels = {
        name: [m.out_channels for m in net.modules() if hasattr(m, "out_channels")]
        for name, net in nets.items()
    }
    assert channels["orthogonal"] == channels["ordinary"] == channels["ordinary, BatchNorm"]
    heads = {net.get_parameter("head.weight").shape for net in nets.values()}
    assert len(heads) == 1


def result(orthogonal, off=1e-7):
    values = [[1 - off, 1, 1, 1, 1, 1, 1 + off]] * 8
    shares = dict(zip(NETS, (orthogonal, 0.97, 0.98), strict=True))
    nets = {
        name: {
            "parameters": 1000,
            "accuracy": [0.9, share],
            "loss": [0.3, 0.1],
            "seconds_per_epoch": [2.0, 3.0],
            "values": values if name == "orthogonal" else [[0.1, 0.2, 0.5, 1, 2, 3, 4]] * 8,
        }
        for name, share in shares.items()
    }
    return {"pictures": "MNIST-5000, 28x28 (1,000 test images)", **nets}


@pytest.mark.parametrize(("share", "met"), [(0.971, True), (0.97, True), (0.9699, False)])
def test_the_better_ordinary_network_is_the_measure(share, met, tmp_path):
    found = EXPERIMENTS[0].report(Plan(seeds=3), {"seed 1": result(share)}, tmp_path)
    assert [claim.met for claim in found.claims] == [met, True]
    assert "one seed" in found.claims[0].ours
    assert (tmp_path / "papers_resnet.png").read_bytes()[:4] == b"\x89PNG"
    assert any("| 0.10 to 4.0 |" in line for line in found.lines)


def test_singular_values_off_by_more_are_a_miss(tmp_path):
    results = {"seed 0": result(0.98), "seed 1": result(0.98, 2e-5)}
    found = EXPERIMENTS[0].report(Plan(seeds=2), results, tmp_path)
    assert [claim.met for claim in found.claims] == [True, False]
    assert "median of 2 seeds" in found.claims[0].ours
