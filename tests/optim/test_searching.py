"""torch's own L-BFGS as a base: wrapped, one iteration at a time, on every manifold."""

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
from riemann_unn.errors import StateError
from tests.interruptions import interrupt, lines, sample
from tests.optim.lbfgs_problems import MADE, closure_of, fit, near, tagged, weighted
from tests.support import assert_on_manifold, gaussian, parameter

OPTIONS = {
    "lr": 1, "rank": None, "base": torch.optim.LBFGS, "history_size": 10,
    "line_search_fn": "strong_wolfe", "tolerance_grad": 1e-10, "tolerance_change": 0.0,
}  # fmt: skip


def made(name="mixed", cls=ru.optim.Expm, *, problem=fit, **options):
    params, targets = near(name)
    for p in params:
        p.grad = None
    optimizer = cls(params, **(OPTIONS | options))
    return optimizer, params, problem(params, targets)


@pytest.mark.parametrize("cls", [ru.optim.Expm, ru.optim.Cayley, ru.optim.ProjUNND])
@pytest.mark.parametrize("name", MADE)
def test_targets_are_reached(name, cls):
    optimizer, params, loss = made(name, cls)
    values = []
    first = optimizer.step(closure_of(optimizer, loss, values))
    assert float(first.detach()) == values[0]
    for _ in range(3):
        optimizer.step(closure_of(optimizer, loss, values))
    assert float(loss().detach()) <= 1e-14 * values[0]
    for p in params:
        if ru.manifold_of(p) is not None:
            assert_on_manifold(p, p.manifold)


def test_untagged_parameters_alone_move_as_torch_moves_them():
    """A tagged parameter at its minimum: the others get what torch's class does."""
    free = [nn.Parameter(gaussian(5, seed=i)) for i in (1, 2)]
    twins = [nn.Parameter(p.detach().clone()) for p in free]
    weights = gaussian(5, seed=3).exp()

    def loss(params):
        return sum((weights * (p - 1).square() + p.pow(4)).sum() for p in params)

    ours = ru.optim.Expm([tagged(4, 4), *free], **OPTIONS)
    options = {key: value for key, value in OPTIONS.items() if key not in ("rank", "base")}
    theirs = torch.optim.LBFGS(twins, **options)
    for _ in range(2):
        ours.step(closure_of(ours, partial(loss, free)))
        theirs.step(closure_of(theirs, partial(loss, twins)))
        for p, q in zip(free, twins, strict=True):
            assert float((p - q).detach().abs().max()) <= 1e-9


def test_iterations_and_evaluations_are_counted():
    optimizer, params, loss = made(problem=weighted, max_iter=4, max_eval=100)
    values = []
    optimizer.step(closure_of(optimizer, loss, values))
    assert optimizer.base.state[params[0]]["n_iter"] == 4
    assert len(values) < 12
    assert optimizer.param_groups[0]["max_iter"] == 4
    optimizer, params, loss = made(problem=weighted, max_eval=5)
    values = []
    optimizer.step(closure_of(optimizer, loss, values))
    assert 5 <= len(values) <= 7


def test_without_a_line_search():
    optimizer, params, loss = made("square", line_search_fn=None, lr=0.1, max_iter=30)
    before = float(loss().detach())
    optimizer.step(closure_of(optimizer, loss))
    assert float(loss().detach()) < 0.1 * before
    assert_on_manifold(params[0])


def test_the_loss_never_rises():
    for name in MADE:
        optimizer, _, loss = made(name, problem=weighted, max_iter=2)
        last = math.inf
        for _ in range(15):
            optimizer.step(closure_of(optimizer, loss))
            value = float(loss().detach())
            assert value <= last
            last = value


def test_what_it_cannot_do_is_refused():
    p = parameter(4, 4)
    base = torch.optim.LBFGS
    with pytest.raises(ru.ManifoldTypeError, match="pass rank=None"):
        ru.optim.ProjUNNT([p], lr=1, base=base)
    for option in ({"max_angle": 0.1}, {"capturable": True}):
        with pytest.raises(ru.ManifoldTypeError, match=f"{next(iter(option))}=.*leave it out"):
            ru.optim.Expm([p], lr=1, base=base, **option)
    with pytest.raises(ru.ManifoldTypeError, match="named φ"):
        ru.optim.ManifoldOptimizer([p], lr=1, base=base, rank=None, phi=torch.sin)
    optimizer = ru.optim.Expm([p], lr=1, base=base)
    with pytest.raises(ru.ManifoldTypeError, match="closure"):
        optimizer.step()
    optimizer.param_groups[0]["rank"] = 1
    with pytest.raises(ru.ManifoldError, match="rank=None"):
        optimizer.step(lambda: 0.0)
    half = ru.tag_(nn.Parameter(torch.eye(4).bfloat16()), ru.Orthogonal())
    optimizer = ru.optim.Expm([half], lr=1, base=base)
    with pytest.raises(ru.ManifoldTypeError, match="bfloat16"):
        optimizer.step(lambda: 0.0)


@pytest.mark.parametrize("calls", [0, 1, 4, 7])
def test_a_closure_that_raises_leaves_an_accepted_point(calls):
    reference, others, its_loss = made(problem=weighted, max_iter=1)
    points = [[p.detach().clone() for p in others]]
    for _ in range(8):
        reference.step(closure_of(reference, its_loss))
        points.append([p.detach().clone() for p in others])
    optimizer, params, loss = made(problem=weighted)
    count = 0

    def closure():
        nonlocal count
        if count == calls:
            raise RuntimeError("out of luck")
        count += 1
        return closure_of(optimizer, loss)()

    with pytest.raises(RuntimeError, match="out of luck"):
        optimizer.step(closure)
    assert any(
        all(torch.allclose(p, q, rtol=0, atol=1e-12) for p, q in zip(params, x, strict=True))
        for x in points
    )
    assert optimizer.param_groups[0]["max_iter"] == 20
    optimizer.step(closure_of(optimizer, loss))
    optimizer.step(closure_of(optimizer, loss))
    assert float(loss().detach()) <= 1e-3


def test_a_resumed_run_is_bit_equal():
    def run(resume):
        optimizer, params, loss = made(problem=weighted, max_iter=3)
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
        other, fresh, _ = made(problem=weighted)
        for p, old in zip(fresh, params, strict=True):
            p.data.copy_(old.data)
        other.load_state_dict(torch.load(file, weights_only=True))
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


def test_a_state_of_another_base_is_refused():
    optimizer, params, loss = made()
    optimizer.step(closure_of(optimizer, loss))
    other = ru.optim.Expm(params, lr=0.1, base=torch.optim.Adam)
    with pytest.raises(StateError, match="base=LBFGS"):
        other.load_state_dict(optimizer.state_dict())


def test_ctrl_c_leaves_an_accepted_point():
    def begun():
        optimizer, params, loss = made(problem=weighted, max_iter=3)
        optimizer.step(closure_of(optimizer, loss))
        return optimizer, params, loss

    optimizer, params, loss = begun()
    points = [[p.detach().clone() for p in params]]
    reference, others, its_loss = begun()
    reference.param_groups[0]["max_iter"] = 1
    for _ in range(3):
        reference.step(closure_of(reference, its_loss))
        points.append([p.detach().clone() for p in others])
    memory = [p.data_ptr() for p in params]
    total = lines(partial(optimizer.step, closure_of(optimizer, loss)))
    for at in sample(total, 60):
        optimizer, params, loss = begun()
        memory = [p.data_ptr() for p in params]
        assert interrupt(partial(optimizer.step, closure_of(optimizer, loss)), at)
        assert memory == [p.data_ptr() for p in params], f"line {at} leaves a displacement"
        assert any(
            all(torch.allclose(p, q, rtol=0, atol=1e-12) for p, q in zip(params, x, strict=True))
            for x in points
        ), f"line {at} leaves a trial"
        assert optimizer.param_groups[0]["max_iter"] == 3
        before = float(loss().detach())
        optimizer.step(closure_of(optimizer, loss))
        assert float(loss().detach()) < before
