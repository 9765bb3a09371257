"""Kernels move by what their step adds, beside the matrices of their spectra."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import riemann_unn as ru
from riemann_unn.optim.transformed import TransformedBatch
from tests.support import gaussian, generator


def kernels(count, *shape, dtype=torch.float64):
    manifold = ru.OrthogonalConv(len(shape) - 2)
    drawn = [manifold.random(*shape, dtype=dtype, generator=generator(i)) for i in range(count)]
    return [ru.tag_(nn.Parameter(x.as_subclass(torch.Tensor)), manifold) for x in drawn]


def trained(params, steps, rank, **options):
    optimizer = ru.optim.ProjUNNT(params, lr=0.1, rank=rank, **options)
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = gaussian(*p.shape, dtype=p.dtype, seed=10 * step + i)
        optimizer.step()
    assert all(isinstance(batch, TransformedBatch) for batch in optimizer._stepped)
    return optimizer


@pytest.mark.parametrize("shape", [(3, 3, 4), (2, 4, 3, 4), (5, 3, 6)])
@pytest.mark.parametrize("rank", [1, None])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_together_they_move_as_each_alone(shape, rank, base):
    together, alone = kernels(2, *shape), kernels(2, *shape)
    optimizer = trained(together, 5, rank, base=base)
    assert len(optimizer._stepped) == 1
    for i, p in enumerate(alone):
        one = ru.optim.ProjUNNT([p], lr=0.1, rank=rank, base=base)
        for step in range(5):
            p.grad = gaussian(*p.shape, seed=10 * step + i)
            one.step()
        assert (p - together[i]).abs().max() <= 1e-13
        assert float(ru.orthogonality_error(p)) <= 1e-14


@pytest.mark.parametrize("rank", [1, 2])
def test_what_has_no_gradient_keeps_its_bits_beside_one_that_moves(rank):
    still, moving = kernels(2, 3, 3, 4, 4, dtype=torch.float32)
    before = still.detach().clone(), moving.detach().clone()
    optimizer = ru.optim.ProjUNNT([still, moving], lr=0.1, rank=rank)
    for step in range(6):
        still.grad = torch.zeros_like(still)
        moving.grad = gaussian(*moving.shape, dtype=torch.float32, seed=step)
        optimizer.step()
    assert torch.equal(still, before[0]) and not torch.equal(moving, before[1])
    # The control: to be transformed there and back is to be rounded.
    manifold = still.manifold
    back = manifold.from_matrices(manifold.to_matrices(still.detach()), still.shape)
    assert not torch.equal(back.to(still.dtype), still.detach())


def test_the_angle_that_is_told_is_that_of_the_spectrum():
    (p,) = kernels(1, 4, 4, 5)
    x = p.manifold.to_matrices(p.detach())
    optimizer = trained([p], 1, 1)
    turned = x.mH @ p.manifold.to_matrices(p.detach())
    largest = torch.angle(torch.linalg.eigvals(turned)).abs().max()
    told = optimizer.last_step()[p]["angle"]
    assert float(told.max()) == pytest.approx(float(largest), rel=1e-9)
