"""Modules remember what was tagged in them, and whoever meets an untagged tensor there raises."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import warnings
import weakref

import geoopt
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import riemann_unn as ru
from riemann_unn.tagging import foreign_optimizers, memory
from tests.support import gaussian, parameter, point

COPIES = {
    "itself": lambda m: m,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "average": lambda m: torch.optim.swa_utils.AveragedModel(m).module,
}
AGAIN = r"call riemann_unn\.tag_ again"


def net(device: str = "cpu") -> nn.Sequential:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4), nn.Linear(4, 2))
    return ru.tag_(model.to(device), {"0.0.weight": ru.Orthogonal(), "1.weight": ru.Stiefel()})


def ready() -> nn.Sequential:
    model = net()
    ru.init.warm_start_(model)
    return model


def assign(model):
    model[0][0].weight = nn.Parameter(model[0][0].weight.detach().clone())


def replace_module(model):
    model[0] = nn.Sequential(nn.Linear(4, 4))


def swap(model):
    torch.utils.swap_tensors(model[0][0].weight, nn.Parameter(torch.eye(4)))


def overwrite(model):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model[0].double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def to_meta(model):
    model[0].to("meta")


LOSSES = {
    assign: rf"{AGAIN} after the call that replaced it",
    replace_module: AGAIN,
    swap: AGAIN,
    overwrite: AGAIN,
    to_meta: rf"{AGAIN} after \.to\('meta'\)",
}


@pytest.mark.parametrize("copier", COPIES)
@pytest.mark.parametrize("lose", LOSSES, ids=lambda f: f.__name__)
def test_everybody_who_meets_the_replacement_raises(lose, copier):
    original = ready()
    model = COPIES[copier](original)
    lose(model)
    match = r"^'0\.0\.weight' of Linear was tagged Orthogonal\(\) and is now.*" + LOSSES[lose]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    meet = [
        lambda: ru.tagged_parameters(model),
        lambda: ru.orthogonality_error(model),
        lambda: ru.init.warm_start_(model),
        lambda: ru.optim.ProjUNNT(model.parameters(), lr=0.1),
        lambda: ru.optim.ProjUNNT(model.named_parameters(), lr=0.1),
        lambda: ru.optim.Cayley([{"params": [p]} for p in model.parameters()], lr=0.1),
        lambda: ru.Monitor(torch.optim.SGD(model.parameters(), lr=0.1)),
        lambda: ru.optim.ProjUNNT([model[1].weight], lr=0.1).add_param_group(
            {"params": [model[0][0].weight]}
        ),
    ]
    for run in meet:
        with pytest.raises(ru.LostTagError, match=match):
            run()
    if lose is not to_meta:
        assert all(torch.equal(value, state[k]) for k, value in model.state_dict().items())
    if copier != "itself":  # whose own tags are there
        assert len(ru.tagged_parameters(original)) == 2
    # Seen from a module above, and from the module that owns it.
    with pytest.raises(ru.LostTagError, match=r"^'0\.0\.0\.weight'"):
        ru.tagged_parameters(nn.Sequential(model))
    if lose is not replace_module:
        with pytest.raises(ru.LostTagError, match=r"^'weight' of Linear"):
            ru.orthogonality_error(model[0][0])
    # The remedies.
    if lose is not to_meta:
        ru.tag_(model, {"0.0.weight": ru.Orthogonal()})
        assert len(ru.tagged_parameters(model)) == 2
        ru.optim.ProjUNNT(model.parameters(), lr=0.1, off_manifold="project")


def test_to_empty_names_itself():
    model = net("meta")
    assert len(ru.tagged_parameters(model)) == 2
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(gaussian(*p.shape))
    match = rf"'0.0.weight'.*\(so have '1.weight'\); {AGAIN} after to_empty"
    for run in (ru.tagged_parameters, lambda m: ru.optim.ProjUNNT(m.parameters(), lr=0.1)):
        with pytest.raises(ru.LostTagError, match=match):
            run(model)
    ru.tag_(model, {"0.0.weight": ru.Orthogonal(), "1.weight": ru.Stiefel()})
    ru.init.warm_start_(model)
    ru.optim.ProjUNNT(model.parameters(), lr=0.1)
    # Within a device the parameters stay.
    model.to_empty(device="cpu")
    assert len(ru.tagged_parameters(model)) == 2


def test_layers_that_tag_their_own_remember_too():
    for layer in (ru.nn.OrthogonalRNN(2, 4), ru.nn.CircularConv1d(2, 2, 3)):
        ((name, p),) = ru.tagged_parameters(layer)
        setattr(layer, name, nn.Parameter(p.detach().clone()))
        with pytest.raises(ru.LostTagError, match=rf"{name!r} of {type(layer).__name__}"):
            ru.optim.ProjUNNT(layer.parameters(), lr=0.1)


def test_load_state_dict_with_assign_keeps_the_tags_and_the_memory():
    model = ready()
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    ru.optim.ProjUNNT(model.parameters(), lr=0.1)
    assign(model)
    with pytest.raises(ru.LostTagError):
        ru.tagged_parameters(model)


@pytest.mark.parametrize("copier", COPIES)
@pytest.mark.parametrize(
    "untag",
    [
        lambda m: ru.untag_(m[0][0].weight),
        lambda m: ru.untag_(m[0]),
        lambda m: (assign(m), ru.untag_(m[0][0].weight)),
        lambda m: (replace_module(m), ru.untag_(m[0])),
        lambda m: (ru.untag_(m[0]), assign(m)),
    ],
)
def test_what_was_untagged_is_forgotten(untag, copier):
    model = COPIES[copier](ready())
    untag(model)
    assert [name for name, _ in ru.tagged_parameters(model)] == ["1.weight"]
    ru.optim.ProjUNNT(model.parameters(), lr=0.1)
    assert len(ru.orthogonality_error(model)) == 1
    ru.untag_(model)
    assert ru.tagged_parameters(model) == []


def test_parameters_that_are_gone_or_have_moved_next_door_are_not_lost():
    model = ready()
    model[0] = nn.Identity()
    assert [name for name, _ in ru.tagged_parameters(model)] == ["1.weight"]
    torch.nn.utils.parametrize.register_parametrization(model[1], "weight", nn.Identity())
    (name,) = [name for name, _ in ru.tagged_parameters(model)]
    assert name == "1.parametrizations.weight.original"
    model = ready()
    prune.identity(model[1], "weight")
    assert "1.weight_orig" in [name for name, _ in ru.tagged_parameters(model)]


def test_tensors_that_are_no_parameters_any_more():
    model = ready()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(model[1])
        with pytest.raises(ru.LostTagError, match=r"'1.weight' of Linear .* no parameter any more"):
            ru.tagged_parameters(model)
        if "fbgemm" not in torch.backends.quantized.supported_engines:
            pytest.skip("this build of torch cannot quantise")
        quantised = torch.ao.quantization.quantize_dynamic(ready(), {nn.Linear})
    with pytest.raises(ru.LostTagError, match=r"'0.0.weight' of Linear .*such as quantisation"):
        ru.orthogonality_error(quantised)
    with pytest.raises(ru.LostTagError):
        ru.tagged_parameters(quantised)


def test_memory_keeps_nothing_alive_and_dies_with_its_module():
    gc.collect()
    count = len(memory._memories)
    model = net()
    assert len(memory._memories) == count + 3  # of the whole and of two owners
    watch = [weakref.ref(x) for x in (model, model[0][0])]
    gone = weakref.ref(model[0][0].weight)
    assign(model)
    assert gone() is None
    del model  # by reference counts alone
    assert [ref() for ref in watch] == [None, None]
    assert len(memory._memories) == count


def test_state_dicts_and_compiled_models_do_not_show_it():
    model = ready()
    assert set(model.state_dict()) == {
        f"{name}.{kind}" for name in ("0.0", "1", "2") for kind in ("weight", "bias")
    }
    compiled = torch.compile(model, backend="eager")
    compiled(torch.ones(1, 4))
    assert len(ru.tagged_parameters(compiled)) == 2
    program = torch.export.export(model, (torch.ones(1, 4),))
    assert program.module()(torch.ones(1, 4)).shape == (1, 2)


def test_parameters_tagged_alone_are_remembered_by_no_module():
    layer = nn.Linear(4, 4)
    ru.tag_(layer.weight, ru.Orthogonal())
    ru.init.warm_start_(layer.weight)
    layer.weight = nn.Parameter(torch.eye(4))
    assert ru.tagged_parameters(layer) == []  # as the documentation says


# Optimizers that know no tags ---------------------------------------------------------


@pytest.fixture
def unwarned(monkeypatch):
    monkeypatch.setattr(foreign_optimizers, "_has_warned", False)
    foreign_optimizers._checked.clear()


def step(optimizer, p):
    p.grad = gaussian(*p.shape, dtype=p.dtype)
    optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad])
def test_an_optimizer_of_torch_that_is_given_a_tagged_parameter_is_warned_of_once(kind, unwarned):
    match = rf"torch.optim.{kind.__name__} was given 'w', which is tagged Stiefel\(\).*base=torch"
    p = parameter(4, 4)
    optimizer = kind([("w", p)], lr=0.1)
    with pytest.warns(UserWarning, match=match) as caught:
        step(optimizer, p)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(optimizer, p)
        step(kind([p], lr=0.1), p)


def test_where_warnings_are_errors_every_step_raises_and_nothing_moves(unwarned):
    p = parameter(4, 4)
    kept = p.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(UserWarning, match="trains it unconstrained"):
                step(torch.optim.SGD([p], lr=0.1), p)
    assert torch.equal(p, kept)


def test_whom_no_warning_is_given_of(unwarned):
    p = parameter(4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for base in (torch.optim.SGD, torch.optim.Adam):
            step(ru.optim.ProjUNNT([p], lr=0.1, base=base), p)
        step(geoopt.optim.RiemannianSGD([p], lr=0.1), p)
        step(geoopt.optim.RiemannianAdam([p], lr=0.1), p)
        free = nn.Parameter(point(4, 4))
        adam = torch.optim.Adam([free])
        step(adam, free)
        p.requires_grad_(False)
        step(torch.optim.Adam([p, free]), free)
    ru.tag_(free, ru.Stiefel())  # after the first step
    with pytest.warns(UserWarning, match="is tagged"):
        step(adam, free)


def test_a_process_that_reads_its_first_tags_from_a_file_warns(tmp_path):
    file = io.BytesIO()
    torch.save(ready(), file)
    (tmp_path / "model.pt").write_bytes(file.getvalue())
    script = (
        "import sys, torch\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "optimizer = torch.optim.Adam(model.parameters())\n"
        "model(torch.ones(1, 4)).sum().backward()\n"
        "optimizer.step()\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "default", "-c", script, str(tmp_path / "model.pt")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stderr.count("torch.optim.Adam was given '0.0.weight'") <= 1
    assert run.stderr.count("torch.optim.Adam was given") == 1
