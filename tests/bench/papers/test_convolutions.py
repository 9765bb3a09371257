"""The experiment of orthogonal convolutions: fair pairs, resumable, honest about misses."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from bench.papers.convolutions import EXPERIMENTS, KINDS, Shifted, learners, runs, train_nets
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


def generator():
    return torch.Generator().manual_seed(0)


def told(result):
    return {kind: (result[kind]["accuracy"], result[kind]["loss"]) for kind in KINDS}


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


def test_every_picture_is_moved_and_none_is_changed():
    task = Shifted("digits", standardized=True, batch_size=40, reach=1)
    (moved, classes), again = next(task.train_batches(generator())), generator()
    rows = torch.randperm(len(task.split[1]), generator=again)[:40]
    assert torch.equal(classes, task.split[1][rows])
    background = task.split[0].min().item()
    padded = functional.pad(task.split[0][rows], (1, 1, 1, 1), value=background)
    places = [padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    same = torch.stack([(place == moved[:, 0]).flatten(1).all(1) for place in places])
    assert same.any(0).all() and 0 < same[4].sum() < 20


@pytest.mark.parametrize("norm", [True, False])
def test_the_networks_differ_in_their_convolutions_alone(norm):
    orthogonal, ordinary = learners({**OPTIONS, "norm": norm}, 28)
    channels = [
        [m.out_channels for m in net.model.modules() if hasattr(m, "out_channels")]
        for net in (orthogonal, ordinary)
    ]
    assert channels[0] == channels[1] and len(channels[0]) == 8
    heads = [net.model.get_parameter("head.weight").shape for net in (orthogonal, ordinary)]
    assert heads[0] == heads[1]
    layers = [m for m in ordinary.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(layers) == (8 if norm else 0)


def result(orthogonal, ordinary, off=1e-7):
    exact = [1 - off, 1, 1, 1, 1, 1, 1 + off]
    shares = {"orthogonal": orthogonal, "ordinary": ordinary}
    nets = {
        kind: {
            "parameters": 1000,
            "accuracy": [0.9, share],
            "loss": [0.3, 0.1],
            "seconds_per_epoch": [2.0, 3.0],
            "values": [exact if kind == "orthogonal" else [0.1, 0.2, 0.5, 1, 2, 3, 4]] * 8,
        }
        for kind, share in shares.items()
    }
    return {"pictures": "MNIST-5000, 28x28 (1,000 test images)", **nets}


@pytest.mark.parametrize(("share", "met"), [(0.97, True), (0.9699, False)])
def test_each_pair_is_compared_and_a_miss_is_said(share, met, tmp_path):
    results = {
        "BatchNorm, seed 0": result(share, 0.98),
        "no normalisation, seed 2": result(0.98, 0.96),
    }
    found = EXPERIMENTS[0].report(Plan(seeds=3), results, tmp_path)
    assert [claim.met for claim in found.claims] == [met, True, True]
    assert "one seed" in found.claims[0].ours
    assert (tmp_path / "papers_resnet.png").read_bytes()[:4] == b"\x89PNG"
    assert any("| 0.10 to 4.0 |" in line for line in found.lines)


def test_singular_values_off_by_more_are_a_miss(tmp_path):
    results = {f"BatchNorm, seed {i}": result(0.98, 0.97, 2e-5 * i) for i in range(2)}
    found = EXPERIMENTS[0].report(Plan(seeds=2), results, tmp_path)
    assert [claim.met for claim in found.claims] == [True, False]
    assert "median of 2 seeds" in found.claims[0].ours
