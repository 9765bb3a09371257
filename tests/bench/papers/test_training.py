"""The reruns of the papers on training: small ones, and reports of results that are made up."""

import math
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import riemann_unn as ru
from bench.papers import chang, deep_unitary, lebeurrier, vodrahalli
from bench.papers.chang_page import epochs_to
from bench.papers.conditioning import NETS, build, carry_, condition_
from bench.papers.conditioning import train as train_conditioned
from bench.papers.experiment import Place, Plan
from bench.papers.lebeurrier_page import Cell, cells_of
from bench.papers.low_rank import STARTS, _started, net, product_decay
from bench.papers.vodrahalli_page import paired
from riemann_unn.nn import LowRankLinear

QUICK = Plan("quick", 1, "digits")


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path / "state.pt", lambda share, words: None, every=0.0)


@pytest.mark.parametrize("name", ["mlp3", "mlp3-norm", "conv"])
def test_conditioning_keeps_the_function_in_training_mode(name):
    model = build(NETS[name], width=64, inputs=64, classes=10, seed=0)
    before = [p.detach().clone() for p in model.parameters()]
    change = condition_(model, "conditioned", torch.randn(16, 64))
    assert change < 1e-4
    assert any(not torch.allclose(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("kind", ["momentum", "Adam"])
def test_momentum_that_is_carried_over_is_that_of_the_rescaled_net(kind):
    """Gradients of the rescaled net are divided by the scales, and so is what adds them up."""
    torch.manual_seed(0)
    one = build(NETS["mlp3"], width=8, inputs=4, classes=3, seed=0).double()
    other = build(NETS["mlp3"], width=8, inputs=4, classes=3, seed=0).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    make = torch.optim.Adam if kind == "Adam" else torch.optim.SGD
    key = "exp_avg" if kind == "Adam" else "momentum_buffer"
    options = {"lr": 0.0} if kind == "Adam" else {"lr": 0.0, "momentum": 0.9}
    states = []
    for model, late in ((one, True), (other, False)):
        optimizer = make(model.parameters(), **options)
        if not late:
            ru.init.path_condition_(model, inputs=x[:2])
        model(x).square().sum().backward()
        optimizer.step()
        if late:
            carry_(optimizer, model, ru.init.path_condition_(model, inputs=x[:2]))
        states.append([optimizer.state[p][key] for p in model.parameters()])
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b)


def test_conditioned_runs_say_when_they_arrive_and_when_they_do_not(place):
    options = {
        "net": asdict(NETS["mlp3"]),
        "method": "conditioned",
        "rates": (1e-6, 0.1, 1e6),
        "width": 32,
        "epochs": 3,
        "goal": 0.5,
        "optimizer": "SGD",
        "seed": 0,
        "data": "digits",
    }
    result = train_conditioned(options, place)
    assert result["epochs"][0] is None and result["epochs"][2] is None
    assert result["epochs"][1] <= 3 and result["train"][1] >= 0.5
    assert result == {**train_conditioned(options, place), "rescaling": result["rescaling"]}


def test_noise_decides_what_is_worse():
    test = {"plain": [0.9], "conditioned": [0.9]}
    noisy = Cell("mlp3", 0.1, {"plain": [4, 6, 9], "conditioned": [8, 9, 9]}, test)
    clear = Cell("mlp3", 0.1, {"plain": [4, 5, 5], "conditioned": [8, 9, 9]}, test)
    lost = Cell("mlp3", 0.1, {"plain": [4, 5, 5], "conditioned": [math.inf] * 3}, test)
    won = Cell("mlp3", 0.1, {"plain": [math.inf] * 3, "conditioned": [8, 9, 9]}, test)
    assert [c.is_worse for c in (noisy, clear, lost, won)] == [False, True, True, False]
    assert won.ratio == 0 and math.isinf(lost.ratio)


def test_conditioning_is_judged_where_plain_training_is_slowest(tmp_path):
    def result(epochs):
        return {
            "epochs": epochs,
            "rates": [1e-2, 1e-1],
            "test": [0.9, 0.9],
            "change": 1e-7,
            "rescaling": 0.1,
        }

    results = {
        "mlp3, SGD, plain, seed 0": result([8, 2]),
        "mlp3, SGD, conditioned, seed 0": result([4, 3]),
        "mlp3-norm, SGD, plain, seed 0": result([None, 2]),  # its other half is missing
    }
    assert [c.net for c in cells_of(results)] == ["mlp3", "mlp3"]
    (conditioning, moons) = lebeurrier.EXPERIMENTS
    found = conditioning.report(QUICK, results, tmp_path)
    assert [c.met for c in found.claims] == [True, False]
    assert (tmp_path / "papers_lebeurrier.png").exists()
    assert not conditioning.report(QUICK, {}, tmp_path).lines
    steps = {
        "plain, seed 0": {"steps": [[100, None]]},
        "conditioned, seed 0": {"steps": [[50, 10]]},
    }
    (claim,) = moons.report(QUICK, steps, tmp_path).claims
    assert "0.50" in claim.ours and "1 of 1" in claim.ours


def test_decay_of_the_product_is_that_of_its_entries():
    layer = LowRankLinear(6, 5, 2)
    model = nn.Sequential(layer, nn.Linear(5, 3))
    torch.testing.assert_close(product_decay(model), layer.weight.square().sum() / 2)


def test_low_rank_starts_have_equal_sizes_and_ranks():
    options = {"ratios": (0.25,), "width": 16, "seed": 0}
    pictures = SimpleNamespace(x=torch.randn(1000, 12), classes=4)
    sizes = set()
    for start in STARTS:
        model = _started({**options, "start": start}, pictures, 0.25)
        assert [model.first.rank, model.second.rank] == [3, 4]
        sizes.add(sum(p.numel() for p in model.parameters()))
    assert len(sizes) == 1
    torch.testing.assert_close(net(12, 16, 4, 0).last.weight, model.last.weight)


def test_random_factors_have_the_variance_of_the_others():
    pictures = SimpleNamespace(x=torch.randn(10, 400), classes=4)
    model = _started({"width": 400, "seed": 0, "start": "random"}, pictures, 0.25)
    assert float(model.first.weight.detach().var()) * 400 == pytest.approx(2, rel=0.1)


def test_significance_needs_differences_over_seeds(tmp_path):
    assert paired([1.0, 2.0], [0.0, 1.0]) == 1 and paired([1.0], [0.0]) == 1
    assert paired([1.0, 2.1, 3.0], [0.0, 1.0, 2.1]) < 0.01
    training, compression = vodrahalli.EXPERIMENTS
    results = {}
    for seed in range(3):
        for start in STARTS:
            gain = 0.1 + 0.001 * seed if start == "function, calibrated" else 0.0
            curve = {"none": [0.5 + gain, 0.6 + gain]}
            results[f"{start}, seed {seed}"] = {"early": curve, "final": curve}
    del results["random, seed 2"]
    found = training.report(QUICK, results, tmp_path)
    assert [c.met for c in found.claims] == [True, False] and "2 seeds" in " ".join(found.lines)
    low = {"spectral": [0.3, 0.6], "function, Gaussian": [0.3, 0.6]}
    whole = {
        f"seed {i}": {
            "dense": 0.9,
            "accuracy": {**low, "function, calibrated": [0.8 + i / 100, 0.9 + i / 90]},
            "error": {name: [0.5, 0.1] for name in (*low, "function, calibrated")},
        }
        for i in range(2)
    }
    (claim,) = compression.report(QUICK, whole, tmp_path).claims
    assert claim.met and (tmp_path / "papers_vodrahalli.png").exists()
    assert not training.report(QUICK, {}, tmp_path).lines
    assert not compression.report(QUICK, {}, tmp_path).lines


class KilledError(Exception):
    pass


def test_a_deep_run_that_was_stopped_ends_as_one_that_was_not(tmp_path):
    options = {
        "side": 3,
        "depth": 2,
        "free_epochs": 1,
        "free_lr": 1e-3,
        "epochs": 1,
        "starts": {"random": ("random", 1e-3), "polar": ("polar", 1e-3)},
        "rank": 2,
        "seed": 0,
        "data": "digits",
        "validation": True,
    }
    whole = deep_unitary.train(options, Place(tmp_path / "a.pt", lambda share, words: None))
    assert len(whole["accuracy"]["polar"]) == 5  # before, and four times

    def stop(share, words):
        if words.startswith("polar"):
            raise KilledError

    with pytest.raises(KilledError):
        deep_unitary.train(options, Place(tmp_path / "b.pt", stop))
    again = deep_unitary.train(options, Place(tmp_path / "b.pt", lambda share, words: None))
    assert again["accuracy"] == whole["accuracy"] and again["free"] == whole["free"]


def test_warm_starts_are_held_against_the_higher_of_the_random_ends(tmp_path):
    curves = {
        "random": [0.1, 0.5, 0.76, 0.8],
        "random, faster": [0.1, 0.4, 0.6, 0.9],
        "polar": [0.3, 0.8, 0.9, 0.9],
        "lie": [0.3, 0.8, 0.9, 0.9],
        "procrustes": [0.86, 0.9, 0.9, 0.9],
    }
    result = {
        "accuracy": curves,
        "error": dict.fromkeys(curves, 0.5),
        "converting": dict.fromkeys(curves, 1.0),
        "free": 0.9,
        "off": 1.4,
    }
    assert epochs_to(result) == {
        "random": math.inf,
        "random, faster": 0.75,
        "polar": 0.5,
        "lie": 0.5,
        "procrustes": 0.0,
    }
    assert epochs_to(result, "random")["random"] == 0.5
    (experiment,) = chang.EXPERIMENTS
    (claim,) = experiment.report(QUICK, {"6 layers, seed 0": result}, tmp_path).claims
    assert claim.met and (tmp_path / "papers_chang.png").exists()
    assert not experiment.report(QUICK, {}, tmp_path).lines
