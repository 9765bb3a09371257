"""Running a model for its outputs: what is returned, and that nothing of it is left."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from riemann_unn.init.calibration import Batch
from riemann_unn.init.recording import (
    Recorder,
    evaluating,
    outputs_of,
    relative_error,
    rounding_of,
    same_buffers,
)
from tests.support import gaussian


class Counting(nn.Module):
    """Counts its calls in a buffer, and returns noise while it trains."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        y = self.last(self.first(x).relu_())
        return y + torch.randn_like(y) if self.training else y


def batches(*sizes):
    return [Batch((gaussian(n, 3, seed=n),), {}, number=i) for i, n in enumerate(sizes)]


def test_modes_and_random_states_are_what_they_were():
    model = Counting()
    model.first.eval()
    before = torch.get_rng_state()
    with evaluating(model):
        assert not any(m.training for m in model.modules())
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and not model.first.training and model.last.training


def test_outputs_are_those_of_the_model_and_its_buffers_stay():
    model = Counting().eval()
    some = batches(5, 2)
    found = outputs_of(model, some)
    with torch.no_grad():
        assert all(torch.equal(y, model(b.args[0])) for y, b in zip(found, some, strict=True))
    assert not found[0].requires_grad and int(model.calls) == 2  # of the line above alone
    with same_buffers(model):
        model(some[0].args[0])
        assert int(model.calls) == 3
    assert int(model.calls) == 2


def test_outputs_that_cannot_be_compared_are_refused():
    def returning(value):
        return [Batch((None,), {}, lambda model, _: value, 1)]

    for value, said in (
        (torch.tensor([1]), "no floating point tensor on calibration batch 1"),
        (torch.tensor(torch.nan), "NaN or infinity on calibration batch 1"),
    ):
        with pytest.raises(ValueError, match=said):
            outputs_of(nn.Identity(), returning(value))
    with pytest.raises(ValueError, match="cannot be run on calibration batch 0: RuntimeError"):
        outputs_of(Counting(), [Batch((torch.zeros(2, 7).double(),), {})])


def test_relative_errors_are_over_all_tensors():
    old = [torch.tensor([3.0]), torch.tensor([[4.0 + 0j]])]
    new = [torch.tensor([3.0]), torch.tensor([[4.0 + 1j]])]
    assert relative_error(new, old) == pytest.approx(1 / 5)
    assert relative_error([2 * x for x in new], old, factor=2) == pytest.approx(1 / 5)
    zeros = [torch.zeros(2)]
    assert relative_error(zeros, zeros) == 0 and relative_error(old[:1], zeros[:1]) == torch.inf


def test_what_rounding_may_explain_is_that_of_the_coarsest():
    single, half = torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)
    assert rounding_of([single.double()]) == 1e3 * torch.finfo(torch.float64).eps
    assert rounding_of([single, single.double()]) == 1e3 * torch.finfo(torch.float32).eps
    assert rounding_of([half, single]) == 8 * torch.finfo(torch.bfloat16).eps


def test_calls_of_modules_are_recorded_as_they_came():
    model, some = Counting().eval(), batches(5, 2)
    recorder = Recorder(model, some)
    with torch.no_grad():
        outputs, order = recorder.outputs([model.last, model.first])
        assert order.modules == [model.first, model.last]
        assert order.counts == [{model.first: 1, model.last: 1}] * 2
        hidden = [model.first(b.args[0]) for b in some]
        # What comes later writes over it in place, and not over what was recorded.
        assert all(map(torch.equal, outputs[model.first], hidden))
        ran = []
        model.last.register_forward_hook(lambda *_: ran.append(1))
        calls = recorder.inputs(model.last, order)
        assert all(torch.equal(c.args[0], h.relu()) for c, h in zip(calls, hidden, strict=True))
    assert not ran and not model.first._forward_hooks  # it runs no further, and leaves no hook
    assert int(model.calls) == 0
