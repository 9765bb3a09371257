"""Ctrl-C anywhere in an initializer: the model as it was, down to hooks, modes and randomness."""

from __future__ import annotations

import random
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import riemann_unn as ru
from riemann_unn import interruption
from riemann_unn.init import snapshot
from riemann_unn.init.low_rank import low_rank
from riemann_unn.init.path_condition import path_condition
from riemann_unn.init.warm_start import warm_start
from tests.interruptions import PACKAGE, interrupt, lines, sample
from tests.support import gaussian


class Counter(nn.Module):
    """A layer with a buffer and a plain attribute that running it changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.last = None

    def forward(self, x):
        self.calls += 1
        self.last = x.shape
        return x


def network():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    net.append(Counter())
    net[3].eval()
    net[5].bias.requires_grad_(False)
    net[0].register_forward_hook(lambda *_: None)
    net(gaussian(16, 6, dtype=torch.float32)).sum().backward()
    return net


def tagged_network():
    net = network()
    ru.tag_(net[0].weight, ru.Stiefel())
    ru.tag_(net[3].weight, ru.Orthogonal())
    return net


X = gaussian(40, 6, dtype=torch.float32, seed=1)
CALLS = {
    "polar": (tagged_network, partial(ru.init.warm_start_, calibration=X)),
    "lie": (
        tagged_network,
        partial(ru.init.warm_start_, method="lie", max_steps=2, tolerance=1.0, progress=False),
    ),
    "procrustes": (
        tagged_network,
        partial(ru.init.warm_start_, method="procrustes", calibration=X),
    ),
    "source": (
        tagged_network,
        lambda net: ru.init.warm_start_(
            net, source={k: 2 * v for k, v in net.state_dict().items()}
        ),
    ),
    "path_condition_": (network, partial(ru.init.path_condition_, calibration=X[:4])),
    "low_rank_": (network, partial(ru.init.low_rank_, rank=1, calibration=X)),
    "low_rank_ drawn": (
        network,
        partial(ru.init.low_rank_, rank=1, draw="kaiming_normal", orthonormal=True),
    ),
}


class State:
    """All that an initializer must leave as it was."""

    def __init__(self, net):
        self.modules = [(m, {k: _shallow(v) for k, v in vars(m).items()}) for m in net.modules()]
        self.tensors = [*net.named_parameters(), *net.named_buffers()]
        self.values = [t.detach().clone() for _, t in self.tensors]
        self.flags = [
            (t.requires_grad, t.grad, getattr(t, "manifold", None)) for _, t in self.tensors
        ]
        self.grads = [None if t.grad is None else t.grad.clone() for _, t in self.tensors]
        self.random = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
        self.modes = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

    def difference(self, other):
        """What differs from the state before, in words; None if nothing does."""
        if len(self.modules) != len(other.modules):
            return "modules"
        for (m, a), (n, b) in zip(self.modules, other.modules, strict=True):
            if m is not n or a.keys() != b.keys():
                return f"attributes of {type(m).__name__}"
            for key in a:
                if a[key] is not b[key] and a[key] != b[key]:
                    return f"{type(m).__name__}.{key}"
        for (name, t), (_, u), v, w in zip(
            self.tensors, other.tensors, self.values, other.values, strict=True
        ):
            if t is not u or not torch.equal(v, w):
                return name
        for g, h in zip(self.grads, other.grads, strict=True):
            if (g is None) != (h is None) or (g is not None and not torch.equal(g, h)):
                return "gradients"
        if any(
            a[0] != b[0] or a[1] is not b[1] or a[2] is not b[2]
            for a, b in zip(self.flags, other.flags, strict=True)
        ):
            return "requires_grad, .grad or a tag"
        if self.random[:2] != other.random[:2] or not torch.equal(self.random[2], other.random[2]):
            return "a random state"
        return None if self.modes == other.modes else "grad mode or autocast"


def _shallow(value):
    # Of dicts the objects in them count, which comparing tensors would not tell.
    return [(k, id(v)) for k, v in value.items()] if isinstance(value, dict) else value


def in_between(name, count, *, seed=0, where=PACKAGE):
    """Interrupt a call at some of its lines; return how many, and what each changed."""
    make, call = CALLS[name]
    call(make())  # what is cached between calls is, from here on
    first = make()
    before = State(first)
    total = lines(partial(call, first), where=where)
    assert before.difference(State(first)), "the call changes nothing"
    found = {}
    chosen = sample(total, count, seed)
    for i, at in enumerate(chosen):
        net = make()
        before = State(net)
        try:
            came = interrupt(partial(call, net), at, where=where)
            change = before.difference(State(net)) if came else "it ended before"
            if change is None and i % 2 == 0:
                call(net)  # once more, and it goes through
        except Exception as error:
            change = f"{type(error).__name__}: {error}"
        if change is not None:
            found[at] = change
    return len(chosen), found


def untraced(function):
    """A function in which no line is counted, nor interrupted."""

    def call(*args, **kwargs):
        trace = sys.gettrace()
        sys.settrace(None)
        try:
            return function(*args, **kwargs)
        finally:
            sys.settrace(trace)

    return call


@pytest.mark.parametrize("name", CALLS)
def test_ctrl_c_leaves_the_model_as_it_was(name):
    count, found = in_between(name, 6)
    assert count == 6 and not found


@pytest.mark.long
@pytest.mark.parametrize("name", CALLS)
def test_ctrl_c_at_many_more_lines(name, monkeypatch):
    # Of what an exporter calls back some lines are seen above; to follow all of its own takes long.
    monkeypatch.setattr(torch.export, "export", untraced(torch.export.export))
    tried, found = in_between(name, 50, seed=1)
    assert tried == 50 and not found


@pytest.mark.parametrize("name", CALLS)
def test_ctrl_c_where_the_model_is_put_back(name, monkeypatch):
    """At every line of the restoration, after the call has failed near its end."""
    make, call = CALLS[name]
    fail = RuntimeError("at the end")

    def undoing(work, undo):
        def failing():
            work()
            raise fail

        return interruption.undoing(failing, undo)

    for module in (warm_start, path_condition, low_rank):
        monkeypatch.setattr(module, "undoing", undoing)
    where = snapshot.__file__
    net = make()

    def failing(net):
        with pytest.raises(RuntimeError, match="at the end"):
            call(net)

    total = lines(partial(failing, net), where=where)
    for at in sample(total, 5):
        net = make()
        before = State(net)
        assert interrupt(partial(failing, net), at, where=where)
        assert before.difference(State(net)) is None


def test_ctrl_c_in_undo_takes_back_all_or_nothing():
    net = network()
    values = [p.detach().clone() for p in net.parameters()]
    handle = ru.init.path_condition_(net, X[:4])
    rescaled = [p.detach().clone() for p in net.parameters()]
    for at in range(lines(handle.undo)):
        ru.init.path_condition_(net, X[:4])
        assert all(torch.equal(p, v) for p, v in zip(net.parameters(), rescaled, strict=True))
        assert interrupt(handle.undo, at)
        found = [p.detach() for p in net.parameters()]
        assert any(
            all(torch.equal(p, v) for p, v in zip(found, wanted, strict=True))
            for wanted in (values, rescaled)
        )
        handle.undo()
        assert all(torch.equal(p, v) for p, v in zip(net.parameters(), values, strict=True))


def test_one_handler_is_not_enough(monkeypatch):
    """The control: undone once, a model is in between at the lines of the restoration."""

    def once(work, undo):
        try:
            return work()
        except BaseException:
            undo()
            raise

    monkeypatch.setattr(interruption, "undoing", once)
    with pytest.raises(AssertionError):
        test_ctrl_c_where_the_model_is_put_back("polar", monkeypatch)
