"""L-BFGS: its options, what closures may do, states, and who looks on."""

from __future__ import annotations

import copy
import io
import math
import pickle
from functools import partial

import pytest
import torch
from torch import nn

import riemann_unn as ru
from riemann_unn.errors import LineSearchError, StateError
from riemann_unn.optim import lbfgs
from tests.interruptions import interrupt, lines, sample
from tests.optim.lbfgs_problems import F64, MADE, closure_of, fit, near, problem, tagged, weighted
from tests.support import assert_on_manifold, gaussian, point

# Options -----------------------------------------------------------------------------------


def test_a_step_ends_as_the_options_say():
    optimizer, params, loss, values = problem(max_iter=3, max_eval=99)
    optimizer.step(closure_of(optimizer, loss, values))
    kept = optimizer.state[params[0]]
    assert kept["n_iter"] == 3 and kept["func_evals"] == len(values)
    optimizer, params, loss, values = problem(max_eval=5)
    optimizer.step(closure_of(optimizer, loss, values))
    assert 5 <= len(values) <= 8
    optimizer, params, loss, values = problem(tolerance_grad=1e-2)
    optimizer.step(closure_of(optimizer, loss, values))
    few = len(values)
    optimizer.step(closure_of(optimizer, loss, values))
    assert len(values) == few + 1  # it looks, and is done
    assert float(optimizer.last_step()[params[0]]["gradient"]) <= 1e-2 * params[0].numel() ** 0.5
    optimizer, params, loss, values = problem(tolerance_change=1e-3)
    optimizer.step(closure_of(optimizer, loss, values))
    assert len(values) < 40
    optimizer, params, loss, values = problem(history_size=2)
    optimizer.step(closure_of(optimizer, loss, values))
    assert len(optimizer.state[params[0]]["steps"]) == 2
    optimizer, params, loss, values = problem(history_size=0)
    optimizer.step(closure_of(optimizer, loss, values))
    assert values[-1] < 0.1 * values[0]


def test_without_a_line_search_a_step_is_taken_as_it_is():
    optimizer, _, loss, values = problem(line_search_fn=None, lr=0.5, max_iter=10)
    optimizer.step(closure_of(optimizer, loss, values))
    assert len(values) == 11
    assert values[-1] < values[0]


def test_options_that_cannot_be_meant_are_refused():
    for options in (
        {"lr": 0.0}, {"lr": math.nan}, {"max_iter": 0}, {"history_size": -1},
        {"tolerance_grad": -1.0}, {"line_search_fn": "armijo"}, {"max_eval": 1.5},
    ):  # fmt: skip
        with pytest.raises(ru.ManifoldError, match=next(iter(options))):
            ru.optim.LBFGS([tagged(3, 3)], **options)


def test_what_cannot_be_optimised_is_refused():
    with pytest.raises(ru.ManifoldError, match="no parameter is tagged"):
        ru.optim.LBFGS([nn.Parameter(torch.eye(3))])
    with pytest.raises(ru.ManifoldError, match="one group"):
        ru.optim.LBFGS([{"params": [tagged(3, 3)]}, {"params": [tagged(4, 4)]}])
    with pytest.raises(ru.ManifoldError, match="twice"):
        p = tagged(3, 3)
        ru.optim.LBFGS([p, p])
    half = ru.tag_(nn.Parameter(point(4, 4).bfloat16()), ru.Orthogonal())
    with pytest.raises(ru.ManifoldTypeError, match=r"bfloat16.*\.float\(\)"):
        ru.optim.LBFGS([half])
    off = ru.tag_(nn.Parameter(point(4, 4)), ru.Orthogonal())
    off.data *= 1.1
    with pytest.raises(ru.OffManifoldError):
        ru.optim.LBFGS([off])
    optimizer, params, loss, _ = problem()
    before = params[0].detach().clone()
    with pytest.raises(ru.ManifoldTypeError, match="closure"):
        optimizer.step()
    with torch.no_grad():
        params[0].mul_(1.1)
    with pytest.raises(ru.OffManifoldError):
        optimizer.step(closure_of(optimizer, loss))
    with torch.no_grad():
        params[0].copy_(before)
    optimizer.step(closure_of(optimizer, loss))
    with pytest.raises(ru.ManifoldTypeError, match="return loss"):
        optimizer.step(lambda: None)


# What a closure may do ----------------------------------------------------------------------


def accepted(optimizer, params, loss, calls):
    """Parameters after the last iteration that the first calls complete."""
    best, seen = None, []

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        seen.append((float(value.detach()), [p.detach().clone() for p in params]))
        return value

    optimizer.step(closure)
    best = min(seen[:calls], key=lambda entry: entry[0])
    return best[1]


@pytest.mark.parametrize("calls", [1, 2, 6, 9])
def test_a_closure_that_raises_leaves_the_last_accepted_point(calls):
    optimizer, params, loss, _ = problem()
    expected = accepted(*problem()[:3], calls)
    count = 0

    def closure():
        nonlocal count
        if count == calls:
            raise RuntimeError("out of luck")
        count += 1
        return closure_of(optimizer, loss)()

    with pytest.raises(RuntimeError, match="out of luck"):
        optimizer.step(closure)
    assert torch.is_grad_enabled()
    assert all(map(torch.equal, params, expected))
    optimizer.step(closure_of(optimizer, loss))
    assert float(loss().detach()) <= 1e-12


def test_nan_from_some_call_on_leaves_the_last_accepted_point():
    optimizer, params, loss, _ = problem()
    expected = accepted(*problem()[:3], 6)
    count = 0

    def closure():
        nonlocal count
        count += 1
        value = closure_of(optimizer, loss)()
        return value if count <= 6 else value * math.nan

    with pytest.raises(ru.NonFiniteError, match="not finite"):
        optimizer.step(closure)
    assert all(map(torch.equal, params, expected))
    with pytest.raises(ru.NonFiniteError, match="Nothing was changed"):
        optimizer.step(closure)


def test_nan_away_from_the_minimum_is_a_wall():
    p = tagged(8, 8)
    start = p.detach().clone()
    target = ru.linalg.cayley(0.3 * ru.linalg.skew(gaussian(8, 8, seed=3)))
    target = start @ target
    optimizer = ru.optim.LBFGS([p])

    def loss():
        far = (p - start).square().sum()
        return (p - target).square().sum() + torch.where(far > 8, math.nan, 0.0) * far

    optimizer.step(closure_of(optimizer, loss))
    assert float((p - target).detach().abs().max()) <= 1e-8


def test_closures_that_change_from_call_to_call_are_loud():
    raised = 0
    for seed in range(10):
        torch.manual_seed(seed)
        p = tagged(8, 8, seed=seed)
        optimizer = ru.optim.LBFGS([p], max_iter=200)

        def loss(p=p):
            return (p * torch.randn(8, 8, dtype=F64)).sum()

        try:
            for _ in range(20):
                optimizer.step(closure_of(optimizer, loss))
        except LineSearchError as error:
            raised += 1
            assert "same point" in str(error) and "ProjUNNT" in str(error)
        assert_on_manifold(p)
    assert raised == 10


def test_gradients_that_are_not_of_the_loss_are_told():
    p = tagged(6, 6)
    m = gaussian(6, 6, seed=1)
    optimizer = ru.optim.LBFGS([p])

    def closure():
        optimizer.zero_grad()
        (p * m).sum().backward()
        return -(p * m).sum()

    before = p.detach().clone()
    with pytest.warns(UserWarning, match="not that of the loss"):
        optimizer.step(closure)
    assert torch.equal(p, before)


def test_parameters_without_gradients_stay():
    p, q = tagged(5, 5), tagged(5, 5, seed=1)
    free = nn.Parameter(gaussian(3))
    before = [x.detach().clone() for x in (q, free)]
    optimizer = ru.optim.LBFGS([p, q, free])
    m = gaussian(5, 5, seed=2)
    optimizer.step(closure_of(optimizer, lambda: (p * m).sum()))
    assert torch.equal(q, before[0]) and torch.equal(free, before[1])
    assert q.grad is None


@pytest.mark.parametrize("shape", [(0, 0), (5, 0)])
def test_parameters_without_entries_take_part(shape):
    empty = ru.tag_(nn.Parameter(torch.zeros(shape)), ru.Stiefel())
    p = tagged(4, 4)
    m = gaussian(4, 4, seed=2)
    optimizer = ru.optim.LBFGS([("empty", empty), ("p", p)])
    first = optimizer.step(closure_of(optimizer, lambda: (p * m).sum() + empty.sum()))
    assert float((p * m).sum().detach()) < float(first.detach())
    optimizer = ru.optim.LBFGS([empty])
    assert float(optimizer.step(closure_of(optimizer, lambda: empty.sum())).detach()) == 0


# States --------------------------------------------------------------------------------------


def test_a_resumed_run_is_bit_equal():
    def run(resume):
        optimizer, params, loss, _ = problem(max_iter=3)
        for step in range(4):
            if step == 2 and resume is not None:
                optimizer, params = resume(optimizer, params)
                loss = weighted(params, near("mixed")[1])
            optimizer.step(closure_of(optimizer, loss))
        return [p.detach().clone() for p in params]

    def by_state(optimizer, params):
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        _, fresh, _, _ = problem(max_iter=3)
        for p, old in zip(fresh, params, strict=True):
            p.data.copy_(old.data)
        other = ru.optim.LBFGS(fresh)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert other.param_groups[0]["max_iter"] == 3
        return other, fresh

    def by_copy(optimizer, params):
        other = copy.deepcopy(optimizer)
        return other, other.param_groups[0]["params"]

    def by_pickle(optimizer, params):
        other = pickle.loads(pickle.dumps(optimizer))
        return other, other.param_groups[0]["params"]

    expected = run(None)
    for resume in (by_state, by_copy, by_pickle):
        assert all(map(torch.equal, run(resume), expected))


def test_the_memory_is_what_a_resumed_run_needs():
    """The control: without it the run goes elsewhere."""
    optimizer, params, loss, _ = problem(max_iter=3)
    other, others, its_loss, _ = problem(max_iter=3)
    optimizer.step(closure_of(optimizer, loss))
    other.step(closure_of(other, its_loss))
    other.state.clear()
    optimizer.step(closure_of(optimizer, loss))
    other.step(closure_of(other, its_loss))
    assert not torch.equal(params[0], others[0])


def test_states_of_others_are_refused():
    optimizer, params, loss, _ = problem(max_iter=3)
    optimizer.step(closure_of(optimizer, loss))
    state = optimizer.state_dict()
    plain = nn.Parameter(torch.eye(3))
    torchs = torch.optim.LBFGS([plain]).state_dict()
    with pytest.raises(StateError, match="class that saved it"):
        optimizer.load_state_dict(torchs)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    ru.tag_(others[0], ru.Orthogonal())
    with pytest.raises(StateError, match="coordinates"):
        ru.optim.LBFGS(others).load_state_dict(state)
    larger = [tagged(7, 7), *MADE["mixed"](0)[1:]]
    with pytest.raises(StateError, match="numbers"):
        ru.optim.LBFGS(larger).load_state_dict(state)
    assert params[0] in optimizer.state


# Others that look on ---------------------------------------------------------------------------


def test_a_monitor_sees_the_gradient_vanish():
    optimizer, _, loss, _ = problem(max_iter=5)
    monitor = ru.Monitor(optimizer)
    for _ in range(8):
        optimizer.step(closure_of(optimizer, loss))
    for entries in monitor.history.values():
        assert len(entries) == 8
        assert entries[-1]["gradient"] <= 1e-2 * entries[0]["gradient"]
        assert entries[-1]["error"] <= 1e-14
        assert entries[-1]["angle"] <= entries[0]["angle"]
    assert len(monitor.history) == 2


def test_closures_run_with_gradients_and_hooks_are_called():
    optimizer, _, loss, _ = problem(max_iter=2)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append("hook"))

    def closure():
        seen.append(torch.is_grad_enabled())
        return closure_of(optimizer, loss)()

    with torch.no_grad():
        optimizer.step(closure)
    assert set(seen) == {True, "hook"} and seen[-1] == "hook"


def test_autocast_is_the_closures_own_business():
    results = []
    for active in (False, True):
        params, targets = near("square")
        optimizer = ru.optim.LBFGS(params, max_iter=3)
        loss = fit(params, targets)
        with torch.autocast("cpu", enabled=active):
            optimizer.step(closure_of(optimizer, loss))
        results.append(params[0].detach().clone())
    assert torch.equal(*results)


def trained():
    params = [*MADE["mixed"](0), tagged(4, 4, seed=9), tagged(4, 4, seed=10)]
    targets = [p.detach().clone() for p in [*MADE["mixed"](1), *MADE["many"](5)[:2]]]
    # A first trial that is too far, so that there are points that no iteration ends at.
    optimizer = ru.optim.LBFGS(params, max_iter=4, max_eval=99, lr=30.0)
    loss = weighted(params, targets)
    optimizer.step(closure_of(optimizer, loss))
    return optimizer, params, loss


def left_by_interruptions(count):
    """Interrupt a step at some lines; return those that leave a point between two iterations."""
    optimizer, params, loss = trained()
    points = [[p.detach().clone() for p in params]]
    reference, others, its_loss = trained()
    reference.param_groups[0]["max_iter"] = 1
    for _ in range(4):
        reference.step(closure_of(reference, its_loss))
        points.append([p.detach().clone() for p in others])
    found = []
    for at in sample(lines(partial(optimizer.step, closure_of(optimizer, loss))), count):
        optimizer, params, loss = trained()
        assert interrupt(partial(optimizer.step, closure_of(optimizer, loss)), at)
        if not any(
            all(torch.allclose(p, q, rtol=0, atol=1e-12) for p, q in zip(params, x, strict=True))
            for x in points
        ):
            found.append(at)
        before = float(loss().detach())
        optimizer.step(closure_of(optimizer, loss))
        assert float(loss().detach()) < before
    return found


def test_ctrl_c_leaves_an_accepted_point():
    """At any line: all weights are those of one iteration, and the next step works."""
    assert left_by_interruptions(60) == []


def test_trials_are_left_where_nothing_is_undone(monkeypatch):
    """The control."""
    monkeypatch.setattr(lbfgs, "undoing", lambda work, _: work())
    assert left_by_interruptions(60) != []
