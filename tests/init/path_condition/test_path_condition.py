"""Path conditioning of whole networks: same function, optimal scales, nothing else touched."""

import copy
import itertools
from collections import Counter

import pytest
import torch
from torch import nn

import riemann_unn as ru
from riemann_unn.errors import GraphError
from riemann_unn.graph import trace
from riemann_unn.graph.lifting import path_energies
from riemann_unn.graph.regions import regions
from riemann_unn.init import path_condition_
from tests.graph.models import VGG, ZOO, build, mlp, output, resnet
from tests.support import generator

every_model = pytest.mark.parametrize("name", ZOO)
methods = pytest.mark.parametrize("method", ["logdet", "enorm"])
LIMIT = {torch.float32: 1e-6, torch.float64: 1e-12}


def relative(a, b):
    return float((a - b).norm() / a.norm())


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def untouched(model, before):
    return all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def slow_energies(model, x):
    """One backward pass of a copy with squared weights, fed with ones, as the paper writes it."""
    squared = copy.deepcopy(model).eval()
    with torch.no_grad():
        for p in squared.parameters():
            p.square_()
    squared(torch.ones_like(x[:1])).sum().backward()
    return {name: p.grad for name, p in squared.named_parameters()}


def gradient_of_f(model, x, method="logdet"):
    """The gradient of F in the free channels, at zero, from a table of all parameters.

    Returns it with, for each channel, the number (or the energy) of the parameters around it.
    """
    view = trace(model, x)
    own = dict(model.named_parameters())
    if method == "enorm":
        energies = {name: own[name].detach().square() for name in view.scalings}
    else:
        energies = path_energies(view)
    count, region = len(view.reasons), regions(view)
    flow, number, around = (torch.zeros(count, dtype=torch.float64) for _ in range(3))
    total, n = Counter(), Counter()
    for name in view.scalings:
        total[region[name]] += float(energies[name].sum())
        n[region[name]] += energies[name].numel()
    for name, scaling in view.scalings.items():
        g = energies[name]
        rate = 1.0 if method == "enorm" else n[region[name]] / total[region[name]]
        for ids, sign in ((scaling.feeds, -1.0), (scaling.reads, 1.0)):
            if ids is not None:
                flat = ids.expand(g.shape).reshape(-1)
                flow.index_add_(0, flat, rate * sign * g.reshape(-1))
                number.index_add_(0, flat, torch.full_like(flat, sign, dtype=torch.float64))
                around.index_add_(
                    0, flat, g.reshape(-1) if method == "enorm" else torch.ones(len(flat)).double()
                )
    if method == "enorm":
        return flow[view.free], around[view.free]
    return (flow - number)[view.free], around[view.free]


@every_model
@methods
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_the_function_stays_and_so_does_everything_else(name, method, dtype):
    model, x = build(name, dtype)
    model.eval()
    next(iter(model.children())).train()  # modes may be mixed
    before, modes = state(model), [m.training for m in model.modules()]
    outputs = [output(model, x, training=t) for t in (True, False)]
    rng = torch.get_rng_state()
    report = path_condition_(model, method=method)
    assert torch.equal(rng, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(b, before[k]) for k, b in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())
    for a, training in zip(outputs, (True, False), strict=True):
        assert relative(a, output(model, x, training=training)) <= LIMIT[dtype]
    assert report.change <= LIMIT[dtype] and report.converged
    assert report.objective_after <= report.objective_before
    assert sum(g.channels for g in report.groups) == ZOO[name][2]
    assert not untouched(model, before) and report.largest_scale > 1.01
    report.undo()
    assert untouched(model, before)


@every_model
@methods
def test_the_scales_are_optimal(name, method):
    model, x = build(name)
    before, size = gradient_of_f(model, x, method)
    report = path_condition_(model, inputs=x, method=method)
    after, size = gradient_of_f(model, x, method)
    assert (after.abs() <= 1e-8 * size).all() and after.norm() <= 1e-8 * before.norm()
    again = path_condition_(model, inputs=x, method=method)
    assert again.largest_scale <= 1 + 1e-7 and report.largest_scale > 1.01


def test_energies_are_sums_over_paths():
    """On a network small enough to write down every path."""
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    w1, b1, w2, b2 = (p.detach() for p in model.parameters())
    got = path_energies(trace(model))
    want = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i, h, o in itertools.product(range(2), range(3), range(2)):
        want["0.weight"][h, i] += w2[o, h] ** 2
        want["2.weight"][o, h] += w1[h, i] ** 2
    for h, o in itertools.product(range(3), range(2)):
        want["0.bias"][h] += w2[o, h] ** 2
        want["2.weight"][o, h] += b1[h] ** 2
    want["2.bias"] += 1
    assert all(torch.allclose(got[k], want[k], rtol=1e-12) for k in want) and len(b2) == 2


@pytest.mark.parametrize(
    "make", [mlp, VGG, lambda: resnet(nn.Identity)], ids=["mlp", "vgg", "resnet"]
)
def test_energies_are_those_of_a_network_with_squared_weights(make):
    model = make().double()
    x = {"Sequential": torch.zeros(2, 6)}.get(
        type(model).__name__, torch.zeros(2, 3, 28, 28)
    ).double()
    if isinstance(model[0] if isinstance(model, nn.Sequential) else None, nn.Conv2d):
        x = torch.zeros(2, 3, 16, 16).double()
    got, want = path_energies(trace(model, x)), slow_energies(model, x)
    assert got.keys() == want.keys()
    assert all(torch.allclose(got[k], want[k], rtol=1e-10) for k in got)


def test_batch_normalisation_is_lifted_as_the_affine_map_of_evaluation():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double()
    norm = model[1]
    with torch.no_grad():
        for t in (norm.weight, norm.bias, norm.running_mean):
            t.normal_(generator=generator())
        norm.running_var.uniform_(0.5, 2, generator=generator())
    got = path_energies(trace(model))
    read = model[3].weight.detach().square().sum(0)
    fed = model[0].weight.detach().square().sum(1) + model[0].bias.detach().square()
    variance = norm.running_var + norm.eps
    assert torch.allclose(got["1.bias"], read)
    assert torch.allclose(got["1.weight"], read * (fed + norm.running_mean.square()) / variance)
    assert torch.allclose(got["0.bias"], read * norm.weight.detach().square() / variance)


def test_constants_made_in_the_forward_are_lifted():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x):
            x = self.a(x) + 2 * torch.ones(4)
            return self.c(torch.relu(self.b(x)))

    model = Shifted()
    got = path_energies(trace(model))
    w, b, v = (t.detach().double().square() for t in (model.a.weight, model.a.bias, model.c.weight))
    assert torch.allclose(got["b.weight"], torch.outer(v.sum(0), w.sum(1) + b + 4))


def test_data_and_reference_change_the_optimum():
    model, x = build("mlp")
    plain = path_condition_(copy.deepcopy(model))
    fed = path_condition_(copy.deepcopy(model), torch.cat([10 * x[:, :1], x[:, 1:]], 1))
    assert relative(plain.scales["0.weight"], fed.scales["0.weight"]) > 1e-2
    ones = path_condition_(copy.deepcopy(model), torch.ones(7, 6, dtype=torch.float64))
    assert relative(plain.scales["0.weight"], ones.scales["0.weight"]) <= 1e-8
    same = {name: torch.full_like(p, 3.0) for name, p in model.named_parameters()}
    scaled = path_condition_(copy.deepcopy(model), reference=same)
    assert relative(plain.scales["2.weight"], scaled.scales["2.weight"]) <= 1e-8
    tilted = path_condition_(copy.deepcopy(model), reference={"0.weight": torch.full((12, 6), 9.0)})
    assert relative(plain.scales["0.weight"], tilted.scales["0.weight"]) > 1e-2
    assert tilted.change <= 1e-12


def test_the_reference_that_is_met_already_asks_for_nothing():
    model, _ = build("mlp")
    path_condition_(model)
    energies = path_energies(trace(model))
    assert path_condition_(model, reference=energies).largest_scale <= 1 + 1e-7


@pytest.mark.parametrize("ring", [False, True], ids=["tag", "frozen"])
def test_tagged_and_frozen_parameters_are_never_scaled(ring):
    model, x = build("gelu")
    if ring:
        model[4].weight.requires_grad_(False)
    else:
        ru.tag_(model[4].weight, ru.Stiefel())
        ru.init.warm_start_(model)
    before, a = state(model), output(model, x, training=False)
    report = path_condition_(model)
    assert torch.equal(model[4].weight, before["4.weight"])
    assert torch.equal(model[4].bias, before["4.bias"]) and torch.equal(
        model[6].weight, before["6.weight"]
    )
    assert not torch.equal(model[0].weight, before["0.weight"])
    assert relative(a, output(model, x, training=False)) <= 1e-12
    word = "require a gradient" if ring else "Stiefel"
    assert any(c.layer == "4" and word in c.reason for c in report.closed)


def test_an_orthogonal_recurrence_stays_orthogonal():
    model, _ = build("recurrent", torch.float32)
    before = state(model)
    path_condition_(model)
    assert all(
        torch.equal(v, before[k]) for k, v in model.state_dict().items() if k.startswith("rnn")
    )
    assert float(ru.orthogonality_error(model)["rnn.weight_hh_l0"]) <= 5e-7


def test_dead_neurons_are_left_alone_and_reported():
    model, x = build("mlp")
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0, 0
        model[2].weight[:, 5] = 0
    before, a = state(model), output(model, x, training=False)
    for method in ("logdet", "enorm"):
        report = path_condition_(model, method=method)
        assert report.converged and report.groups[0].dead == 2
        assert torch.equal(model[0].weight[[2, 5]], before["0.weight"][[2, 5]])
        assert relative(a, output(model, x, training=False)) <= 1e-12
        report.undo()


@pytest.mark.parametrize("method", ["logdet", "enorm"])
def test_layers_of_zeros_do_no_harm(method):
    """Zero-initialised last layers, and residual branches that start at zero."""
    for zero in ("9.weight", "4.conv2.weight", "0.weight"):
        model, x = build("resnet")
        with torch.no_grad():
            model.get_parameter("9.weight" if zero == "9.weight" else zero).zero_()
        a = output(model, x, training=False)
        report = path_condition_(model, method=method, inputs=x)
        assert report.converged and all(torch.isfinite(p).all() for p in model.parameters())
        assert float((a - output(model, x, training=False)).norm()) <= 1e-12 * (1 + float(a.norm()))


def test_badly_scaled_networks_come_to_the_same_weights():
    """Conditioning forgets which of the equal networks it was given."""
    model, _ = build("mlp")
    view = trace(model)
    other = copy.deepcopy(model)
    exponents = 3 * torch.randn(len(view.reasons), generator=generator()).double()
    view.scale_(dict(other.named_parameters()), (10**exponents).where(view.free, 1.0))
    assert relative(model[0].weight.detach(), other[0].weight.detach()) > 1
    path_condition_(model)
    path_condition_(other)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert relative(p.detach(), q.detach()) <= 1e-6


def test_the_report_prints_what_was_done():
    model, _ = build("gelu")
    text = str(path_condition_(model))
    assert "logdet: objective" in text and "0.weight, 0.bias" in text and "2.weight" in text
    assert "closed: '2' (9): gelu in '3' (GELU) is not positively homogeneous" in text
    assert len({len(line) for line in text.splitlines()[4:7]}) == 1


def test_the_result_trains():
    model, x = build("mlp")
    path_condition_(model)
    loss = model(x).square().sum()
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


# --- bad input ---------------------------------------------------------------------------------


def test_no_channel_says_why_for_every_layer():
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
    with pytest.raises(
        GraphError, match=r"the output of '0': gelu in '1' \(GELU\).*the output of '2': it reaches"
    ):
        path_condition_(model)
    with pytest.raises(GraphError, match="No layer with a weight was found"):
        path_condition_(nn.Sequential(nn.ReLU()), inputs=torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "newton"}, ValueError, "choose one of"),
        ({"tolerance": 0.0}, ValueError, "between 0 and 1"),
        ({"reference": {"0.weight": torch.zeros(12, 6)}}, ValueError, "must be positive"),
        ({"reference": {"0.weight": torch.ones(6, 12)}}, ValueError, r"got \(6, 12\)"),
        ({"reference": {"none": torch.ones(1)}}, ValueError, "reference of 'none'"),
        ({"reference": torch.ones(3)}, TypeError, "is a dict"),
        ({"reference": {}, "method": "enorm"}, ValueError, "no meaning"),
        ({"inputs": torch.zeros(2, 7).double()}, GraphError, "cannot be multiplied"),
        ({"calibration": torch.full((2, 6), float("nan"))}, ValueError, "NaN or infinity"),
    ],
    ids=range(9),
)
def test_bad_arguments_change_nothing(arguments, error, message):
    model, _ = build("mlp")
    before = state(model)
    with pytest.raises(error, match=message):
        path_condition_(model, **arguments)
    assert untouched(model, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value):
    model, _ = build("mlp")
    with torch.no_grad():
        model[2].bias[1] = value
    weight = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"'2.bias' holds NaN or infinity"):
        path_condition_(model)
    assert torch.equal(weight, model[0].weight)


def test_overflow_of_a_narrow_type_is_caught():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).half()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model[0].weight[:, 0] = 4e4
        model[2].weight.fill_(6e4)
    before = state(model)
    with pytest.raises(ValueError, match=r"'0.weight' overflows torch.float16"):
        path_condition_(model)
    assert untouched(model, before)


def test_a_change_that_tracing_did_not_see_is_taken_back():
    class Secret(nn.Module):
        """Reads its weight behind the tracer's back."""

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
            self.hidden = [self.a.weight]

        def forward(self, x):
            return self.b(torch.relu(self.a(x))) + self.hidden[0].detach().sum()

    model = Secret()
    before = state(model)
    with pytest.raises(GraphError, match="did not see"):
        path_condition_(model)
    assert untouched(model, before)


def test_a_function_that_magnifies_rounding_is_told_from_one_that_changes():
    """Batch statistics of two equal examples, up to rounding, tell nothing about rescaling."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 8), nn.BatchNorm1d(8, eps=1e-18)
            self.d = nn.Linear(8, 2)

        def forward(self, x):
            return self.d(self.c(self.b(torch.relu(self.a(x)))))

    model = Twice()
    x = torch.randn(1, 3, generator=generator()) * torch.tensor([[1.0], [1 + 1e-6]])
    report = path_condition_(model, calibration=x)
    assert report.change > 1e-3 and report.converged


def test_a_model_that_cannot_be_traced_names_the_line():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(GraphError, match=r"Branching.forward at line \d+ 'return x if"):
        path_condition_(Branching(), torch.ones(2, 2))
    with pytest.raises(TypeError, match="got a list"):
        path_condition_([])
