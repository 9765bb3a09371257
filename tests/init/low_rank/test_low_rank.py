"""low_rank_: which layers, which activation, calibration, ranks and budgets, all or nothing."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import riemann_unn as ru
from riemann_unn.linalg import function_error
from tests.init.low_rank.nets import assert_unchanged, images, mlp, net, snapshot
from tests.support import assert_on_manifold, gaussian, generator


def test_the_report():
    model, x = net().eval(), images()
    before, rng = model(x), torch.get_rng_state()
    report = ru.init.low_rank_(model, rank=3)
    assert torch.equal(rng, torch.get_rng_state()) and not model.conv.training
    assert list(report) == ["conv", "second", "flat", "head"]
    assert isinstance(model.conv, ru.nn.LowRankConv2d)
    assert isinstance(model.flat, ru.nn.LowRankLinear)
    assert [layer.activation for layer in report.values()] == [
        "relu",
        "tanh",
        "leaky_relu(0.2)",
        "identity",
    ]
    assert "grouped" in report.skipped and "groups=4" in report.skipped["grouped"]
    assert "batch normalisation" in report["conv"].notes[0]
    assert "model's" in report["head"].notes[0]
    flat = report["flat"]
    assert flat.rank == 3 and flat.parameters == (24 * 64, 3 * (24 + 64)) == flat.macs
    assert report.parameters[0] == 12 * 18 + 16 * 108 + 24 * 64 + 9 * 24
    for layer in report.values():
        assert layer.gaussian[1] <= layer.gaussian[0] + 1e-6 and layer.held_out is None
        assert layer.rank in layer.curve
    text = str(report)
    assert "24x64" in text and "grouped: left alone" in text and "total" in text
    assert "4 layers" in repr(report)
    assert model(x).shape == before.shape


def test_the_reported_error_is_that_of_the_layer():
    model = mlp(16, 24, 5)
    dense = copy.deepcopy(model[0])
    report = ru.init.low_rank_(model, rank=2, layers="0")
    x = gaussian(200_000, 16, dtype=torch.float32)
    with torch.no_grad():
        want, got = torch.relu(dense(x)), torch.relu(model[0](x))
    sampled = float((want - got).square().sum() / want.square().sum())
    assert report["0"].gaussian[1] == pytest.approx(sampled, rel=0.02)


@pytest.mark.parametrize("split", ["channel", "spatial"])
@pytest.mark.parametrize("method", ["spectral", "function", "linear"])
def test_batch_normalisation_is_taken_in_and_out_again(split, method):
    """Folding a batch normalisation into the layer by hand changes nothing."""
    model, folded = net().eval(), net().eval()
    model.norm.weight.data = 0.2 + torch.rand(12, generator=generator(1))
    model.norm.bias.data = torch.randn(12, generator=generator(2))
    folded.norm.load_state_dict(model.norm.state_dict())
    fused = torch.nn.utils.fuse_conv_bn_eval(folded.conv, folded.norm)
    folded.conv, folded.norm = fused, nn.Identity()
    x, y = images(), images(7)
    for m in (model, folded):
        cal = None if method == "function" and split == "channel" else x
        ru.init.low_rank_(m, rank=3, layers="conv", split=split, method=method, calibration=cal)
    with torch.no_grad():
        one, two = model.norm(model.conv(y)), folded.conv(y)
        assert float((one - two).norm() / two.norm()) < 2e-2
        before = net().eval()
        before.norm.load_state_dict(model.norm.state_dict())
        assert float((one - before.norm(before.conv(y))).norm() / two.norm()) > 0.1


def test_calibration_keeps_what_the_layer_does():
    errors = {}
    x = gaussian(500, 6, dtype=torch.float32, seed=3) @ gaussian(6, 20, dtype=torch.float32)
    for method in ("spectral", "linear", "function"):
        model = mlp(20, 40, 40, 10)
        report = ru.init.low_rank_(model, rank=4, layers="2", method=method, calibration=x)
        errors[method] = report["2"].held_out
        assert report["2"].held_out is not None
    assert errors["spectral"][0] == pytest.approx(errors["spectral"][1])
    assert errors["linear"][0] == pytest.approx(errors["spectral"][0])
    assert errors["linear"][1] < 0.7 * errors["linear"][0]
    assert errors["function"][1] < errors["linear"][1]


def test_later_layers_make_up_for_earlier_ones():
    x = gaussian(800, 12, dtype=torch.float32, seed=4)
    dense = mlp(12, 48, 48, 10)
    whole, apart = copy.deepcopy(dense), copy.deepcopy(dense)
    ru.init.low_rank_(whole, rank=4, layers=["0", "2"], calibration=x)
    for name in ("0", "2"):  # each from the original, so that neither knows of the other
        alone = copy.deepcopy(dense)
        ru.init.low_rank_(alone, rank=4, layers=name, calibration=x)
        setattr(apart, name, alone.get_submodule(name))
    y = gaussian(300, 12, dtype=torch.float32, seed=5)
    with torch.no_grad():
        want = dense[:4](y)
        off = [float((m[:4](y) - want).norm()) for m in (whole, apart)]
    assert off[0] < 0.97 * off[1]


@pytest.mark.parametrize(
    "calibration",
    [
        lambda x: x,
        lambda x: [x[:30], x[30:]],
        lambda x: [(x[:20], 0), (x[20:40], 1), [x[40:], None]],
        lambda x: [{"x": x[:30]}, {"x": x[30:]}],
        lambda x: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=10),
        lambda x: [(x, None)],
    ],
    ids=["tensor", "batches", "pairs", "mappings", "loader", "one"],
)
def test_calibration_comes_in_many_shapes(calibration):
    model = net()
    before = {k: v.clone() for k, v in model.norm.state_dict().items()}
    report = ru.init.low_rank_(model, rank=2, calibration=calibration(images()), refine=5)
    assert all(layer.held_out is not None for layer in report.values())
    assert model.training and model.norm.training
    assert all(torch.equal(v, before[k]) for k, v in model.norm.state_dict().items())


def test_a_loader_that_shuffles_leaves_the_random_state():
    dataset = torch.utils.data.TensorDataset(gaussian(40, 12, dtype=torch.float32))
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True)
    state = torch.get_rng_state()
    ru.init.low_rank_(mlp(12, 16, 5), rank=2, calibration=loader, refine=0)
    assert torch.equal(state, torch.get_rng_state())
    iter(loader)  # the control
    assert not torch.equal(state, torch.get_rng_state())


def test_patches_are_those_of_the_convolution():
    from riemann_unn.init.calibration import batches_of, split
    from riemann_unn.init.low_rank.rows import gather
    from riemann_unn.init.low_rank.targets import target_of

    for options in (
        {"padding": 1, "stride": 2},
        {"dilation": (2, 1), "padding": "same", "padding_mode": "circular"},
    ):
        conv = nn.Conv2d(2, 5, (3, 2), bias=False, **options)
        model = nn.Sequential(conv)
        x = images(5)
        rows = gather(model, {"0": target_of(conv)}, split(batches_of(x, model)))["0"]
        assert rows.held_out is not None
        out = conv(x[:4]).permute(0, 2, 3, 1).reshape(-1, 5)
        assert torch.allclose(rows.fit @ conv.weight.flatten(1).mH, out, atol=1e-5)


def test_degenerate_covariance_is_reported():
    model = mlp(20, 30, 5)
    x = gaussian(200, 3, dtype=torch.float32) @ gaussian(3, 20, dtype=torch.float32)
    report = ru.init.low_rank_(model, rank=5, layers="0", calibration=x)
    assert "degenerate covariance" in report["0"].notes[0] and "17 of" in report["0"].notes[0]
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert report["0"].held_out[1] < 1e-8
    clean = ru.init.low_rank_(
        mlp(20, 30, 5), rank=5, layers="0", calibration=gaussian(200, 20).float()
    )
    assert clean["0"].notes == ()


def test_ranks():
    def ranks(**options) -> dict[str, int]:
        report = ru.init.low_rank_(mlp(40, 60, 50, 10), **options)
        return {name: layer.rank for name, layer in report.items()}

    assert ranks(rank=3) == {"0": 3, "2": 3, "4": 3}
    assert ranks(rank=0.1) == {"0": 4, "2": 5, "4": 1}
    assert ranks(rank={"[02]": 2, "4": 0.5}) == {"0": 2, "2": 2, "4": 5}
    assert ranks(rank={"2": 7}) == {"2": 7}
    assert ranks(rank=1, layers=["0", "4"]) == {"0": 1, "4": 1}
    named = ru.init.low_rank_(net(), rank={"grouped": 2, "flat": 3})
    assert list(named) == ["flat"] and "grouped" in named.skipped


def test_nothing_saved_is_left_alone():
    model = mlp(40, 60, 50, 10)
    before = copy.deepcopy(model)
    report = ru.init.low_rank_(model, rank=24)
    assert list(report) == ["2"]
    assert "0" in report.skipped and "would save no parameter" in report.skipped["4"]
    assert torch.equal(model[0].weight, before[0].weight)
    full = ru.init.low_rank_(mlp(40, 60), rank=1.0)
    assert len(full) == 0 and "would save no parameter" in full.skipped["0"]


@pytest.mark.parametrize("calibrated", [False, True])
def test_budgets(calibrated):
    x = gaussian(300, 40, dtype=torch.float32) if calibrated else None
    dense = 40 * 60 + 60 * 50 + 50 * 10
    used = []
    for budget in (0.15, 0.3, 0.6):
        model = mlp(40, 60, 50, 10)
        ru.init.low_rank_(model, rank=ru.init.Budget(parameters=budget), calibration=x, refine=0)
        left = sum(p.numel() for p in model.parameters() if p.ndim == 2)
        assert left <= budget * dense
        assert left >= 0.75 * budget * dense
        used.append(left)
    means = []
    for goal in (0.7, 0.3):
        report = ru.init.low_rank_(
            mlp(40, 60, 50, 10), rank=ru.init.Budget(error=goal), calibration=x, refine=0
        )
        curves = [layer.curve[layer.rank][1] for layer in report.values()]
        means.append(sum(curves) / 3)  # a layer that stays dense adds nothing
        assert means[-1] <= goal
    assert means[0] > 0.5 * 0.7
    number = ru.init.low_rank_(mlp(40, 60, 50, 10), rank=ru.init.Budget(parameters=900))
    assert number.parameters[1] <= 900


def test_a_budget_counts_every_matched_weight():
    model = mlp(40, 60, 50, 1)  # the last layer has no rank that saves anything
    dense = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    budget = ru.init.Budget(parameters=0.2)
    report = ru.init.low_rank_(model, rank=budget, orthonormal=True)
    assert "would save no parameter" in report.skipped["4"]
    left = sum(p.numel() for name, p in model.named_parameters() if "bias" not in name)
    assert 0.15 * dense <= left <= 0.2 * dense


def test_draw_is_the_initial_distribution():
    model = mlp(64, 96, 8)
    state = torch.get_rng_state()
    report = ru.init.low_rank_(model, rank=4, layers="0", draw="kaiming_normal", seed=3)
    again = mlp(64, 96, 8)
    ru.init.low_rank_(again, rank=4, layers="0", draw="kaiming_normal", seed=3)
    other = mlp(64, 96, 8)
    ru.init.low_rank_(other, rank=4, layers="0", draw="kaiming_normal", seed=4)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(model[0].weight, again[0].weight)
    assert not torch.equal(model[0].weight, other[0].weight)
    assert report["0"].gaussian[1] < report["0"].gaussian[0]
    known = gaussian(96, 64, dtype=torch.float32)
    ru.init.low_rank_(again, rank=2, layers="2", draw="default")
    drawn = mlp(64, 96)
    ru.init.low_rank_(drawn, rank=4, draw=lambda w: w.copy_(known), activation="relu")
    assert function_error(known, drawn[0].weight.detach()) < 0.9
    with pytest.raises(ValueError, match="is no initialiser"):
        ru.init.low_rank_(mlp(8, 8), rank=1, draw="gaussian")


def test_a_drawn_layer_that_stays_keeps_its_weight():
    model = mlp(8, 9, 5)
    before = snapshot(model)
    report = ru.init.low_rank_(model, rank=8, draw="kaiming_normal")
    assert not report
    assert_unchanged(model, before)


def test_orthonormal_factors_train():
    model = mlp(20, 30, 5)
    ru.init.low_rank_(model, rank=3, layers="0", orthonormal=True)
    plain = mlp(20, 30, 5)
    ru.init.low_rank_(plain, rank=3, layers="0")
    assert torch.allclose(model[0].weight, plain[0].weight, atol=1e-6)
    optimizer = ru.optim.ProjUNNT(model.parameters(), lr=1e-2, rank=2)
    model(gaussian(4, 20, dtype=torch.float32)).sum().backward()
    optimizer.step()
    assert_on_manifold(model[0].A)


def test_a_shared_module_is_replaced_everywhere():
    shared = nn.Linear(12, 12)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU())
    report = ru.init.low_rank_(model, rank=2, layers="2")
    assert model[0] is model[2] and isinstance(model[0], ru.nn.LowRankLinear)
    assert list(report) == ["0"] and report["0"].activation == "relu"


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        return functional.gelu(self.b(x), approximate="tanh")


class Untraceable(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.a(x)) if x.sum() > 0 else self.b(x)


def test_tracing():
    report = ru.init.low_rank_(Branching(), rank=1)
    assert [layer.activation for layer in report.values()] == ["identity", "gelu"]
    assert "an addition follows it" in report["a"].notes[0]
    model = Untraceable()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"after 'a' is unknown: GraphError.*activation="):
        ru.init.low_rank_(model, rank=1)
    assert_unchanged(model, before)
    report = ru.init.low_rank_(model, rank=1, activation={"a": "relu", "b": nn.LeakyReLU(0.1)})
    assert [layer.activation for layer in report.values()] == ["relu", "leaky_relu(0.1)"]
    spectral = ru.init.low_rank_(Untraceable(), rank=1, method="spectral")
    assert "cannot read" in spectral["a"].notes[0]


def test_layers_that_are_skipped():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(30, 16), nn.Linear(16, 30, bias=False)
            self.out.weight = self.embed.weight
            self.up = nn.ConvTranspose2d(4, 4, 3, groups=2)
            self.one = nn.Conv1d(4, 4, 3, groups=4)
            self.twin, self.bound = nn.Linear(16, 16), nn.Linear(16, 16)
            self.twin.bias = self.bound.bias
            self.hooked, self.attention = nn.Linear(16, 16), nn.MultiheadAttention(16, 2)
            self.hooked.register_forward_hook(lambda *_: None)
            self.lazy = nn.LazyLinear(4)
            self.parametrized = nn.utils.parametrizations.orthogonal(nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x

    model = Mixed()
    report = ru.init.low_rank_(model, rank=2)
    assert len(report) == 0
    for name, reason in {
        "out": "shared with 'embed.weight'",
        "twin": "bias is shared with 'bound.bias'",
        "up": "grouped",
        "one": "depthwise",
        "hooked": "hooks",
        "attention.out_proj": "NonDynamicallyQuantizableLinear",
        "lazy": "Lazy",
        "parametrized": "Parametrized",
    }.items():
        assert reason in report.skipped[name], name
    with pytest.raises(ValueError, match="nothing to draw"):
        report.plot("nowhere.png")


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    report = ru.init.low_rank_(net(), rank=2)
    report.plot(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize("activation", [nn.GELU, nn.SiLU])
def test_the_default_refines_where_it_pays(activation, monkeypatch):
    from riemann_unn.init.low_rank import problem
    from riemann_unn.linalg.low_rank import data, function

    iterations = []
    for home in (data, function, problem):
        real = function.minimise if home is not data else data.minimise

        def counted(*args, real=real, **kwargs):
            iterations.append(kwargs["iterations"])
            return real(*args, **kwargs)

        monkeypatch.setattr(home, "minimise", counted)

    def solved(rank, calibration, refine=None):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(24, 32), activation())
        iterations.clear()
        return ru.init.low_rank_(model, rank=rank, calibration=calibration, refine=refine)["0"]

    inputs = gaussian(2000, 24, dtype=torch.float32)
    few = solved(8, inputs[:50])
    assert not iterations  # there are too few outputs to fit so many numbers to
    assert few.held_out[1] == solved(8, inputs[:50], 0).held_out[1]
    assert solved(2, None).gaussian[1] == solved(2, None, 0).gaussian[1]
    closed, default = solved(1, inputs, 0), solved(1, inputs)
    assert iterations == [100]
    assert default.held_out[1] < closed.held_out[1]
    asked = solved(2, None, 12)  # explicit ones go on as before
    assert iterations == [12] and asked.gaussian[1] < solved(2, None).gaussian[1]
