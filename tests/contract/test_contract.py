"""One contract over manifold, optimizer, dtype, base, shape and strides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import riemann_unn as ru
from tests.support import (
    COMPLEX,
    DTYPES,
    REAL,
    assert_on_manifold,
    every,
    gaussian,
    generator,
    slope,
)

LONG = pytest.mark.long
OPTIMIZERS = {
    "projunn-t": (ru.optim.ProjUNNT, {"rank": 1}),
    "projunn-d": (ru.optim.ProjUNND, {"rank": 2}),
    "cayley": (ru.optim.Cayley, {}),
    "cayley-2": (ru.optim.Cayley, {"rank": 2}),
    "expm": (ru.optim.Expm, {}),
    "projunn-d-whole": (ru.optim.ProjUNND, {"rank": None}),
}
BASES = {
    "sgd": (torch.optim.SGD, {}),
    "adam": (torch.optim.Adam, {}),
    # One of these for each case and optimizer, by rotation.
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "adagrad": (torch.optim.Adagrad, {}),
    "nadam": (torch.optim.NAdam, {}),
}
SQUARES = [(9, 9), (1, 1), (2, 4, 4), (0, 3, 3)]
MANIFOLDS = [
    (ru.Orthogonal(), REAL, SQUARES),
    (ru.Orthogonal(det=1), REAL, SQUARES),
    (ru.Orthogonal(det=-1), REAL, SQUARES),
    (ru.Unitary(), COMPLEX, SQUARES),
    (ru.Stiefel(), DTYPES, [(12, 5), (5, 12), (3, 6, 2), (7, 1), (1, 7), (4, 0), (0, 4)]),
    (ru.Stiefel(flatten=True), DTYPES, [(8, 2, 3, 3), (20, 2, 3)]),
    (ru.Orthogonal(blocks=4), REAL, [(20, 5), (2, 8, 2)]),
    (ru.Unitary(blocks=(1, 3)), COMPLEX, [(5, 15)]),
    (ru.Stiefel(blocks=(2, 3)), REAL, [(10, 24)]),
    (ru.Stiefel(flatten=True, blocks=2), REAL, [(8, 2, 3, 3)]),
    (ru.OrthogonalConv(1), REAL, [(3, 3, 6)]),
    (ru.OrthogonalConv(2), REAL, [(3, 5, 4, 4), (2, 4, 3, 5, 2)]),
    (ru.OrthogonalConv(3), REAL, [(2, 2, 2, 3, 2)]),
    (ru.UnitaryConv(1), COMPLEX, [(4, 3, 5)]),
    (ru.UnitaryConv(2), COMPLEX, [(3, 3, 2, 3)]),
]
CASES = [
    pytest.param(manifold, dtype, shape, id=f"{manifold}-{str(dtype)[6:]}-{shape}")
    for manifold, dtypes, shapes in MANIFOLDS
    for dtype in dtypes
    for shape in shapes
]


def contiguous(x: Tensor) -> Tensor:
    return x.clone()


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def sliced(x: Tensor) -> Tensor:
    """Every second element of a larger storage, at an offset."""
    store = torch.zeros(*x.shape, 2, dtype=x.dtype)
    store[..., 1] = x
    return store[..., 1]


def tagged(manifold, dtype, shape, layout=contiguous) -> nn.Parameter:
    x = manifold.random(*shape, dtype=dtype, generator=generator()).as_subclass(Tensor)
    return ru.tag_(nn.Parameter(layout(x)), manifold)


# Each optimizer meets each layout with two of its three bases.
LAYOUTS = [(contiguous, transposed), (contiguous, sliced), (transposed, sliced)]
ALL_LAYOUTS = [(contiguous, transposed, sliced)] * 3


def bases_of(place: int) -> list[str]:
    """Two bases that every case and optimizer has, and one of the others in turn."""
    in_full, rotating = list(BASES)[:2], list(BASES)[2:]
    return [*in_full, rotating[(place + place // len(rotating)) % len(rotating)]]


@pytest.mark.parametrize(
    "layouts", [pytest.param(LAYOUTS, id="two"), pytest.param(ALL_LAYOUTS, id="all", marks=LONG)]
)
@pytest.mark.parametrize("number", [pytest.param(i, id=c.id) for i, c in enumerate(CASES)])
@every("name", OPTIMIZERS)
def test_the_contract(number, name, layouts):
    manifold, dtype, shape = CASES[number].values
    cls, options = OPTIMIZERS[name]
    bases = bases_of(number * len(OPTIMIZERS) + list(OPTIMIZERS).index(name))
    for base, some in zip(bases, layouts, strict=True):
        if base == "nadam" and dtype.is_complex:  # torch's takes real tensors only
            continue
        for layout in some:
            assert_keeps_the_contract(manifold, dtype, shape, layout, cls, options, base)


def assert_keeps_the_contract(manifold, dtype, shape, layout, cls, options, base):
    base_class, base_options = BASES[base]
    p = tagged(manifold, dtype, shape, layout)
    free = nn.Parameter(torch.ones(3))
    optimizer = cls([p, free], lr=0.03, base=base_class, **options, **base_options)
    first, before = p.detach().clone(), (p.data_ptr(), p.stride(), torch.get_rng_state())
    for step in range(12):
        p.grad = gaussian(*shape, dtype=dtype, seed=step)
        kept = p.grad
        copied = kept.clone()
        optimizer.step()
        assert p.grad is kept and torch.equal(kept, copied), base
    assert (p.data_ptr(), p.stride()) == before[:2], base
    assert torch.equal(torch.get_rng_state(), before[2]), base
    assert manifold.has_det(p.detach()), base
    assert_on_manifold(p)
    fixed = p.numel() == 0 or (shape == (1, 1) and not dtype.is_complex)
    assert torch.equal(p, first) == fixed, base


@every("name", OPTIMIZERS)
@pytest.mark.parametrize(
    ("manifold", "dtype", "shape"),
    [
        c
        for c in CASES
        if c.values[1] in (torch.float64, torch.complex128)
        and 0 not in c.values[2]
        and 1 not in c.values[2]
    ],
)
def test_steps_are_retractions_of_first_order(manifold, dtype, shape, name):
    cls, options = OPTIMIZERS[name]
    # Rank 1, so that the oracle of sketches is exact, and small beside the point.
    g = manifold.to_matrices(gaussian(*shape, dtype=dtype, seed=4))
    u, v = g[..., :, :1], g[..., :1, :].mH
    start = tagged(manifold, dtype, shape).detach()
    x = manifold.to_matrices(start)
    delta = u @ v.mH / torch.linalg.matrix_norm(u @ v.mH).max()
    # The canonical tangent: the rotation halves what leaves the span of X.
    direction = 0.5 * (delta - x @ delta.mH @ x)
    sizes = [10.0**-i for i in (2.0, 2.5, 3.0, 3.5)]

    def gaps(factor: float) -> list[float]:
        found = []
        for t in sizes:
            p = ru.tag_(nn.Parameter(start.clone()), manifold)
            p.grad = -manifold.from_matrices(delta, p.shape).clone()
            cls([p], lr=t, sketch="svd", **options).step()
            moved = manifold.to_matrices(p.detach()) - x
            found.append(float(torch.linalg.matrix_norm(moved - factor * t * direction).max()))
        return found

    assert slope(gaps(1.0), sizes) == pytest.approx(2.0, abs=0.1)
    for wrong in (-1.0, 2.0):  # negative controls: flipped sign, doubled step
        assert slope(gaps(wrong), sizes) == pytest.approx(1.0, abs=0.1)


def test_cayley_and_polar_agree_with_exp_to_second_order():
    # On square matrices and for skew displacements, where all three retract the same tangent.
    x = tagged(ru.Orthogonal(), torch.float64, (8, 8)).detach()
    k = gaussian(8, 8)
    k = (k - k.mH) / torch.linalg.matrix_norm(k)
    sizes = [10.0**-i for i in (1.0, 1.5, 2.0, 2.5)]

    def moved(cls, t, sign=-1.0):
        p = ru.tag_(nn.Parameter(x.clone()), ru.Orthogonal())
        p.grad = sign * x @ k
        cls([p], lr=t, rank=8).step()
        return p.detach()

    for cls in (ru.optim.Cayley, ru.optim.ProjUNND):
        gaps = [float((moved(cls, t) - moved(ru.optim.Expm, t)).norm()) for t in sizes]
        assert slope(gaps, sizes) == pytest.approx(3.0, abs=0.1)
        wrong = [float((moved(cls, t, 1.0) - moved(ru.optim.Expm, t)).norm()) for t in sizes]
        assert slope(wrong, sizes) == pytest.approx(1.0, abs=0.1)
