"""Tags: set in place, all or nothing, kept by whatever torch does to a module, and removed."""

import copy
import io
import pickle
from collections.abc import Callable

import geoopt
import pytest
import torch
from torch import Tensor, nn

import riemann_unn as ru
from tests.support import DTYPES, gaussian

PATTERNS = {"rnn.weight_hh_*": ru.Orthogonal(), "head.weight": ru.Stiefel()}


class Model(nn.Module):
    """A recurrent network with a buffer, and one parameter registered twice."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(3, 6, num_layers=2, batch_first=True)
        self.head = nn.Linear(6, 4)
        self.tied = nn.Linear(6, 4)
        self.tied.weight = self.head.weight
        self.register_buffer("scale", torch.ones(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        out = self.rnn(x)[0]
        return self.head(out) + self.tied(out).relu()


def model(seed: int = 0) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Model()


def tagged() -> Model:
    return ru.tag_(model(), PATTERNS)


def names(module: nn.Module) -> list[str]:
    return [name for name, _ in ru.tagged_parameters(module)]


NAMES = ["rnn.weight_hh_l0", "rnn.weight_hh_l1", "head.weight"]


# One parameter ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trainable", [True, False])
def test_a_parameter_keeps_everything(dtype, trainable):
    p = nn.Parameter(gaussian(4, 4, dtype=dtype), requires_grad=trainable)
    p.grad = torch.ones_like(p) if trainable else None
    values, grad, at, version = p.detach().clone(), p.grad, p.data_ptr(), p._version
    manifold = ru.Unitary() if dtype.is_complex else ru.Orthogonal()
    assert ru.manifold_of(p) is None
    assert ru.tag_(p, manifold) is p
    assert ru.manifold_of(p) is manifold and isinstance(p, geoopt.ManifoldParameter)
    assert isinstance(p, nn.Parameter) and p.is_leaf and p.requires_grad is trainable
    assert p.grad is grad and p.data_ptr() == at and p._version == version
    assert p.dtype == dtype and torch.equal(p, values)
    assert ru.untag_(p) is p
    assert type(p) is nn.Parameter and ru.manifold_of(p) is None and not vars(p)
    assert p.grad is grad and p.requires_grad is trainable and torch.equal(p, values)
    assert ru.untag_(p) is p  # nothing to do


def test_a_second_tag_replaces_the_first():
    p = nn.Parameter(torch.eye(3))
    ru.tag_(p, ru.Orthogonal())
    ru.tag_(p, ru.Stiefel())
    assert ru.manifold_of(p) == ru.Stiefel()
    with pytest.raises(ru.ManifoldError):
        ru.tag_(p, ru.Unitary())
    assert ru.manifold_of(p) == ru.Stiefel()


@pytest.mark.parametrize(
    ("target", "manifold", "words"),
    [
        (nn.Parameter(torch.ones(3, 4)), ru.Orthogonal(), r"\(3, 4\).*square.*Stiefel"),
        (nn.Parameter(torch.ones(3)), ru.Stiefel(), r"\(3,\).*two or more"),
        (nn.Parameter(torch.eye(3)), ru.Unitary(), "float32.*complex"),
        (nn.Parameter(torch.eye(3) * 1j), ru.Orthogonal(), "complex64.*real"),
        (nn.Parameter(torch.eye(3).long(), requires_grad=False), ru.Stiefel(), "int64"),
    ],
)
def test_shapes_and_dtypes_that_are_refused(target, manifold, words):
    with pytest.raises(ru.ManifoldError, match=words) as raised:
        ru.tag_(target, manifold)
    assert repr(manifold) in str(raised.value)
    assert type(target) is nn.Parameter and not vars(target)


@pytest.mark.parametrize(
    ("target", "manifold", "words"),
    [
        (torch.eye(3), ru.Orthogonal(), "Tensor, not a torch.nn.Parameter"),
        (nn.Parameter(torch.eye(3)) * 1, ru.Orthogonal(), "Tensor, not a torch.nn.Parameter"),
        (model().scale, ru.Orthogonal(), "not a torch.nn.Parameter"),
        ("head.weight", ru.Orthogonal(), "str, not a torch.nn.Parameter"),
        (None, ru.Orthogonal(), "NoneType"),
        (nn.Parameter(torch.eye(3)), ru.Orthogonal, "instance such as"),
        (nn.Parameter(torch.eye(3)), geoopt.Stiefel(), "no manifold of this package"),
        (nn.Parameter(torch.eye(3)), None, "no manifold of this package"),
        (nn.Parameter(torch.eye(3)), {"*": ru.Orthogonal()}, "patterns need a module"),
        (model(), ru.Orthogonal(), "dict of name patterns"),
        (model(), {"head.weight": "stiefel"}, "no manifold of this package"),
        (nn.LazyLinear(3), {"weight": ru.Stiefel()}, "'weight' has no shape yet"),
    ],
)
def test_kinds_that_are_refused(target, manifold, words):
    with pytest.raises(ru.ManifoldTypeError, match=words):
        ru.tag_(target, manifold)
    with pytest.raises(TypeError):  # as such it can be caught too
        ru.tag_(target, manifold)


@pytest.mark.parametrize("target", ["head", 1, None])
def test_what_cannot_be_untagged_or_listed(target):
    with pytest.raises(ru.ManifoldTypeError, match=type(target).__name__):
        ru.untag_(target)
    with pytest.raises(ru.ManifoldTypeError, match=type(target).__name__):
        ru.tagged_parameters(target)
    assert ru.manifold_of(target) is None


# Modules and patterns -----------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"rnn.weight_hh_l1": ru.Orthogonal()}, NAMES[1:2]),
        ({"*.weight_hh_*": ru.Orthogonal()}, NAMES[:2]),
        ({"rnn.weight_hh_l[01]": ru.Orthogonal()}, NAMES[:2]),
        ({"rnn.weight_hh_l?": ru.Orthogonal(), "h*.weight": ru.Stiefel()}, NAMES),
        ({"*.weight_hh_l0": ru.Orthogonal(), "*ght_hh_l?": ru.Orthogonal()}, NAMES[:2]),
        ({"tied.weight": ru.Stiefel()}, NAMES[2:]),  # listed by its first name
        ({"tied.weight": ru.Stiefel(), "head.weight": ru.Stiefel()}, NAMES[2:]),
    ],
)
def test_patterns(patterns, expected):
    m = model()
    before = dict(m.named_parameters())
    assert ru.tag_(m, patterns) is m
    assert all(p is before[name] for name, p in m.named_parameters())
    assert names(m) == expected


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        ({"rnn.weight_hh_x*": ru.Orthogonal()}, ["rnn.weight_hh_x*", "rnn.weight_hh_l0"]),
        ({"RNN.weight_hh_*": ru.Orthogonal()}, ["RNN.weight_hh_*", "'tied.bias'"]),
        ({"scale": ru.Orthogonal()}, ["'scale'", "matches no parameter", "head.bias"]),
        ({7: ru.Orthogonal()}, ["7", "matches no parameter"]),
        ({"head.bias": ru.Stiefel()}, ["'head.bias'", "(4,)", "Stiefel()"]),
        ({"rnn.weight_ih_*": ru.Orthogonal()}, ["'rnn.weight_ih_l0'", "(6, 3)", "Orthogonal()"]),
        ({"head.weight": ru.Unitary()}, ["'head.weight'", "Unitary()"]),
        (
            {"rnn.weight_hh_l0": ru.Stiefel(), "*_l0": ru.Orthogonal()},
            ["'rnn.weight_hh_l0'", "Stiefel()", "Orthogonal()"],
        ),
        ({"head.weight": ru.Stiefel(), "tied.weight": ru.Stiefel(flatten=True)}, ["keep one"]),
    ],
)
def test_a_failure_names_both_sides_and_tags_nothing(patterns, words):
    m = ru.tag_(model(), {"rnn.weight_hh_l1": ru.Stiefel()})
    state = {k: v.clone() for k, v in m.state_dict().items()}
    with pytest.raises(ru.ManifoldError) as raised:
        ru.tag_(m, {"rnn.weight_hh_l?": ru.Stiefel(), **patterns})
    assert all(word in str(raised.value) for word in words), raised.value
    assert names(m) == ["rnn.weight_hh_l1"]
    assert type(m.rnn.weight_hh_l0) is nn.Parameter and not vars(m.rnn.weight_hh_l0)
    assert all(torch.equal(v, state[k]) for k, v in m.state_dict().items())


def test_flat_weights_of_recurrent_layers_stay_shared():
    m = tagged()
    for name, flat in zip(m.rnn._flat_weights_names, m.rnn._flat_weights, strict=True):
        assert flat is getattr(m.rnn, name)
    assert sum(ru.manifold_of(p) is not None for p in m.rnn._flat_weights) == 2


def test_untag_module():
    m = tagged()
    ids = [id(p) for p in m.parameters()]
    assert ru.untag_(m) is m
    assert names(m) == [] and all(type(p) is nn.Parameter for p in m.parameters())
    assert [id(p) for p in m.parameters()] == ids


def test_tagged_parameters_can_be_given_to_an_optimizer():
    m = tagged()
    found = ru.tagged_parameters(m)
    assert [name for name, _ in found] == NAMES
    assert found[2][1] is m.tied.weight
    optimizer = torch.optim.SGD(found, lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == NAMES
    torch.optim.SGD([p for _, p in found], lr=0.1)
    assert ru.tagged_parameters(model()) == []


# What torch does to modules -----------------------------------------------------


def saved(m: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(m, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "save": saved,
    "twice": lambda m: saved(copy.deepcopy(m)),
    "average": lambda m: torch.optim.swa_utils.AveragedModel(m).module,
}
CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "float64": lambda m: m.to(torch.float64),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "cpu": lambda m: m.cpu(),
    "share_memory": lambda m: m.share_memory(),
    "eval": lambda m: m.eval(),
    "frozen": lambda m: m.requires_grad_(False),
}


@pytest.mark.parametrize("name", [*COPIES, *CHANGES])
def test_tags_survive(name):
    m = tagged()
    m.rnn.weight_hh_l0.requires_grad_(False)
    got = {**COPIES, **CHANGES}[name](m)
    assert (got is m) == (name in CHANGES)
    assert names(got) == NAMES
    assert [ru.manifold_of(p) for _, p in ru.tagged_parameters(got)] == [
        ru.Orthogonal(),
        ru.Orthogonal(),
        ru.Stiefel(),
    ]
    assert all(type(p) is geoopt.ManifoldParameter for _, p in ru.tagged_parameters(got))
    assert got.tied.weight is got.head.weight
    assert got.rnn._flat_weights[1] is got.rnn.weight_hh_l0
    assert not got.rnn.weight_hh_l0.requires_grad
    assert got.rnn.weight_hh_l1.requires_grad == (name != "frozen")
    assert type(got.head.bias) is nn.Parameter
    if name in COPIES:
        for p, q in zip(m.parameters(), got.parameters(), strict=True):
            assert torch.equal(p, q) and p.data_ptr() != q.data_ptr()
        with torch.no_grad():
            got.head.weight.zero_()
        assert m.head.weight.any()


def test_a_plain_attribute_would_not_survive():
    m = model()
    m.head.weight.manifold = ru.Stiefel()
    assert ru.manifold_of(copy.deepcopy(m).head.weight) is None


@pytest.mark.parametrize("source", [model, tagged])
@pytest.mark.parametrize("target", [model, tagged])
def test_state_dicts_load_either_way(source, target):
    a, b = source(), target()
    with torch.no_grad():
        for p in b.parameters():
            p.zero_()
    file = io.BytesIO()
    torch.save(a.state_dict(), file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert all(type(v) is Tensor for v in state.values())
    b.load_state_dict(state)
    assert names(b) == (NAMES if target is tagged else [])
    assert all(torch.equal(v, a.state_dict()[k]) for k, v in b.state_dict().items())
    c = target()
    c.load_state_dict(state, assign=False, strict=True)
    assert names(c) == names(b)


def gradients(m: nn.Module) -> list[Tensor]:
    x = gaussian(2, 5, 3, dtype=torch.float32, seed=1)
    out = m(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in m.parameters())]


@pytest.mark.parametrize("compiled", [False, True])
def test_forward_and_backward_are_bit_equal_to_untagged(compiled):
    m = tagged()
    run = torch.compile(m, backend="eager") if compiled else m
    want, got = gradients(model()), gradients(run)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert all(type(g) is Tensor for g in got)
    assert names(m) == NAMES
    assert [n.removeprefix("_orig_mod.") for n in names(run)] == NAMES


def test_tools_of_torch_take_tagged_models():
    m = tagged()
    vector = nn.utils.parameters_to_vector(m.parameters())
    assert torch.equal(vector, nn.utils.parameters_to_vector(model().parameters()))
    nn.utils.vector_to_parameters(2 * vector, m.parameters())
    assert torch.equal(m.head.weight, 2 * model().head.weight)
    assert names(m) == NAMES
    gradients(m)
    assert float(nn.utils.clip_grad_norm_(m.parameters(), 1.0)) > 1
    x = torch.ones(1, 2, 3)
    doubled = {name: 0.5 * p.detach() for name, p in m.named_parameters()}
    assert torch.equal(torch.func.functional_call(m, doubled, (x,)), model()(x))


@pytest.mark.parametrize("as_parameters", [False, True])
def test_tags_outlive_load_state_dict_with_assign(as_parameters):
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    ru.tag_(model, {"0.weight": ru.Orthogonal(), "1.0.weight": ru.Stiefel()})
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model]
    values = {k: torch.randn_like(v) for k, v in model.state_dict().items()}
    if as_parameters:
        values = {k: nn.Parameter(v) for k, v in values.items()}
    given = dict(values)
    for copied in copies:
        old = copied[0].weight
        copied.load_state_dict(values, assign=True)
        assert copied[0].weight is not old
        assert ru.manifold_of(copied[0].weight) == ru.Orthogonal()
        assert ru.manifold_of(copied[1][0].weight) == ru.Stiefel()
        assert ru.manifold_of(copied[1][1].weight) is None
        assert torch.equal(copied[0].weight, values["0.weight"])
        ru.init.warm_start_(copied)
        ru.optim.ProjUNNT(copied.parameters(), lr=0.1)
        with pytest.raises(RuntimeError, match="size mismatch"):
            copied.load_state_dict({**given, "0.weight": torch.ones(3, 3)}, assign=True)
    assert all(values[k] is v and ru.manifold_of(v) is None for k, v in given.items())
