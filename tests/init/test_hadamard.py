"""Hadamard matrices in parameters: on their manifolds, flat, seeded, all or nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import riemann_unn as ru
from tests.support import REAL, assert_on_manifold

POINTS = [
    (ru.Orthogonal(), (12, 12), torch.float64),
    (ru.Orthogonal(), (1, 1), torch.float32),
    (ru.Orthogonal(), (3, 20, 20), torch.float32),
    (ru.Orthogonal(blocks=4), (32, 8), torch.float64),
    (ru.Unitary(), (28, 28), torch.complex64),
    (ru.Stiefel(), (12, 5), torch.float32),
    (ru.Stiefel(), (2, 5, 12), torch.complex128),
    (ru.Stiefel(flatten=True), (4, 3, 2, 2), torch.float64),
    (ru.Stiefel(blocks=(1, 4)), (20, 16), torch.float64),
]


def tagged(manifold, shape, dtype) -> nn.Parameter:
    return ru.tag_(nn.Parameter(torch.zeros(shape, dtype=dtype)), manifold)


@pytest.mark.parametrize(("manifold", "shape", "dtype"), POINTS)
def test_points_are_flat(manifold, shape, dtype):
    p = tagged(manifold, shape, dtype)
    state = torch.get_rng_state()
    assert ru.init.hadamard_(p, seed=3) is p
    assert torch.equal(state, torch.get_rng_state())
    assert_on_manifold(p)
    matrices = manifold.to_matrices(p.detach())
    size = matrices.shape[-2] ** -0.5
    torch.testing.assert_close(p.detach().abs(), torch.full(shape, size, dtype=dtype.to_real()))
    again, other = tagged(manifold, shape, dtype), tagged(manifold, shape, dtype)
    assert torch.equal(ru.init.hadamard_(again, seed=3), p)
    assert p.numel() == 1 or not torch.equal(ru.init.hadamard_(other, seed=4), p)
    if matrices.ndim > 2:  # signs of their own
        flat = matrices.flatten(0, -3)
        assert not torch.equal(flat[0], flat[-1])


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("det", [1, -1])
@pytest.mark.parametrize("n", [1, 2, 4, 12, 36])
def test_determinants_are_those_of_the_tag(n, det, dtype):
    p = tagged(ru.Orthogonal(det=det), (10, n, n), dtype)
    ru.init.hadamard_(p)
    assert torch.equal(torch.linalg.det(p.detach()).round(), torch.full((10,), float(det)).to(p))
    free = ru.init.hadamard_(tagged(ru.Orthogonal(), (40, n, n), dtype))
    assert len(set(torch.linalg.det(free.detach()).round().tolist())) == 2  # the negative control


def test_signs_are_drawn_evenly():
    found = ru.init.hadamard_(torch.zeros(4000, 4, 4, dtype=torch.float64))
    means = found.sign().mean(0).abs()
    assert float(means.max()) < 5 / 4000**0.5


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 12), nn.Linear(12, 7))


def test_a_module_by_its_tags_or_by_a_pattern():
    model = ru.tag_(net(), {"[01].weight": ru.Stiefel()})
    before = copy.deepcopy(model)
    assert ru.init.hadamard_(model, seed=1) is model
    changed = [
        n for n, p in model.named_parameters() if not torch.equal(p, before.get_parameter(n))
    ]
    assert changed == ["0.weight", "1.weight"]
    errors = ru.orthogonality_error(model)
    assert max(map(float, errors.values())) < 1e-6
    ru.optim.ProjUNNT(model.parameters(), lr=0.1)
    plain = net()
    ru.init.hadamard_(plain, pattern="1.weight", seed=2)
    assert float(ru.orthogonality_error(plain[1].weight)) < 1e-6
    assert torch.equal(plain[0].weight, net()[0].weight)


def test_plain_tensors_are_written_as_stiefel_points():
    x = torch.zeros(5, 8)
    assert ru.init.hadamard_(x) is x
    assert_on_manifold(x, ru.Stiefel())
    assert ru.init.hadamard_(torch.zeros(0, 4)).numel() == 0


def test_nothing_is_written_where_one_size_does_not_exist():
    model = ru.tag_(net(), {"*.weight": ru.Stiefel(), "2.weight": ru.Stiefel()})
    model[1] = ru.tag_(nn.Linear(8, 92), {"weight": ru.Stiefel()})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ru.ManifoldError, match=r"order 92.*88 and 96.*nn.init.orthogonal_"):
        ru.init.hadamard_(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("target", "options", "error", "words"),
    [
        (torch.zeros(92, 92), {}, ru.ManifoldError, "nearest orders are 88 and 96"),
        (torch.zeros(8), {}, ru.ManifoldError, "two or more dimensions"),
        (torch.zeros(8, 8, dtype=torch.int64), {}, ru.ManifoldError, "int64"),
        (net(), {}, ru.ManifoldError, "has no tagged parameter"),
        (net(), {"pattern": "*.wait"}, ru.ManifoldError, "'0.weight', '0.bias'"),
        (net(), {"pattern": "*.bias"}, ru.ManifoldError, "two or more dimensions"),
        (torch.zeros(8, 8), {"pattern": "*"}, ru.ManifoldTypeError, "pass the module"),
        ("weight", {}, ru.ManifoldTypeError, "got a str"),
        (nn.LazyLinear(8), {"pattern": "weight"}, ru.ManifoldTypeError, "has no shape yet"),
        (
            tagged(ru.OrthogonalConv(1), (4, 4, 4), torch.float32),
            {},
            ru.ManifoldTypeError,
            "no convolution",
        ),
    ],
)
def test_what_cannot_be_written_is_refused(target, options, error, words):
    with pytest.raises(error, match=words):
        ru.init.hadamard_(target, **options)


def test_autocast_changes_nothing():
    with torch.autocast("cpu", torch.bfloat16):
        found: Tensor = ru.init.hadamard_(torch.zeros(12, 12))
    assert torch.equal(found, ru.init.hadamard_(torch.zeros(12, 12)))
