"""The warm start demo: every start is tried, the table and the picture say what came of it."""

import math
from itertools import islice

import pytest
import torch

import riemann_unn as ru
from riemann_unn.init.calibration import Batch
from riemann_unn.init.warm_start.folding import Folding

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
from riemann_unn.demo import warmstart
from riemann_unn.demo.__main__ import main
from riemann_unn.demo.images import DigitImages
from tests.demo.nets import small_nets


@pytest.fixture
def small(monkeypatch):
    """A net of few weights beside the small residual one, and a few batches of training."""
    monkeypatch.setattr(warmstart, "NETS", small_nets())
    batches = DigitImages.train_batches
    monkeypatch.setattr(DigitImages, "train_batches", lambda self, g: islice(batches(self, g), 2))


def test_whole_run(small, tmp_path, capsys):
    out, threads, state = tmp_path / "picture.png", torch.get_num_threads(), torch.get_rng_state()
    options = ["--epochs", "1", "--seeds", "2", "--quiet", "--out", str(out)]
    assert main(["warmstart", *options]) == 0
    torch.set_rng_state(state)
    shown = capsys.readouterr()
    for part in ("deep net", "residual net", *warmstart.STARTS, "epochs to 93%", str(out)):
        assert part in shown.out
    assert shown.err == "" and out.read_bytes().startswith(b"\x89PNG")
    assert torch.get_num_threads() == threads


def test_table_takes_medians_over_seeds():
    net = warmstart.NETS[0]
    accuracy = {"random": [0.1, 0.5, 0.931], "polar": [0.94, 0.2], "lie": [0.1, 0.9]}
    trials = [
        warmstart.Trial(
            net,
            0.95,
            [
                warmstart.Start(
                    name,
                    [*accuracy.get(name, [0.1] * i), 0.93 + 0.01 * i],
                    function_error=0.1 + 0.05 * i if name == "procrustes" else 0.2,
                )
                for name in warmstart.STARTS
            ],
        )
        for i in (0, 1, 4)
    ]
    results = warmstart.Results(warmstart.DigitImages(), trials)
    lines = warmstart.table(results).splitlines()
    rows = {line.split()[0]: line.split() for line in lines[:-2]}
    assert lines[-1].endswith("that of polar 0.75, at most 1.50, below 1 for 2 of 3")
    assert rows["deep"][-1] == "95.0%"
    assert rows["random"][1:4] == ["2", "10.0%", "94.0%"]
    assert rows["polar"][1] == "0" and rows["procrustes"][1] == "1"
    assert math.isinf(warmstart.Start("lie", [0.1, 0.9]).epochs_to_target)
    for trial in trials[1:]:
        trial.starts[2].accuracy = [0.1, 0.9]
    assert " not yet " in warmstart.table(results)


def test_gains_inside_residual_blocks_are_folded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ru.tag_(warmstart._residual_net(3), warmstart.NETS[1].tags)
    names = [name for name, _ in ru.tagged_parameters(model)]
    folding = Folding(model, names, Batch((torch.randn(2, 1, 8, 8),), {}))
    assert folding.foldable == set(names[::2])
    assert all("added to" in folding.reasons[name] for name in names[1::2])
