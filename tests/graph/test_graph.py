"""Tracing: the channels found, the reasons given, and that scaling them changes no function."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from riemann_unn.errors import GraphError
from riemann_unn.graph import trace
from riemann_unn.graph.lifting import path_energies
from tests.graph.models import ZOO, UNet, build, mlp, output, resnet
from tests.support import generator

every_model = pytest.mark.parametrize("name", ZOO)


def scaled(model, view, *, seed=0):
    """A copy of a model whose free channels are scaled by random numbers between e^-3 and e^3."""
    random = torch.randn(len(view.reasons), dtype=torch.float64, generator=generator(seed))
    scales = random.exp().where(view.free, 1.0)
    other = copy.deepcopy(model)
    view.scale_(dict(other.named_parameters()), scales)
    return other


def relative(a, b):
    return float((a - b).norm() / a.norm())


@every_model
@pytest.mark.parametrize("given", [False, True], ids=["guessed", "given"])
def test_random_scales_change_nothing_in_either_mode(name, given):
    model, x = build(name)
    view = trace(model, *((x,) if given else ()))
    assert int(view.free.sum()) == ZOO[name][2]
    other = scaled(model, view)
    for training in (True, False):
        a, b = (output(m, x, training=training) for m in (model, other))
        assert relative(a, b) <= 1e-12
    assert any(
        not torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )


@every_model
def test_scaling_a_fixed_space_does_change_the_function(name):
    """The negative control: spaces are not closed for nothing (inputs and outputs, at least)."""
    model, x = build(name)
    view = trace(model, x)
    scales = torch.where(view.free, 1.0, 2.0).double()
    other = copy.deepcopy(model)
    view.scale_(dict(other.named_parameters()), scales)
    assert relative(*(output(m, x, training=False) for m in (model, other))) > 1e-3


@every_model
def test_tracing_leaves_no_mark(name):
    model, x = build(name)
    model[0].eval() if isinstance(model, nn.Sequential) else None
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    rng = torch.get_rng_state()
    trace(model)
    trace(model, x, per="tensor")
    assert torch.equal(rng, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert attributes == [set(vars(m)) for m in model.modules()]
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_layers_come_in_the_order_in_which_they_run():
    view = trace(resnet(nn.BatchNorm2d))
    assert [layer.module for layer in view.layers][:6] == [
        "0",
        "1",
        "4.conv1",
        "4.norm1",
        "4.conv2",
        "4.norm2",
    ]
    assert [layer.kind for layer in view.layers][:2] == ["conv", "norm"]
    first, norm, conv = view.layers[:3]
    assert view.closed(first.inputs) == "'input' is an input of the network"
    assert view.closed(first.outputs) == "batch_norm in '1' (BatchNorm2d) normalises it"
    assert view.closed(norm.outputs) is None and torch.equal(norm.outputs, conv.inputs)


def test_sums_join_spaces_and_concatenation_keeps_them_apart():
    view = trace(UNet())
    layers = {layer.module: layer for layer in view.layers}
    assert torch.equal(layers["down2"].outputs, layers["bottom"].outputs)
    joined = torch.cat([layers["down1"].outputs, layers["up"].outputs])
    assert torch.equal(layers["join"].inputs, joined) and len(joined.unique()) == 12


def test_a_weight_used_twice_scales_alike_in_both_places():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(3, 4), nn.Linear(3, 4)
            self.both, self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(5, 2)

        def forward(self, x):
            u, v = (self.both(F.relu(side(x))).relu() for side in (self.left, self.right))
            return self.a(u) - self.b(v)

    model, x = Siamese().double(), torch.randn(3, 3, dtype=torch.float64, generator=generator())
    view = trace(model)
    assert int(view.free.sum()) == 4 + 5
    assert relative(*(output(m, x, training=True) for m in (model, scaled(model, view)))) <= 1e-12


def test_one_space_for_each_tensor():
    view = trace(mlp(), per="tensor")
    assert len(view.reasons) == 4 and int(view.free.sum()) == 2
    model, x = mlp(), torch.randn(3, 6, generator=generator())
    assert relative(model(x).detach(), scaled(model, view)(x).detach()) <= 1e-6


def test_closed_parameters_close_both_their_sides():
    view = trace(mlp(), closed={"2.weight": "it is rigid"})
    assert not view.free.any()
    assert (
        view.closed(view.layers[1].inputs) == view.closed(view.layers[1].outputs) == "it is rigid"
    )


class Closing(nn.Module):
    """A hidden layer, something between, and a second layer."""

    def __init__(self, between):
        super().__init__()
        self.a, self.b, self.between = nn.Linear(4, 4), nn.Linear(4, 4), between

    def forward(self, x):
        return self.b(self.between(F.relu(self.a(x))))


class Between(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def ladder(x):
    return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (nn.GELU(), "(GELU)"),
        (nn.Hardtanh(), "(Hardtanh)"),
        (nn.ReLU6(), "(ReLU6)"),
        (nn.Tanh(), "(Tanh)"),
        (nn.Softmax(-1), "(Softmax)"),
        (nn.LayerNorm(4), "(LayerNorm)"),
        (nn.BatchNorm1d(4), "normalises it"),
        (nn.BatchNorm1d(4, affine=False), "normalises it"),
        (Between(lambda x: x + 1), "adds a constant"),
        (Between(lambda x: 1 - x), "adds a constant"),
        (Between(lambda x: x.add_(0.5)), "adds a constant"),
        (Between(lambda x: x + torch.ones(4)), "adds a constant"),
        (Between(lambda x: F.pad(x, (1, 0), value=1.0)[:, 1:]), "pad"),
        (Between(lambda x: F.silu(x)), "silu"),
        (Between(lambda x: torch.clamp(x, 0, 6)), "clamp"),
        (Between(lambda x: x.tanh_()), "tanh_"),
        (Between(lambda x: x * x), "multiplies two activations"),
        (Between(lambda x: x / (1 + x)), "constant"),
        (Between(lambda x: 1 / (x + 1)), "constant"),
        (Between(lambda x: x @ x.T @ x), "matmul"),
        (Between(lambda x: x.long().to(x.dtype)), "long"),
        (Between(lambda x: (x > 1).to(x.dtype)), "gt"),
        (Between(lambda x: x.masked_fill(x < 1, 0.5)), "lt"),
        (Between(ladder), "(Between)"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "(ParametrizedLinear)"),
    ],
    ids=range(25),
)
def test_what_is_not_homogeneous_closes_with_a_reason(between, reason):
    model = Closing(between)
    view = trace(model)
    assert reason in str(view.closed(view.layers[0].outputs))
    x = torch.randn(5, 4, generator=generator()).double()
    model.double()
    assert relative(*(output(m, x, training=True) for m in (model, scaled(model, view)))) <= 1e-12


@pytest.mark.parametrize(
    "between",
    [
        nn.Identity(),
        nn.Dropout(),
        nn.PReLU(),
        Between(lambda x: -2 * x.abs() / 3),
        Between(lambda x: x.clamp(min=0)),
        Between(lambda x: torch.clamp(x, max=0)),
        Between(lambda x: torch.maximum(x, 0.5 * x)),
        Between(lambda x: x * (torch.arange(4) + 1.0)),
        Between(lambda x: torch.cat([x, x.new_zeros(x.shape[0], 3)], 1)[:, :4]),
        Between(lambda x: x.flip(1).unsqueeze(0).squeeze(0)),
        Between(lambda x: x.reshape(x.shape[0], 2, 2).permute(0, 2, 1).flatten(1)),
        Between(lambda x: x.view_as(x).type_as(x)),
        Between(lambda x: torch.stack(x.unbind(1), 1)),
        Between(lambda x: (x > 0).to(x.dtype)),
        Between(lambda x: x * (x > 0)),
        Between(lambda x: torch.where(x > 0, x, 0.1 * x)),
        Between(lambda x: x.masked_fill(x < 0, 0.0)),
        Between(lambda x: F.threshold(x, 0, 0)),
        Between(lambda x: x * x.sign()),
        Between(lambda x: F.relu(x, inplace=True)),
    ],
    ids=range(20),
)
def test_what_is_homogeneous_stays_open(between):
    model = Closing(between)
    view = trace(model)
    assert int(view.free.sum()) == 4
    x = torch.randn(5, 4, generator=generator())
    assert relative(*(output(m, x, training=True) for m in (model, scaled(model, view)))) <= 1e-6


class Constants(nn.Module):
    """A map of a constant, with weights of its own, added to a map of the input."""

    def __init__(self):
        super().__init__()
        self.a, self.place, self.b = nn.Linear(4, 6), nn.Linear(2, 6), nn.Linear(6, 3)
        self.conv, self.matrix = nn.Conv1d(1, 6, 1), nn.Parameter(torch.randn(2, 6))

    def forward(self, x):
        grid = torch.arange(2, dtype=x.dtype) / 2
        place = self.place(grid) + grid @ self.matrix + self.conv(grid[None, None])[0, :, 1]
        return self.b(F.relu(self.a(x) + place))


def test_a_linear_map_of_a_constant_is_one_of_an_input():
    model, x = Constants().double(), torch.randn(5, 4, generator=generator()).double()
    view = trace(model, x)
    assert int(view.free.sum()) == 6
    fed = {n for n, s in view.scalings.items() if bool(view.free[s.feeds].any())}
    names = ("a.weight", "a.bias", "place.weight", "place.bias", "conv.weight", "conv.bias")
    assert fed == {*names, "matrix"}
    a, b = (output(m, x, training=False) for m in (model, scaled(model, view)))
    assert relative(a, b) <= 1e-12
    with torch.no_grad():  # the negative control: were only the input's map scaled, it would show
        other = scaled(model, view)
        other.place.load_state_dict(model.place.state_dict())
    assert relative(a, output(other, x, training=False)) > 1e-3
    # The constant's square is what feeds its paths, 0 at its first place and 1/4 at the second.
    energies = path_energies(view)
    out = model.b.weight.detach().square().sum(0)
    torch.testing.assert_close(energies["place.weight"], out[:, None] * torch.tensor([0.0, 0.25]))


def test_operands_that_are_sampled_keep_their_scale_and_the_grid_is_no_factor():
    class Sampled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            y = F.relu(self.a(x))
            grid = (
                torch.linspace(-1, 1, 18, dtype=y.dtype).reshape(1, 3, 3, 2).expand(len(y), 3, 3, 2)
            )
            return self.b(F.grid_sample(y, grid, align_corners=True))

    model, x = Sampled(), torch.randn(2, 1, 5, 5, generator=generator())
    view = trace(model, x)
    assert int(view.free.sum()) == 4
    assert all(bool((g > 0).all()) for g in path_energies(view).values())  # in double precision
    a, b = (output(m, x, training=False) for m in (model, scaled(model, view)))
    assert relative(a, b) <= 1e-6


class Blur(nn.Module):
    """Each channel by itself through a fixed kernel, then all of them through a fixed matrix."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv1d(2, 4, 1), nn.Conv1d(4, 4, 1), nn.Linear(4, 3)
        nn.init.ones_(self.b.bias)
        self.register_buffer("kernel", torch.tensor([1.0, 2.0, 1.0]).expand(4, 1, 3).clone())
        self.register_buffer("matrix", torch.randn(4, 4, generator=generator()))

    def forward(self, x):
        x = F.conv1d(F.relu(self.a(x)), self.kernel, groups=4)
        return self.c(F.relu(F.relu(self.b(x)).mean(-1) @ self.matrix))


def test_scales_pass_through_maps_that_are_buffers():
    model, x = Blur().double(), torch.randn(3, 2, 7, generator=generator()).double()
    view = trace(model, x)
    assert int(view.free.sum()) == 4 + 1  # one for each channel, then one for all of them
    other = scaled(model, view)
    assert torch.equal(other.kernel, model.kernel) and torch.equal(other.matrix, model.matrix)
    a = output(model, x, training=False)
    assert relative(a, output(other, x, training=False)) <= 1e-12
    with torch.no_grad():  # the negative control: other scales for single channels would show
        other.b.weight.mul_(torch.arange(1.0, 5.0)[:, None, None])
        other.b.bias.mul_(torch.arange(1.0, 5.0))
    assert relative(a, output(other, x, training=False)) > 1e-3


class Affine(nn.Module):
    """``addcmul``, by weights of its own or by what is not to be scaled."""

    def __init__(self, product):
        super().__init__()
        self.a, self.b, self.product = nn.Linear(4, 6), nn.Linear(6, 3), product
        self.shift, self.factor = (nn.Parameter(torch.rand(1, 6) + 0.5) for _ in range(2))

    def forward(self, x):
        return self.b(F.relu(self.product(self, F.relu(self.a(x)))))


@pytest.mark.parametrize(
    ("product", "free"),
    [
        (lambda m, x: torch.addcmul(m.shift, m.factor, x), 12),
        (lambda m, x: torch.addcmul(m.shift, x, m.factor, value=-0.5), 12),
        (lambda m, x: torch.addcmul(x, x, torch.ones(6).to(x)), 6),
        (lambda m, x: torch.addcmul(torch.ones(6).to(x), m.factor, x), 6),  # before the factor
        (lambda m, x: torch.addcmul(x, x, x), 0),
        (lambda m, x: torch.addcmul(x, m.factor, m.shift), 0),
    ],
    ids=["affine", "value", "constant factor", "constant", "square", "weights"],
)
def test_a_product_is_added(product, free):
    model, x = Affine(product).double(), torch.randn(5, 4, generator=generator()).double()
    view = trace(model, x)
    assert int(view.free.sum()) == free
    a, b = (output(m, x, training=False) for m in (model, scaled(model, view)))
    assert relative(a, b) <= 1e-12
    assert all(bool(torch.isfinite(g).all()) for g in path_energies(view).values())


def test_a_branch_on_the_mode_is_followed_in_both_modes():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(5, 3)

        def forward(self, x):
            x = F.relu(self.a(x))
            return (self.b(x), self.head(x)) if self.training else self.b(x)

    model = Auxiliary().eval()
    view = trace(model)
    assert set(view.scalings) == {
        f"{m}.{p}" for m in ("a", "b", "head") for p in ("weight", "bias")
    }
    other, x = scaled(model, view), torch.randn(3, 4, generator=generator())
    for a, b in zip(model.train()(x), other.train()(x), strict=True):
        assert relative(a.detach(), b.detach()) <= 1e-6


def test_hooks_and_frozen_views_are_closed():
    model = mlp()
    model[0].register_forward_hook(lambda module, args, result: result + 1)
    view = trace(model)
    assert int(view.free.sum()) == 9 and any("forward hooks" in str(r) for r in view.reasons)


def test_a_model_that_cannot_be_traced_names_the_place():
    class Branching(nn.Module):
        def forward(self, x):
            y = x.relu()
            if y.sum() > 0:
                return y
            return x

    with pytest.raises(GraphError, match=r"Branching.forward at line \d+ 'if y"):
        trace(Branching(), torch.randn(2, 3, generator=generator()))
    view = trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), Branching(), nn.Linear(3, 1)))
    assert list(view.blocks) == ["2"] and "data-dependent" in view.blocks["2"]


def test_shapes_that_cannot_be_guessed_are_asked_for():
    with pytest.raises(GraphError, match="pass example inputs"):
        trace(nn.Sequential(nn.ReLU(), nn.Flatten()))
    with pytest.raises(GraphError, match="to have 3 channels, but got 4"):
        trace(nn.Conv2d(3, 2, 1), torch.zeros(1, 4, 5, 5))
    with pytest.raises(GraphError, match="TypeError"):
        trace(mlp(), torch.zeros(1, 6), torch.zeros(1))
    with pytest.raises(TypeError, match="no shape yet"):
        trace(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(TypeError, match="got a Tensor"):
        trace(torch.zeros(2))
