"""All parameters as one vector: there and back, gradients against differences, and projections."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import riemann_unn as ru
from riemann_unn.errors import ManifoldTypeError
from riemann_unn.optim.coordinates import Coordinates
from tests.support import gaussian, point


def tagged(manifold, *shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = manifold.random(*shape, dtype=dtype, generator=generator).as_subclass(torch.Tensor)
    return ru.tag_(nn.Parameter(x), manifold)


def made():
    tags = [
        tagged(ru.Orthogonal(), 3, 3),  # an odd number of numbers, before complex ones
        tagged(ru.Orthogonal(), 4, 4, seed=1),
        tagged(ru.Stiefel(), 6, 3, seed=2),
        tagged(ru.Stiefel(), 2, 3, 5, seed=3),
        tagged(ru.Unitary(), 3, 3, dtype=torch.complex128, seed=4),
        tagged(ru.Stiefel(), 5, 2, dtype=torch.complex128, seed=9),
        tagged(ru.OrthogonalConv(1), 3, 3, 4, seed=5),
        tagged(ru.Stiefel(flatten=True), 4, 3, 2, 1, seed=6),
    ]
    free = [
        nn.Parameter(gaussian(3, seed=7)),
        nn.Parameter(gaussian(2, dtype=torch.complex128, seed=8)),
    ]
    members = ru.optim.ProjUNNT(tags, lr=0.1)._tagged.members()
    return Coordinates(members, free)


def some(c, seed):
    """A vector of directions, or of anything."""
    return gaussian(c.size, seed=seed)


def value(places, targets):
    return sum(float((t.conj() * x).real.sum()) for x, t in zip(places, targets, strict=True))


def test_vectors_and_tensors_are_each_others_inverses():
    c = made()
    assert c.size == sum(p.numel() * (2 if p.is_complex() else 1) for p in c.params)
    x = some(c, 1)
    tensors = c.tensors(x)
    assert [(t.shape, t.dtype) for t in tensors] == [(p.shape, p.dtype) for p in c.params]
    assert torch.equal(c.vector(tensors), x)
    norm = float(sum(t.abs().square().sum() for t in tensors)) ** 0.5
    assert norm == pytest.approx(float(x.norm()))  # real and imaginary parts count alike


def test_the_gradient_tells_how_a_loss_changes_along_every_curve():
    c = made()
    here = c.current_point()
    targets = [gaussian(*p.shape, dtype=p.dtype, seed=20 + i) for i, p in enumerate(c.params)]
    g = c.gradient(here, targets)
    # Of another loss: what is asked of directions of square matrices is that they are skew.
    others = [gaussian(*p.shape, dtype=p.dtype, seed=40 + i) for i, p in enumerate(c.params)]
    direction = c.gradient(here, others)
    line = c.curve(here, direction)
    h = 1e-5
    slope = (value(line.point(h).values, targets) - value(line.point(-h).values, targets)) / (2 * h)
    assert float(g @ direction) == pytest.approx(slope, rel=1e-7)
    assert float(2 * g @ direction) != pytest.approx(slope, rel=1e-2)  # the control
    assert torch.allclose(line.velocity(0.0), direction, atol=1e-13)
    for t in (0.5, 3.0):
        c.write_(line.point(t))
        assert all(float(ru.orthogonality_error(p)) < 1e-14 for p in c.params[:8])
    c.write_(here)
    assert all(torch.equal(p, v) for p, v in zip(c.params, here.values, strict=True))


def test_projections_are_orthogonal_and_gradients_are_tangent():
    c = made()
    here = c.current_point()
    x, y = some(c, 3), some(c, 4)
    px, py = c.project(here, [x, y])
    assert torch.allclose(c.project(here, [px])[0], px, atol=1e-13)
    assert float(px @ y) == pytest.approx(float(x @ py)) and not torch.allclose(px, x)
    targets = [gaussian(*p.shape, dtype=p.dtype, seed=i) for i, p in enumerate(c.params)]
    g = c.gradient(here, targets)
    assert torch.allclose(c.project(here, [g])[0], g, atol=1e-13)
    assert torch.equal(c.untagged(g), c.vector(targets)[-c.untagged(g).numel() :])


def test_norms_are_those_of_skew_matrices():
    p, q = tagged(ru.Stiefel(), 6, 3), tagged(ru.Orthogonal(), 4, 4, seed=1)
    c = Coordinates(ru.optim.ProjUNNT([p, q], lr=0.1)._tagged.members(), [])
    targets = [gaussian(*x.shape, seed=5) for x in c.params]
    found = c.tangent_norms(c.current_point(), c.gradient(c.current_point(), targets))
    by_param = dict(zip(map(id, c.params), targets, strict=True))
    for x in (p, q):
        g, x_ = by_param[id(x)], x.detach().as_subclass(torch.Tensor)
        w = 0.5 * (g @ x_.mH - x_ @ g.mH)
        assert float(found[x]) == pytest.approx(float(w.norm()))
    assert c.radius == pytest.approx((3 + 4) ** 0.5)


def test_gradients_that_are_not_there_or_sparse_count_as_dense_ones():
    c = made()
    c.params[0].grad = gaussian(3, 3).to_sparse()
    found = c.euclidean()
    assert torch.equal(found[0], gaussian(3, 3)) and not any(bool(g.any()) for g in found[1:])


def test_what_a_line_search_cannot_do_is_refused():
    p = ru.tag_(nn.Parameter(point(4, 4, dtype=torch.float32).bfloat16()), ru.Stiefel())
    members = ru.optim.ProjUNNT([p], lr=0.1)._tagged.members()
    with pytest.raises(ManifoldTypeError, match=r"stored as torch.bfloat16.*\.float\(\)"):
        Coordinates(members, [])
    free = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, device="meta"))]
    with pytest.raises(ManifoldTypeError, match="on several devices"):
        Coordinates([], free)


def test_complex_numbers_may_begin_anywhere_in_a_vector():
    """L-BFGS of complex parameters behind an odd number of real ones reaches its minimum."""
    odd, unitary = tagged(ru.Orthogonal(), 3, 3), tagged(ru.Unitary(), 2, 2, dtype=torch.complex128)
    free = nn.Parameter(torch.zeros(3, dtype=torch.complex128))
    target = tagged(ru.Unitary(), 2, 2, dtype=torch.complex128, seed=1).detach()
    optimizer = ru.optim.LBFGS([odd, unitary, free])

    def closure():
        optimizer.zero_grad()
        loss = (unitary - target).abs().square().sum() + (free - 1j).abs().square().sum()
        loss = loss + (odd - odd.detach()).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert float(closure().detach()) <= 1e-14
