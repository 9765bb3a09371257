"""Sources whose weights are computed: taken as they are, or refused with the remedy."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import riemann_unn as ru


def of_geotorch(module: nn.Module) -> None:
    pytest.importorskip("geotorch").orthogonal(module, "weight")


COMPUTED = {
    "orthogonal": parametrizations.orthogonal,
    "spectral_norm": parametrizations.spectral_norm,
    "geotorch": of_geotorch,
}
NORMS = {f"dim={dim}": dim for dim in (0, 1, None)}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Conv2d(4, 6, 2))


def target() -> nn.Sequential:
    model = ru.tag_(net(), {"0.weight": ru.Orthogonal(), "2.weight": ru.Stiefel(flatten=True)})
    for p in model.parameters():
        nn.init.zeros_(p)
    return model


def assert_taken(model: nn.Sequential, source: nn.Sequential) -> None:
    for i, manifold in ((0, ru.Orthogonal()), (2, ru.Stiefel(flatten=True))):
        nearest = manifold.projx(source[i].weight.detach())
        torch.testing.assert_close(model[i].weight.detach(), nearest)
    assert torch.equal(model[2].bias, source[2].bias)


@pytest.mark.parametrize("name", COMPUTED)
def test_a_module_is_asked_for_its_weights(name):
    source, model = net(), target()
    COMPUTED[name](source[0])
    before, mode = copy.deepcopy(source.state_dict()), source.training
    ru.init.warm_start_(model, source=source, fold_gain=False)
    assert source.training is mode
    assert all(torch.equal(v, before[k]) for k, v in source.state_dict().items())
    assert_taken(model, source.eval())


@pytest.mark.parametrize("name", COMPUTED)
def test_a_state_that_does_not_determine_a_weight_is_refused(name):
    source, model = net(), target()
    COMPUTED[name](source[0])
    with pytest.raises(ru.ManifoldError, match=r"'0.weight' is parametrized there.*source=") as e:
        ru.init.warm_start_(model, source=source.state_dict())
    assert "remove_parametrizations" in str(e.value) and "lacks" not in str(e.value)
    assert not model[0].weight.any()
    parametrize.remove_parametrizations(source[0], "weight", leave_parametrized=True)
    ru.init.warm_start_(model, source=source.state_dict(), fold_gain=False)
    assert_taken(model, source)


@pytest.mark.parametrize("name", NORMS)
def test_weight_norm_is_determined_by_its_state(name):
    source, model = net(), target()
    for part in (source[0], source[2]):
        parametrizations.weight_norm(part, dim=NORMS[name])
    with torch.no_grad():
        for p in source.parameters():
            p.mul_(1 + torch.rand_like(p))
    state = source.state_dict()
    keys = list(state)
    ru.init.warm_start_(model, source=state, fold_gain=False)
    assert list(state) == keys
    assert_taken(model, source)


def test_two_originals_of_other_shapes_are_no_weight_norm():
    source, model = net(), target()
    state = source.state_dict()
    weight = state.pop("0.weight")
    state |= {f"0.parametrizations.weight.original{i}": weight for i in (0, 1)}
    with pytest.raises(ru.ManifoldError, match="do not determine it"):
        ru.init.warm_start_(model, source=state)


def test_a_model_that_is_parametrized_alike_takes_the_originals():
    source, model = net(), target()
    for one in (source, model):
        parametrizations.spectral_norm(one[0])
    ru.untag_(model[0])
    ru.init.warm_start_(model, source=source.state_dict(), fold_gain=False)
    originals = (m[0].parametrizations.weight.original for m in (model, source))
    assert torch.equal(*originals)
