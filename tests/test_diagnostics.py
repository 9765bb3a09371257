"""Diagnostics against a naive numpy formula, for tensors, parameters and modules."""

import geoopt
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import riemann_unn as ru
from tests.support import DTYPES, double, every, gaussian, point, rounding

SHAPES = [(6, 6), (9, 4), (4, 9), (1, 1), (1, 5), (3, 5, 5), (2, 3, 4, 7), (2, 3, 7, 4)]


def naive(x: Tensor) -> float:
    """The worst ‖XᴴX - I‖_F / sqrt(p) of a batch, matrix by matrix."""
    worst = 0.0
    for a in double(x).detach().numpy().reshape(-1, *x.shape[-2:]):
        a = a if a.shape[0] >= a.shape[1] else a.conj().T
        gram = np.conj(a.T) @ a - np.eye(a.shape[1])
        worst = max(worst, float(np.sqrt((np.abs(gram) ** 2).sum() / a.shape[1])))
    return worst


@every("dtype", DTYPES)
@every("shape", SHAPES)
def test_tensor_against_the_formula(shape, dtype):
    x = gaussian(*shape, dtype=dtype)
    before = x.clone()
    got = ru.orthogonality_error(x)
    assert got.shape == () and got.dtype == torch.float64 and not got.requires_grad
    assert float(got) == pytest.approx(naive(x), rel=1e-12)
    assert torch.equal(x, before)
    on = point(*shape, dtype=dtype)
    assert float(ru.orthogonality_error(on)) <= rounding(dtype, shape[-1])
    off = float(ru.orthogonality_error((1 + 1e-3) * on))
    assert off == pytest.approx(2e-3, rel=2e-3)  # (1 + d)² - 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_resolves_more_than_the_precision_of_the_tensor(dtype):
    x = torch.eye(4, dtype=dtype) * (1 + torch.finfo(dtype).eps)
    want = (1 + torch.finfo(dtype).eps) ** 2 - 1
    assert float(ru.orthogonality_error(x)) == pytest.approx(want, rel=1e-6)
    assert float(ru.orthogonality_error(torch.eye(4, dtype=dtype))) == 0


@pytest.mark.parametrize("where", [0, 3, 6])
@pytest.mark.parametrize("shape", [(7, 4, 4), (7, 6, 3), (7, 3, 6)])
def test_worst_of_a_batch(shape, where):
    x = point(*shape)
    x[where] *= 1.5
    assert float(ru.orthogonality_error(x)) == pytest.approx(1.25, rel=1e-12)
    each = ru.Stiefel().orthogonality_error(x)
    assert each.shape == (7,) and int(each.argmax()) == where
    x[where, 0, 0] = float("nan")
    assert ru.orthogonality_error(x).isnan()  # never the best of the others


@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (24, 2, 3)])
def test_manifold_decides_the_view(shape):
    x = gaussian(*shape)
    flat = ru.orthogonality_error(x, ru.Stiefel(flatten=True))
    assert float(flat) == pytest.approx(naive(x.reshape(shape[0], -1)), rel=1e-12)
    assert float(ru.orthogonality_error(x)) == pytest.approx(naive(x), rel=1e-12)
    p = ru.tag_(nn.Parameter(x), ru.Stiefel(flatten=True))
    got = ru.orthogonality_error(p)
    assert torch.equal(got, flat) and not got.requires_grad and p.grad is None
    assert float(ru.orthogonality_error(p, ru.Stiefel())) == pytest.approx(naive(x), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_measured_in_double(dtype):
    x = point(8, 8).to(dtype)
    assert float(ru.orthogonality_error(x)) == pytest.approx(naive(x), rel=1e-12)


@pytest.mark.parametrize("shape", [(0, 3, 3), (0, 0), (5, 0), (0, 5), (2, 0, 3)])
def test_nothing_is_no_error(shape):
    got = ru.orthogonality_error(torch.zeros(shape))
    assert got.shape == () and got.dtype == torch.float64 and float(got) == 0


def test_module_gives_a_dict_by_name():
    m = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(3, 5, 2), nn.Linear(4, 6), nn.Linear(4, 6))
    m[3].weight = m[2].weight
    ru.tag_(
        m,
        {
            "0.weight": ru.Orthogonal(),
            "1.weight": ru.Stiefel(flatten=True),
            "3.weight": ru.Stiefel(),
        },
    )
    got = ru.orthogonality_error(m)
    assert list(got) == ["0.weight", "1.weight", "2.weight"]  # shared ones once
    for i, x in enumerate([m[0].weight, m[1].weight.reshape(5, -1), m[2].weight]):
        assert got[f"{i}.weight"].shape == ()
        assert float(got[f"{i}.weight"]) == pytest.approx(naive(x), rel=1e-12)
    ru.init.warm_start_(m)
    assert max(float(e) for e in ru.orthogonality_error(m).values()) <= rounding(torch.float32, 6)


@pytest.mark.parametrize(
    ("x", "manifold", "words"),
    [
        (torch.ones(3), None, r"\(3,\).*two or more"),
        (torch.ones(3, 4), ru.Orthogonal(), r"Orthogonal\(\).*\(3, 4\)"),
        (torch.eye(3), ru.Unitary(), r"Unitary\(\).*float32"),
        (torch.eye(3) * 1j, ru.Orthogonal(), "complex64"),
        (torch.eye(3).long(), None, "int64"),
        (nn.Linear(2, 2), None, "Linear has no tagged parameter.*tag_"),
    ],
)
def test_what_cannot_be_measured(x, manifold, words):
    with pytest.raises(ru.ManifoldError, match=words):
        ru.orthogonality_error(x, manifold)


@pytest.mark.parametrize(
    ("x", "manifold"),
    [
        ("weight", None),
        (np.eye(3), None),
        (torch.eye(3), geoopt.Stiefel()),
        (torch.eye(3), ru.Orthogonal),
        (ru.tag_(nn.Linear(3, 3), {"weight": ru.Orthogonal()}), ru.Stiefel()),  # not ignored
    ],
    ids=["str", "numpy", "geoopt", "class", "module-with-manifold"],
)
def test_kinds_that_are_refused(x, manifold):
    with pytest.raises(ru.ManifoldTypeError):
        ru.orthogonality_error(x, manifold)
