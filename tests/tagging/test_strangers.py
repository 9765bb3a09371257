"""Tags met half way: geoopt's own parameters, computed weights, copies that torch makes."""

from __future__ import annotations

import copy
import io
import pickle

import geoopt
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import riemann_unn as ru
from tests.support import assert_on_manifold

# geoopt's own parameters -----------------------------------------------------------

OWN = [geoopt.Stiefel(), geoopt.EuclideanStiefel(), geoopt.CanonicalStiefel()]
OWN += [geoopt.EuclideanStiefelExact()]


def own(manifold: geoopt.Stiefel) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(3, 6, bias=False).double()
    point = manifold.random(6, 3, dtype=torch.float64)
    model.weight = geoopt.ManifoldParameter(point, manifold=manifold)
    return model


@pytest.mark.parametrize("manifold", OWN, ids=lambda m: type(m).__name__)
def test_geoopts_stiefel_parameters_count_as_tagged(manifold):
    model = own(manifold)
    p = model.weight
    assert ru.manifold_of(p) == ru.Stiefel() and p.manifold is manifold
    assert ru.tagged_parameters(model) == [("weight", p)]
    assert list(ru.orthogonality_error(model)) == ["weight"]
    assert len(ru.param_groups(model, lr=0.1)) == 1
    with torch.no_grad():
        p.mul_(1.5)
    report = ru.init.warm_start_(model)
    assert report["weight"].gain == pytest.approx(1.5)
    assert_on_manifold(p)
    for optimizer in (
        ru.optim.ProjUNNT(model.parameters(), lr=0.1),
        geoopt.optim.RiemannianSGD(model.parameters(), lr=0.1),
    ):
        monitor = ru.Monitor(optimizer)
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert max(h[0]["error"] for h in monitor.history.values()) < 1e-14
    assert p.manifold is manifold and model.weight is p
    ru.untag_(model)
    assert ru.manifold_of(p) is None and type(p) is nn.Parameter


@pytest.mark.parametrize("manifold", [geoopt.Sphere(), geoopt.Euclidean(), geoopt.Lorentz()])
def test_geoopts_other_manifolds_do_not(manifold):
    p = nn.Parameter(torch.eye(3))
    p.manifold = manifold
    assert ru.manifold_of(p) is None


# Weights that are computed -------------------------------------------------------------


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


def pruned(module: nn.Module) -> None:
    with torch.random.fork_rng():
        prune.random_unstructured(module, "weight", 0.25)


def of_geotorch(module: nn.Module) -> None:
    pytest.importorskip("geotorch").orthogonal(module, "weight")


NEWER = {
    "Orthogonal": parametrizations.orthogonal,
    "WeightNorm": parametrizations.weight_norm,
    "SpectralNorm": parametrizations.spectral_norm,
    "Stiefel": of_geotorch,
}


@pytest.mark.parametrize("name", NEWER)
def test_a_parametrized_weight_is_told_and_the_remedy_keeps_it(name):
    model = net()
    NEWER[name](model[0])
    with pytest.raises(ru.ManifoldError, match=f"'0.weight', .* parametrized by {name}") as raised:
        ru.tag_(model, {"0.weight": ru.Orthogonal()})
    call = str(raised.value).split("call ")[1].split(", which keeps")[0]
    weight = model[0].weight.detach().clone()
    eval(call, {"torch": torch, "model": model})  # as it says
    torch.testing.assert_close(model[0].weight.detach(), weight)
    ru.tag_(model, {"0.weight": ru.Orthogonal()})
    ru.init.warm_start_(model)
    ru.optim.ProjUNNT(model.parameters(), lr=0.1)


@pytest.mark.parametrize("pattern", ["*.weight", "*weight*", "?.*weight"])
def test_a_pattern_that_skips_computed_weights_says_so(pattern):
    model = net()
    parametrizations.weight_norm(model[0])
    with pytest.warns(UserWarning, match=r"'0.weight', .*WeightNorm.*the others"):
        ru.tag_(model, {pattern: ru.Orthogonal()})
    assert [name for name, _ in ru.tagged_parameters(model)] == ["2.weight"]
    with pytest.raises(ru.ManifoldError, match=r"so are '2\.weight'"):
        parametrizations.weight_norm(ru.untag_(model)[2])
        ru.tag_(model, {pattern: ru.Orthogonal()})


def test_an_original_is_tagged_only_by_its_own_name():
    model = net()
    parametrizations.spectral_norm(model[0])
    ru.tag_(model, {"0.parametrizations.weight.original": ru.Orthogonal()})
    assert [n for n, _ in ru.tagged_parameters(model)] == ["0.parametrizations.weight.original"]


@pytest.mark.parametrize(
    ("function", "remedy"),
    [
        (nn.utils.weight_norm, "remove_weight_norm"),
        (nn.utils.spectral_norm, "remove_spectral_norm"),
        (pruned, "prune.remove"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_the_older_functions_are_told_too(function, remedy):
    model = net()
    function(model[0])
    model.eval()(torch.ones(1, 4))  # spectral_norm computes it there
    with pytest.raises(ru.ManifoldError, match=remedy) as raised:
        ru.tag_(model, {"0.weight": ru.Orthogonal()})
    weight = model[0].weight.detach().clone()
    call = str(raised.value).split("call ")[1].split(", and tag it")[0]
    eval(call, {"torch": torch, "model": model})
    torch.testing.assert_close(model[0].weight.detach(), weight)
    ru.tag_(model, {"0.weight": ru.Orthogonal()})


def test_a_computed_weight_itself_is_no_parameter():
    model = net()
    parametrizations.orthogonal(model[0])
    with pytest.raises(ru.ManifoldTypeError, match="remove_parametrizations"):
        ru.tag_(model[0].weight, ru.Orthogonal())


def test_a_tag_outlives_a_parametrization_and_its_removal():
    model = ru.tag_(net(), {"0.weight": ru.Orthogonal()})
    parametrizations.spectral_norm(model[0])
    assert [n for n, _ in ru.tagged_parameters(model)] == ["0.parametrizations.weight.original"]
    parametrize.remove_parametrizations(model[0], "weight")
    assert [n for n, _ in ru.tagged_parameters(model)] == ["0.weight"]


# What torch makes of tagged parameters ----------------------------------------------------


def tagged() -> nn.Sequential:
    model = ru.tag_(net(), {"0.weight": ru.Orthogonal(blocks=1)})
    ru.init.warm_start_(model)
    return model


def test_a_parameter_of_a_tagged_one_is_refused_by_torch_and_made_of_its_values():
    model = tagged()
    p = model[0].weight
    with pytest.raises(RuntimeError, match="ManifoldParameter requires that detach"):
        nn.Parameter(p)
    model[0].weight = ru.tag_(nn.Parameter(p.detach()), ru.manifold_of(p))
    assert [n for n, _ in ru.tagged_parameters(model)] == ["0.weight"]
    assert ru.manifold_of(copy.deepcopy(p)) == ru.Orthogonal()


def test_weight_norm_on_a_tagged_weight_is_refused_and_changes_nothing():
    model = tagged()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="ManifoldParameter"):
        parametrizations.weight_norm(model[0])
    assert model.state_dict().keys() == before.keys()
    assert [n for n, _ in ru.tagged_parameters(model)] == ["0.weight"]
    parametrizations.weight_norm(ru.untag_(model)[0])  # the remedy
    assert torch.allclose(model[0].weight, before["0.weight"])


def test_states_are_loaded_with_weights_only_and_modules_are_not():
    model, file = tagged(), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = ru.tag_(net(), {"0.weight": ru.Orthogonal()})
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh[0].weight, model[0].weight)
    whole = io.BytesIO()
    torch.save(model, whole)
    whole.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(whole, weights_only=True)
    whole.seek(0)
    again = torch.load(whole, weights_only=False)
    assert [n for n, _ in ru.tagged_parameters(again)] == ["0.weight"]


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_batch(strict):
    model = tagged().eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(
        model, (torch.randn(3, 4),), dynamic_shapes=({0: batch},), strict=strict
    )
    x: Tensor = torch.randn(7, 4)
    assert torch.equal(program.module()(x), model(x))
    assert "0.weight" in program.state_dict
