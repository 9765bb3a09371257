"""Reading models as people write them: transformers, writes, wrappers, parts that are closed."""

from __future__ import annotations

import copy
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import riemann_unn as ru
from riemann_unn.errors import GraphError
from riemann_unn.graph import trace
from riemann_unn.graph.regions import regions
from riemann_unn.graph.rules import RULES
from riemann_unn.init import path_condition_
from tests.support import generator

WIDTH, HEADS, HIDDEN = 12, 3, 20


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(5), dtype=torch.float64)


class RMSNorm(nn.Module):
    """As T5 and Llama write it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Attention(nn.Module):
    def __init__(self, fused: bool, values: int = HEADS) -> None:
        super().__init__()
        self.fused, self.values, width = fused, values, WIDTH // HEADS
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, values * width), nn.Linear(WIDTH, values * width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q = self.q(x).view(n, length, HEADS, -1).transpose(1, 2)
        k, v = (m(x).view(n, length, self.values, -1).transpose(1, 2) for m in (self.k, self.v))
        if self.fused:
            grouped = self.values != HEADS
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        else:
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            y = torch.matmul(torch.softmax(scores, -1), v)
        return self.o(y.transpose(1, 2).reshape(n, length, WIDTH))


class Block(nn.Module):
    """A block before whose parts there is a normalisation, as in OPT, T5, Whisper and Llama."""

    def __init__(self, norm: type[nn.Module], gated: bool, fused: bool, values: int) -> None:
        super().__init__()
        make = (lambda: nn.LayerNorm(WIDTH)) if norm is nn.LayerNorm else norm
        self.first, self.second, self.gated = make(), make(), gated
        self.attention = Attention(fused, values)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.gate = nn.Linear(WIDTH, HIDDEN) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        y = self.second(x)
        inner = F.silu(self.gate(y)) * self.up(y) if self.gate is not None else F.relu(self.up(y))
        return x + self.down(inner)


BLOCKS = {
    # name: (block, channels that can be scaled)
    "opt": ((nn.LayerNorm, False, True, HEADS), 2 * WIDTH + WIDTH + HIDDEN),
    "t5": ((RMSNorm, False, False, HEADS), 2 * WIDTH + WIDTH + HIDDEN),
    "llama": ((RMSNorm, True, True, 1), 2 * WIDTH + WIDTH // HEADS + HIDDEN),
}


def seeded(make, *args):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make(*args).double()
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
        return model


def changed_by(model, view, *args, training, scales=None, **kwargs):
    """How much random scales of the free channels change the outputs."""
    if scales is None:
        drawn = torch.randn(len(view.reasons), dtype=torch.float64, generator=generator(1))
        scales = drawn.exp().where(view.free, 1.0)
    other = copy.deepcopy(model)
    tensors = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    view.scale_(tensors, scales)
    found = []
    for m in (model, other):
        m.train(training)
        torch.manual_seed(3)
        found.append(m(*args, **kwargs).detach())
    return float((found[0] - found[1]).norm() / found[0].norm())


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_transformers(name):
    arguments, free = BLOCKS[name]
    model, x = seeded(Block, *arguments), normal(2, 5, WIDTH)
    view = trace(model, x)
    assert int(view.free.sum()) == free
    for training in (True, False):
        assert changed_by(model, view, x, training=training) <= 1e-13
    # The hidden layer is a network of its own, and the control: what is closed is so for a reason.
    region = regions(view)
    assert region["up.weight"] == region["down.weight"] != region["attention.v.weight"]
    doubled = torch.where(view.free, 1.0, 2.0).double()
    assert changed_by(model, view, x, training=False, scales=doubled) > 1e-2


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_transformers_are_conditioned(name):
    model, x = seeded(Block, *BLOCKS[name][0]).float(), normal(2, 5, WIDTH).float()
    with torch.no_grad():
        model.up.weight.mul_(100)
        model.up.bias.mul_(100)
        model.down.weight.div_(100)
    before = model(x).detach()
    report = path_condition_(model, inputs=x)
    assert report.converged and report.objective_after < report.objective_before - 10
    assert report.change <= 1e-6
    assert float((model(x).detach() - before).norm() / before.norm()) <= 1e-6


def test_regions_are_solved_apart():
    """Two hidden layers between GELUs: neither cares what size the other has."""

    def make(size):
        model = seeded(
            lambda: nn.Sequential(
                *(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6), nn.GELU()),
                *(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)),
            )
        )
        with torch.no_grad():
            model[6].weight.mul_(size)
        path_condition_(model, tolerance=1e-12)
        return model

    small, large = make(1.0), make(1e6)
    assert torch.allclose(small[0].weight, large[0].weight, rtol=1e-9)
    assert not torch.allclose(small[4].weight, large[4].weight, rtol=1e-2)


class Written(nn.Module):
    """What people write between two layers."""

    def __init__(self, between):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
        self.w = nn.Parameter(torch.randn(6, 6))
        self.gamma = nn.Parameter(torch.rand(6) + 0.5)
        self.register_buffer("fixed", torch.randn(6, 6))
        self.register_buffer("offset", torch.ones(6))
        self.between = between

    def forward(self, x):
        return self.b(self.between(self, F.relu(self.a(x))))


def setitem(m, x):
    y = torch.zeros_like(x)
    y[:, :3] = x[:, :3]
    return y


def half_written(m, x):
    y = x.clone()
    y[:, :2].mul_(0.5)
    return y


def dropped_path(m, x):
    keep = x.new_empty(x.shape[0], 1).bernoulli_(0.7)
    return x * keep.div_(0.7) if m.training else x


def without_gradient(m, x):
    with torch.no_grad():
        y = x * 2
    return x + y


def autocast(m, x):
    with torch.autocast("cpu", enabled=False):
        return x @ m.w


WRITTEN = {
    # name: (between, channels that can be scaled)
    "x @ W": (lambda m, x: F.relu(x @ m.w), 12),
    "W.T": (lambda m, x: F.linear(x, m.w.T).relu(), 12),
    "addmm": (lambda m, x: torch.addmm(m.gamma, x, m.w).relu(), 12),
    "einsum": (lambda m, x: F.relu(torch.einsum("bi,oi->bo", x, m.w)), 12),
    "batched": (lambda m, x: torch.bmm(x[None], m.w[None])[0], 12),
    "part of a weight": (lambda m, x: F.relu(x[:, :3] @ m.w[:3]) + x[:, 3:] @ m.w[3:], 12),
    "same weight twice": (lambda m, x: F.relu(x @ m.w) @ m.w, 6),
    "scale": (lambda m, x: x * m.gamma, 12),
    "bias": (lambda m, x: F.relu(x + m.gamma), 6),
    "one minus": (lambda m, x: m.gamma - x, 6),
    "batch norm": (lambda m, x: F.batch_norm(x, None, None, m.gamma, m.w[0], training=True), 6),
    "stochastic depth": (dropped_path, 6),
    "no_grad": (without_gradient, 6),
    "autocast": (autocast, 12),
    "buffer": (lambda m, x: F.relu(x @ m.fixed), 1),  # all of them alike
    "buffer as bias": (lambda m, x: x + m.offset, 0),
    "setitem": (setitem, 3),  # those that nothing reads
    "half written": (half_written, 0),
    "cosine of a weight": (lambda m, x: x @ m.w.cos(), 0),
    "threshold at one": (lambda m, x: F.threshold(x, 1, 0), 0),
    "where above one": (lambda m, x: torch.where(x > 1, x, 0.0), 0),
    "cumsum": (lambda m, x: x.cumsum(1), 0),
    "argmax": (lambda m, x: x * x.argmax(1, keepdim=True), 0),
    "sort": (lambda m, x: x.sort(1).values, 0),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_people_write(name):
    between, free = WRITTEN[name]
    model, x = seeded(Written, between), normal(5, 4)
    view = trace(model, x)
    assert int(view.free.sum()) == free
    for training in (True, False):
        assert changed_by(model, view, x, training=training) <= 1e-12


def test_buffers_and_parameters_without_a_gradient_are_scaled_when_asked():
    model = seeded(Written, WRITTEN["buffer"][0])
    model.a.weight.requires_grad_(False)
    x = normal(5, 4)
    with pytest.raises(GraphError, match=r"no channel to rescale.*'a.weight' does not require"):
        path_condition_(copy.deepcopy(model), inputs=x)
    before, kept = model(x).detach(), model.fixed.clone()
    report = path_condition_(model, inputs=x, scale_frozen=True)
    assert not torch.equal(model.fixed, kept)
    assert float((model(x).detach() - before).norm() / before.norm()) <= 1e-12
    report.undo()
    assert torch.equal(model.fixed, kept)


class Stores(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.seen = nn.Linear(4, 5), nn.Linear(5, 2), []

    def forward(self, x):
        self.last = F.relu(self.a(x))
        return self.b(self.last)


@pytest.mark.parametrize("call", [path_condition_, lambda m: ru.init.low_rank_(m, rank=1)])
def test_a_forward_that_stores_what_it_computes_keeps_no_stand_in(call):
    model = Stores()
    call(model)
    assert "last" not in vars(model)
    model.last = kept = torch.ones(1)
    call(Stores())
    assert model.last is kept


def test_wrappers_are_taken_off():
    model, x = seeded(Block, *BLOCKS["opt"][0]), normal(2, 5, WIDTH)
    names = set(trace(model, x).scalings)
    for wrapped in (
        torch.compile(model),
        nn.DataParallel(model),
        nn.DataParallel(torch.compile(model)),
    ):
        assert set(trace(wrapped, x).scalings) == names
    assert path_condition_(nn.DataParallel(model), inputs=x).converged


def test_what_has_no_code_or_no_values_is_told():
    with pytest.raises(TypeError, match=r"is a ScriptModule.*pass the module that it was made of"):
        trace(torch.jit.script(nn.Linear(2, 2)), torch.ones(1, 2))
    with pytest.raises(TypeError, match=r"'weight' is on the meta device.*to_empty"):
        trace(nn.Linear(2, 2, device="meta"), torch.ones(1, 2))


class Branching(nn.Module):
    def forward(self, x):
        return x if float(x.sum()) > 0 else 2 * x


class Counting(nn.Module):
    """Its shape depends on values, and it returns a tuple."""

    def forward(self, x):
        return x, x[x > 0]


@pytest.mark.parametrize(
    ("part", "reason"),
    [(Branching(), "data-dependent"), (Counting(), ""), (nn.LSTM(9, 9), "recurrent")],
    ids=["branching", "counting", "lstm"],
)
def test_a_part_that_cannot_be_read_is_closed_and_the_rest_is_not(part, reason):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.part = nn.Linear(4, 8), nn.Linear(8, 9), part
            self.c, self.d = nn.Linear(9, 7), nn.Linear(7, 2)

        def forward(self, x):
            y = self.part(self.b(F.relu(self.a(x))))
            y = y[0] if isinstance(y, tuple) else y
            return self.d(F.relu(self.c(y)))

    model, x = seeded(Whole), normal(3, 4)
    hooks = [len(m._forward_hooks) for m in model.modules()]
    view = trace(model, x)
    assert list(view.blocks) == ["part"] and reason in view.blocks["part"]
    assert int(view.free.sum()) == 8 + 7
    assert changed_by(model, view, x, training=False) <= 1e-12
    assert hooks == [len(m._forward_hooks) for m in model.modules()]
    assert path_condition_(model, inputs=x).converged


def test_hooks_run_as_often_as_the_model_does_and_see_tensors():
    seen = []
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    model[2].register_forward_hook(lambda m, args, out: seen.append(type(out)))
    view = trace(model)
    assert set(seen) == {Tensor} and list(view.blocks) == ["2"]
    assert view.closed(view.layers[0].outputs) is not None and not view.free.any()


def test_several_inputs_keywords_and_forward():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 5), nn.Linear(2, 5), nn.Linear(5, 1)

        def forward(self, x, *, other):
            return {"out": self.c(F.relu(self.a(x) + self.b(other)))}

    model, batch = seeded(Two), {"x": normal(4, 3), "other": normal(4, 2)}
    assert int(trace(model, kwargs=batch).free.sum()) == 5
    with pytest.raises(GraphError, match="pass example inputs"):
        trace(model)
    assert path_condition_(model, calibration=batch).converged

    def forward(m, pair):
        return m(pair[0], other=pair[1])

    pair = [(batch["x"], batch["other"])]
    assert path_condition_(model, calibration=pair, forward=forward).converged


def test_a_keyword_may_be_called_input():
    model, x = (
        seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))),
        normal(3, 4),
    )
    view = trace(model, kwargs={"input": x})
    assert int(view.free.sum()) == 5
    assert view.closed(view.layers[0].inputs) == "'input' is an input of the network"
    assert path_condition_(model, calibration={"input": x}).converged


def test_former_names_of_arguments_still_work():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)))
    with pytest.warns(FutureWarning, match="data= of path_condition_ is called calibration="):
        path_condition_(model, data=normal(3, 4))


def test_a_rule_that_fails_closes_what_it_has_touched(monkeypatch):
    """Loud would be too much: the model is refused for nothing that it computes."""

    def failing(walk, call):
        real(walk, call)
        raise IndexError("no such argument")

    real = RULES["linear"]
    monkeypatch.setitem(RULES, "linear", failing)
    model, x = seeded(Written, WRITTEN["x @ W"][0]), normal(5, 4)
    view = trace(model, x)
    reason = view.closed(view.layers[0].outputs)
    assert reason is not None and "is not followed: IndexError: no such argument" in reason
    assert int(view.free.sum()) == 0
    assert changed_by(model, view, x, training=False) <= 1e-12


@pytest.mark.parametrize(
    "call",
    [
        lambda m: trace(m, torch.ones(2, 6)),
        trace,
        path_condition_,
        lambda m: ru.init.low_rank_(m, rank=1, layers="2"),
        lambda m: ru.init.warm_start_(ru.tag_(m, {"0.weight": ru.Orthogonal()})),
    ],
    ids=["trace", "guess", "path_condition_", "low_rank_", "warm_start_"],
)
def test_no_weak_reference_is_left_so_that_parameters_can_be_swapped(call):
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    view = call(model)
    assert not any(map(weakref.getweakrefcount, model.parameters()))
    other = nn.Parameter(torch.ones(2, 6))
    torch.utils.swap_tensors(model[4].weight, other)
    assert view is None or view  # what it returns is still alive
