"""low_rank_ and bad input: each error says what and why, and the model is as it was."""

import pytest
import torch
from torch import nn

import riemann_unn as ru
from tests.init.low_rank.nets import assert_unchanged, images, mlp, net, snapshot

BAD = {
    "rank 0": ({"rank": 0}, "must be at least 1"),
    "rank -2": ({"rank": -2}, "must be at least 1"),
    "rank 1.5": ({"rank": 1.5}, "fraction of the full rank"),
    "rank 0.0": ({"rank": 0.0}, "fraction of the full rank"),
    "rank True": ({"rank": True}, "must be an int, a fraction"),
    "rank text": ({"rank": "4"}, "must be an int, a fraction"),
    "rank dict": ({"rank": {"9": 2}}, "rank pattern '9' matches no layer; the linear"),
    "rank twice": ({"rank": {"0": 2, "*": 3}}, "keep one"),
    "layers": ({"rank": 2, "layers": "fc*"}, "layers pattern 'fc\\*' matches no layer"),
    "layers of numbers": ({"rank": 2, "layers": [1]}, "must be a name pattern"),
    "activation": ({"rank": 2, "activation": "rellu"}, "'rellu' is unknown"),
    "activation dict": ({"rank": 2, "activation": {"x": "relu"}}, "activation pattern 'x'"),
    "method": ({"rank": 2, "method": "magic"}, "method='magic' must be one of"),
    "linear": ({"rank": 2, "method": "linear"}, "needs calibration"),
    "split": ({"rank": 2, "split": "depth"}, "'channel' or 'spatial'"),
    "refine": ({"rank": 2, "refine": -1}, "must not be negative"),
    "shape": ({"rank": 2, "calibration": torch.zeros(9, 7)}, "shape \\(9, 7\\).*not changed"),
    "empty": ({"rank": 2, "calibration": torch.zeros(0, 12)}, "holds no example"),
    "no batch": ({"rank": 2, "calibration": []}, "holds no batch"),
    "kind": ({"rank": 2, "calibration": 3}, "an iterable of batches"),
    "NaN": ({"rank": 2, "calibration": torch.full((9, 12), torch.nan)}, "holds NaN"),
    "budget": ({"rank": ru.init.Budget(parameters=10)}, "less than the"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_input_changes_nothing(options, message):
    model = mlp(12, 20, 16, 10).train()
    model[2].eval()
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match=message):
        ru.init.low_rank_(model, **options)
    assert_unchanged(model, before)


def test_bad_budgets():
    for options in ({}, {"parameters": 0.1, "error": 0.1}, {"error": 2.0}, {"parameters": 1.5}):
        with pytest.raises(ValueError, match=r"exactly one|between 0 and 1|fraction in"):
            ru.init.Budget(**options)


def test_tagged_layers_are_refused():
    model = mlp(12, 12, 5)
    ru.tag_(model[0].weight, ru.Orthogonal())
    before = snapshot(model)
    with pytest.raises(ru.ManifoldError, match=r"'0.weight' is tagged Orthogonal\(\).*untag_"):
        ru.init.low_rank_(model, rank=2)
    assert_unchanged(model, before)
    assert list(ru.init.low_rank_(model, rank=2, layers="2")) == ["2"]


def test_weights_that_are_not_finite():
    model = mlp(12, 12, 5)
    model[2].weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="'2' holds NaN or infinity"):
        ru.init.low_rank_(model, rank=2)
    assert isinstance(model[0], nn.Linear)


def test_a_failure_half_way_puts_all_back(monkeypatch):
    from riemann_unn.init.low_rank import problem

    model = net()
    before = snapshot(model)
    calls = []
    real = problem.Problem.solve

    def failing(self, *args):
        calls.append(args)
        if len(calls) == 12:
            raise RuntimeError("out of memory")
        return real(self, *args)

    monkeypatch.setattr(problem.Problem, "solve", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        ru.init.low_rank_(model, rank=2, calibration=images(), draw="kaiming_normal", refine=0)
    assert_unchanged(model, before)


def test_a_layer_itself_is_no_model():
    with pytest.raises(ValueError, match="itself a Linear"):
        ru.init.low_rank_(nn.Linear(4, 4), rank=1)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module is needed"):
        ru.init.low_rank_(3, rank=1)
