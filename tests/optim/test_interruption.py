"""Ctrl-C anywhere in a step: weights, gradients and state as before or as after, and usable."""

from __future__ import annotations

import signal
import threading
import time
from functools import partial

import pytest
import torch
from torch import nn

import riemann_unn as ru
from riemann_unn.optim import base, batch, tagged
from tests.interruptions import PACKAGE, Interruption, interrupt, lines, sample
from tests.support import assert_on_manifold, gaussian, parameter, point

WARM = 3  # steps before the one that is interrupted, which is one that polishes small points
OPTIONS = {
    "SGD": {},
    "SGD of rank 2": {"rank": 2},
    "momentum": {"base": torch.optim.SGD, "momentum": 0.9, "rank": 2},
    "Adam": {"base": torch.optim.Adam},
    "Adam, whole": {"base": torch.optim.Adam, "rank": None},
    "Cayley, whole": {"rank": None, "phi": "cayley"},
}


MADE = {
    "together": lambda: [parameter(6, 6, seed=i) for i in (0, 1)],
    "alone": lambda: [parameter(9, 9, seed=2)],
    "tall": lambda: [parameter(9, 4, seed=3)],
    "wide": lambda: [parameter(4, 9, seed=4)],
    "batch": lambda: [parameter(3, 7, 7, seed=5)],  # one of its matrices stays
    "batches": lambda: [parameter(2, 5, 5, seed=i) for i in (6, 7)],
    "kernel": lambda: [kernel(8)],
    "kernels": lambda: [kernel(9, 2), kernel(10, 2)],
    "half": lambda: [half(11, 8)],
    "halves": lambda: [half(12, 10), half(13, 10)],
}
KINDS = list(MADE)


class Weights(nn.Module):
    """Weights of all ways to move, and one without a tag."""

    def __init__(self, kinds):
        super().__init__()
        found = [p for kind in kinds for p in MADE[kind]()]
        self.weights = nn.ParameterList([*found, nn.Parameter(torch.ones(5))])


def kernel(seed, channels=3):
    x = ru.OrthogonalConv(ndim=1).random(
        channels, channels, 4, generator=torch.Generator().manual_seed(seed)
    )
    return ru.tag_(nn.Parameter(x.as_subclass(torch.Tensor)), ru.OrthogonalConv(ndim=1))


def half(seed, n):
    x = point(n, n, dtype=torch.float32, seed=seed).bfloat16()
    return ru.tag_(nn.Parameter(x), ru.Stiefel())


def give_gradients(net, step):
    for i, p in enumerate(net.parameters()):
        p.grad = gaussian(*p.shape, dtype=torch.float32, seed=100 * step + i).to(p.dtype)
        if p.ndim == 3 and p.shape[-1] > 4:
            p.grad[0] = 0  # no move, so bit for bit as it is


def trained(options, steps, kinds=KINDS):
    """A net with an optimizer on its way, and gradients for the next step."""
    net = Weights(kinds)
    optimizer = ru.optim.ManifoldOptimizer(net.parameters(), lr=0.1, **options)
    for step in range(steps):
        give_gradients(net, step)
        optimizer.step()
    give_gradients(net, steps)
    return net, optimizer


def in_between(options, count, *, kinds=KINDS, steps=WARM, seed=0, where=PACKAGE):
    """Interrupt a step at some of its lines; return how many, and what each left in between."""
    net, optimizer = trained(options, steps, kinds)
    before = [p.detach().clone() for p in net.parameters()]
    total = lines(optimizer.step, where=where)
    after = [p.detach().clone() for p in net.parameters()]
    found = {}
    chosen = sample(total, count, seed)
    for at in chosen:
        net, optimizer = trained(options, steps, kinds)
        try:
            interrupt_step(net, optimizer, partial(interrupt, at=at, where=where))
            assert_as_before_or_after(net, before, after)
            assert_usable(net, optimizer, after, steps)
        except Exception as error:  # whatever it is, the step is not as it was
            found[at] = f"{type(error).__name__}: {error}"
    return len(chosen), found


def interrupt_step(net, optimizer, interrupted):
    """Interrupt a step; check what it is to leave alone in any case."""
    params = list(net.parameters())
    grads = [p.grad for p in params]
    values = [g.clone() for g in grads]
    memory = [(p.data_ptr(), p.shape, p.dtype) for p in params]
    random_state = torch.get_rng_state()
    assert interrupted(optimizer.step)
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert memory == [(p.data_ptr(), p.shape, p.dtype) for p in params]
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    assert all(torch.equal(g, v) for g, v in zip(grads, values, strict=True))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(p is q for p, q in zip(params, held, strict=True))


def assert_as_before_or_after(net, before, after):
    """Each weight for itself, bit for bit."""
    for p, old, new in zip(net.parameters(), before, after, strict=True):
        assert torch.equal(p, old) or torch.equal(p, new), f"{tuple(p.shape)} is in between"


def assert_usable(net, optimizer, after, steps):
    for step in (1, 2):
        give_gradients(net, steps + step)
        optimizer.step()
    for p, new in zip(net.parameters(), after, strict=True):
        assert not torch.equal(p, new)
        if ru.tagging.manifold_of(p) is None:
            continue
        if p.dtype == torch.bfloat16:
            assert torch.equal(p, optimizer.state[p]["master"].bfloat16())
            assert_on_manifold(optimizer.state[p]["master"], p.manifold)
        else:
            assert_on_manifold(p, p.manifold)


@pytest.mark.parametrize("name", OPTIONS)
def test_ctrl_c_leaves_a_step_before_or_after(name):
    count, found = in_between(OPTIONS[name], 15)
    assert count == 15 and not found


@pytest.mark.parametrize(
    "count", [pytest.param(60, marks=pytest.mark.slow), pytest.param(120, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("name", OPTIONS)
def test_ctrl_c_at_many_more_lines(name, count):
    tried, found = in_between(OPTIONS[name], count, seed=1)
    assert tried == count and not found


@pytest.mark.parametrize("steps", [0, WARM])
def test_ctrl_c_inside_of_torch(steps):
    """At lines of torch too: a base that was about to begin its state begins it again."""
    count, found = in_between(OPTIONS["Adam"], 15, steps=steps, where="/")
    assert count == 15 and not found


def test_ctrl_c_as_a_signal():
    """A signal that comes at any time of a step."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals are handled by the main thread")
    options = OPTIONS["Adam"]
    net, optimizer = trained(options, WARM)
    before = [p.detach().clone() for p in net.parameters()]
    start = time.perf_counter()
    optimizer.step()
    duration = time.perf_counter() - start
    after = [p.detach().clone() for p in net.parameters()]

    def raise_(*_):
        raise Interruption

    handler = signal.signal(signal.SIGALRM, raise_)
    hits = 0
    try:
        for share in range(1, 20):
            net, optimizer = trained(options, WARM)

            def signalled(step, share=share):
                try:
                    signal.setitimer(signal.ITIMER_REAL, duration * share / 20)
                    step()
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except Interruption:
                    nonlocal hits
                    hits += 1
                return True

            interrupt_step(net, optimizer, signalled)
            assert_as_before_or_after(net, before, after)
            assert_usable(net, optimizer, after, WARM)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert hits > 0


def test_one_finally_block_is_not_enough(monkeypatch):
    """The control: restored once, weights are lost at the lines of the restoration."""

    def once(work, restore):
        try:
            return work()
        finally:
            restore()

    place = {"kinds": ["together"], "where": base.__file__}
    _, found = in_between(OPTIONS["Adam"], 1000, **place)
    assert not found
    monkeypatch.setattr(base, "restoring", once)
    _, found = in_between(OPTIONS["Adam"], 1000, **place)
    assert found


def test_masters_are_written_with_what_is_stored():
    """Interrupted between the two, a master would be made anew from its rounding."""
    _, optimizer = trained({}, WARM, ["half", "halves"])
    for at in range(lines(optimizer.step, where=batch.__file__)):
        net, optimizer = trained({}, WARM, ["half", "halves"])
        interrupt(optimizer.step, at, where=batch.__file__)
        halves = [p for p in net.parameters() if p.dtype == torch.bfloat16]
        assert len(halves) == 3
        for p in halves:
            assert torch.equal(optimizer.state[p]["master"].bfloat16(), p)


def test_parameters_that_were_being_added_are_trained():
    """Who has no tag is noted before what tells that it was noted."""

    def grown():
        # With the first one without a tag: a look that knows of none would leave it out.
        p = nn.Parameter(torch.eye(4))
        ru.tag_(p, ru.Orthogonal())
        p.grad = torch.ones(4, 4)
        optimizer = ru.optim.ProjUNNT([p], lr=0.1)
        optimizer.step()
        free = nn.Parameter(torch.zeros(2))
        free.grad = torch.ones(2)
        return optimizer, free, partial(optimizer.add_param_group, {"params": [free]})

    for at in range(lines(grown()[2], where=tagged.__file__)):
        optimizer, free, add = grown()
        assert interrupt(add, at, where=tagged.__file__)
        if len(optimizer.param_groups) == 1:
            add()
        optimizer.step()
        assert bool((free != 0).all())
