"""Loud: every bad input is a typed error that names the parameter, with nothing changed."""

from __future__ import annotations

import copy

import geoopt
import pytest
import torch
from torch import nn

import riemann_unn as ru
from tests.support import assert_on_manifold, gaussian, parameter, point

CLASSES = [ru.optim.ProjUNNT, ru.optim.ProjUNND]
BASES = [(torch.optim.SGD, {}), (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adam, {})]


def ready(base=torch.optim.SGD, options=None, **kwargs):
    """Three parameters, two of them tagged, after two good steps, with good gradients."""
    named = {"first": parameter(6, 6), "second": parameter(6, 6, seed=1)}
    named["free"] = nn.Parameter(gaussian(3, dtype=torch.float32))
    optimizer = ru.optim.ProjUNNT(
        named.items(), lr=0.1, rank=2, base=base, **(options or {}), **kwargs
    )
    for step in range(3):
        for i, p in enumerate(named.values()):
            p.grad = gaussian(*p.shape, dtype=torch.float32, seed=10 * step + i)
        if step < 2:
            optimizer.step()
    return named, optimizer


def frozen(named, optimizer):
    values = {name: p.detach().clone() for name, p in named.items()}
    return values, copy.deepcopy(optimizer.state_dict()["state"])


def assert_unchanged(named, optimizer, before):
    values, state = frozen(named, optimizer)
    for name, value in values.items():
        assert torch.equal(value, before[0][name]), name
    for key, entries in state.items():
        for name, value in entries.items():
            same = before[1][key][name]
            assert torch.equal(value, same) if torch.is_tensor(value) else value == same


@pytest.mark.parametrize(("base", "options"), BASES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_gradients_raise_before_anything_changes(base, options, bad):
    named, optimizer = ready(base, options)
    named["second"].grad[2, 3] = bad
    before = frozen(named, optimizer)
    with pytest.raises(ru.NonFiniteError, match=r"gradient of 'second' holds NaN") as caught:
        optimizer.step()
    assert "'first'" not in str(caught.value) and 'nonfinite="skip"' in str(caught.value)
    assert_unchanged(named, optimizer, before)
    named["second"].grad[2, 3] = 0.0
    optimizer.step()
    assert_on_manifold(named["second"])


@pytest.mark.parametrize(("base", "options"), BASES)
def test_nonfinite_gradients_can_be_skipped_bit_exactly(base, options):
    named, optimizer = ready(base, options, nonfinite="skip")
    twins, twin = ready(base, options)
    named["second"].grad[0, 0] = float("nan")
    kept, state = named["second"].detach().clone(), copy.deepcopy(optimizer.state[named["second"]])
    grad = named["second"].grad
    optimizer.step()
    twins["second"].grad = None
    twin.step()
    assert torch.equal(named["second"], kept)
    assert named["second"].grad is grad
    for key, value in optimizer.state[named["second"]].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(state[key])), key
    for name in ("first", "free"):
        assert torch.equal(named[name], twins[name])


def test_a_finite_gradient_with_a_huge_sum_is_no_error():
    p = parameter(6, 6)
    optimizer = ru.optim.ProjUNNT([p], lr=1e-30)
    p.grad = torch.full_like(p, 3e37)
    assert p.grad.sum().isinf()
    optimizer.step()
    assert_on_manifold(p)


@pytest.mark.parametrize("sketch", ["tangent", "lsi", "column", "svd"])
@pytest.mark.parametrize("rank", [1, 6, None])
def test_displacements_that_overflow(sketch, rank):
    for options in ({}, {"momentum": 0.9}):
        p, q = parameter(6, 6), parameter(5, 4)
        optimizer = ru.optim.ProjUNNT(
            [("p", p), ("q", q)], lr=1e30, rank=rank, sketch=sketch, **options
        )
        p.grad = torch.full_like(p, 1e30)
        q.grad = torch.zeros_like(q)
        kept = p.detach().clone()
        with pytest.raises(ru.NonFiniteError, match=r"'p' overflows.*lower the learning rate"):
            optimizer.step()
        assert torch.equal(p, kept)


@pytest.mark.parametrize("cls", CLASSES)
def test_points_off_their_manifold(cls):
    off = nn.Parameter(point(6, 6, dtype=torch.float32) * 1.05)
    ru.tag_(off, ru.Orthogonal())
    message = (
        r"'w' is .*e-0\d off Orthogonal\(\); call riemann_unn.init.warm_start_ or pass off_man"
    )
    with pytest.raises(ru.OffManifoldError, match=message):
        cls([("w", off)], lr=0.1)
    with pytest.raises(ValueError, match="off Orthogonal"):
        cls([off], lr=0.1)
    nearest = ru.linalg.polar(off.detach())
    optimizer = cls([off], lr=0.1, off_manifold="project")
    assert torch.equal(off, nearest)
    off.grad = gaussian(6, 6, dtype=torch.float32)
    optimizer.step()
    assert_on_manifold(off)


@pytest.mark.parametrize("n", [6, 600])
def test_points_moved_off_between_steps(n):
    p = parameter(n, n)
    optimizer = ru.optim.ProjUNNT([("w", p)], lr=0.1)
    p.grad = gaussian(n, n, dtype=torch.float32)
    optimizer.step()
    with torch.no_grad():
        p.mul_(1.01)
    kept = p.detach().clone()
    with pytest.raises(ru.OffManifoldError, match="'w' is"):
        optimizer.step()
    assert torch.equal(p, kept)
    mended = ru.optim.ProjUNNT([p], lr=0.1, off_manifold="project")
    with torch.no_grad():
        p.mul_(1.01)
    mended.step()
    assert_on_manifold(p)


def test_the_other_determinant_and_weights_with_nan():
    p = nn.Parameter(ru.Orthogonal(det=1).random(4, 4).as_subclass(torch.Tensor).clone())
    ru.tag_(p, ru.Orthogonal(det=-1))
    with pytest.raises(ru.OffManifoldError, match="has the other determinant"):
        ru.optim.ProjUNNT([p], lr=0.1)
    ru.optim.ProjUNNT([p], lr=0.1, off_manifold="project")
    assert torch.linalg.det(p.detach()) < 0
    with torch.no_grad():
        p[0, 0] = float("nan")
    for off_manifold in ("raise", "project"):
        with pytest.raises(ru.OffManifoldError, match="holds NaN or infinity"):
            ru.optim.ProjUNNT([p], lr=0.1, off_manifold=off_manifold)


def test_sparse_gradients():
    table = nn.Embedding(8, 4, sparse=True)
    ru.tag_(table.weight, ru.Stiefel())
    ru.init.warm_start_(table)
    optimizer = ru.optim.ProjUNNT(table.named_parameters(), lr=0.1)
    table(torch.tensor([1, 2])).sum().backward()
    kept = table.weight.detach().clone()
    with pytest.raises(ru.ManifoldTypeError, match="'weight' has a sparse gradient"):
        optimizer.step()
    assert torch.equal(table.weight, kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0 must be an int of at least 1"),
        ({"rank": -3}, "rank=-3 must be"),
        ({"rank": 1.5}, "rank=1.5 must be"),
        ({"rank": True}, "rank=True must be"),
        ({"sketch": "magic"}, "sketch='magic' is unknown; choose from"),
        ({"nonfinite": "ignore"}, "nonfinite='ignore' is unknown"),
        ({"off_manifold": "ignore"}, "off_manifold='ignore' is unknown"),
        ({"lr": -1.0}, "Invalid learning rate"),
    ],
)
@pytest.mark.parametrize("cls", CLASSES)
def test_bad_options(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls([parameter(4, 4)], **({"lr": 0.1} | options))


def test_options_of_neither_optimizer_nor_base():
    with pytest.raises(TypeError, match="momentun"):
        ru.optim.ProjUNNT([parameter(4, 4)], lr=0.1, momentun=0.9)
    with pytest.raises(TypeError, match="lr"):
        ru.optim.ProjUNNT([parameter(4, 4)])


def test_an_optimizer_without_tagged_parameters():
    model = nn.Linear(4, 4)
    with pytest.raises(ru.ManifoldError, match=r"no parameter is tagged.*riemann_unn\.tag_"):
        ru.optim.ProjUNNT(model.parameters(), lr=0.1)
    with pytest.raises(ru.ManifoldError, match="empty parameter list"):
        ru.optim.ProjUNNT([], lr=0.1)
    with pytest.raises(ru.ManifoldTypeError, match="not one tensor"):
        ru.optim.ProjUNNT(parameter(4, 4), lr=0.1)


def test_duplicates():
    p = parameter(4, 4)
    with pytest.raises(ru.ManifoldError, match="parameter number 1 is given twice"):
        ru.optim.ProjUNNT([p, p], lr=0.1)
    with pytest.raises(ru.ManifoldError, match="parameter 'b' is given twice"):
        ru.optim.ProjUNNT([("a", p), ("b", p)], lr=0.1)
    with pytest.raises(ValueError, match="more than one parameter group"):
        ru.optim.ProjUNNT([{"params": [p]}, {"params": [p]}], lr=0.1)


def test_manifolds_of_other_packages_are_not_silently_euclidean():
    other = geoopt.ManifoldParameter(point(4, 4)[0], manifold=geoopt.Sphere())
    with pytest.raises(ru.ManifoldTypeError, match=r"not a manifold of this package"):
        ru.optim.ProjUNNT([parameter(4, 4), other], lr=0.1)
    euclidean = geoopt.ManifoldParameter(point(4, 4))
    ru.optim.ProjUNNT([parameter(4, 4), euclidean], lr=0.1)


def test_a_parameter_that_changed_under_its_tag():
    p = parameter(4, 4)
    optimizer = ru.optim.ProjUNNT([("w", p)], lr=0.1)
    p.data = torch.ones(4, dtype=torch.float32)
    p.grad = torch.ones(4)
    with pytest.raises(ru.ManifoldError, match="'w' is tagged Stiefel"):
        optimizer.step()


def test_names_in_messages_without_named_parameters():
    net = ru.tag_(nn.Sequential(nn.Linear(4, 4)), {"0.weight": ru.Orthogonal()})
    with pytest.raises(ru.OffManifoldError, match=r"^'0.weight' is"):
        ru.optim.ProjUNNT(net.parameters(), lr=0.1)
    p = ru.tag_(nn.Parameter(torch.ones(4, 4)), ru.Orthogonal())
    with pytest.raises(ru.OffManifoldError, match=r"param_groups\[0\]\['params'\]\[0\] of shape"):
        ru.optim.ProjUNNT([p], lr=0.1)
