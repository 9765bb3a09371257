"""torch.compile(optimizer.step), as people write it for torch's own optimizers."""

from __future__ import annotations

import pytest
import torch
from torch.optim import SGD, Adam

import riemann_unn as ru
from tests.optim.test_capturable import made, set_grads
from tests.support import assert_on_manifold

# What it says of parts that stay in Python.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def both(**options):
    """Two optimizers of like parameters, one with a compiled step."""
    named, optimizer = made(free=True, **options)
    twins, twin = made(free=True, **options)
    return named, optimizer, torch.compile(optimizer.step, backend="eager"), twins, twin


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 1},
        pytest.param({"rank": 3, "base": SGD, "momentum": 0.9}, marks=pytest.mark.long),
        pytest.param({"rank": None, "base": Adam, "fused": True}, marks=pytest.mark.slow),
        pytest.param({"rank": 1, "kind": "kernel"}, marks=pytest.mark.slow),
        pytest.param({"rank": 1, "kind": "tall", "count": 2}, marks=pytest.mark.long),
        pytest.param({"rank": 1, "kind": "unitary"}, marks=pytest.mark.long),
    ],
)
def test_compiled_steps_are_the_same_and_compile_no_more_after_a_few(options):
    named, optimizer, compiled, twins, twin = both(**options)
    for step in range(8):
        set_grads(named)
        set_grads(twins)
        with torch.compiler.set_stance("fail_on_recompile" if step >= 3 else "default"):
            compiled()
        twin.step()
    optimizer.synchronize()
    for name, p in named.items():
        assert (p - twins[name]).abs().max() <= 1e-5, name


def test_closures_schedules_and_errors():
    named, optimizer, compiled, twins, twin = both(rank=1)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (optimizer, twin)]

    def closure_of(some):
        def closure():
            set_grads(some)
            return some["p0"].detach().sum()

        return closure

    for _ in range(4):
        losses = compiled(closure_of(named)), twin.step(closure_of(twins))
        assert abs(losses[0] - losses[1]) <= 1e-5
        for schedule in schedules:
            schedule.step()
    assert (named["p0"] - twins["p0"]).abs().max() <= 1e-5
    before = named["p0"].detach().clone()
    set_grads(named)
    named["p0"].grad[0, 0] = float("nan")
    compiled()
    assert torch.equal(named["p0"], before)
    set_grads(named)
    with pytest.raises(ru.NonFiniteError, match="'p0'"):
        compiled()
    compiled()
    assert not torch.equal(named["p0"], before)
    assert_on_manifold(named["p0"])


@pytest.mark.slow
def test_ordinary_steps_stay_correct():
    named, optimizer, compiled, _, _ = both(rank=3, capturable=False)
    for _ in range(12):
        set_grads(named)
        compiled()
    assert_on_manifold(named["p0"])
    before = named["p0"].detach().clone()
    set_grads(named)
    named["p0"].grad[0, 0] = float("nan")
    with pytest.raises(ru.NonFiniteError, match="'p0'"):
        compiled()
    assert torch.equal(named["p0"], before)
    assert int(optimizer.state[named["p0"]]["retraction_step"]) == 12
