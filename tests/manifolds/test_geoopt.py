"""Geoopt's own optimizers and samplers run on the manifolds, stay on them and make progress."""

import geoopt
import pytest
import torch
from geoopt.samplers import RHMC, RSGLD
from torch import Tensor

import riemann_unn as ru
from tests.manifolds.grid import gauss, grid, off
from tests.support import generator

SHAPES = [
    (ru.Orthogonal(det=-1), (2, 4, 4)),
    (ru.Unitary(), (2, 4, 4)),
    (ru.Stiefel(), (9, 3)),
    (ru.Stiefel(flatten=True), (4, 3, 2, 2)),
    (ru.Orthogonal(blocks=3), (12, 4)),
]
STEPS = 50
OPTIMIZERS = {
    "momentum": lambda ps: geoopt.optim.RiemannianSGD(ps, lr=0.03, momentum=0.9, nesterov=True),
    "adam": lambda ps: geoopt.optim.RiemannianAdam(ps, lr=0.1),
}


def limit(dtype: torch.dtype) -> float:
    return 1e-12 if dtype in (torch.float64, torch.complex128) else 1e-5


def start(manifold, shape, dtype) -> tuple[geoopt.ManifoldParameter, Tensor]:
    """A parameter, and a target near it so that descent reaches it without barriers."""
    x = manifold.random(*shape, dtype=dtype, generator=generator(0))
    target = manifold.projx(x.as_subclass(Tensor) + 0.3 * gauss(shape, dtype, 1))
    return geoopt.ManifoldParameter(x, manifold=manifold), target


def quadratic(p: Tensor, target: Tensor) -> Tensor:
    return ((p - target).abs() ** 2).sum()


@pytest.mark.parametrize("name", OPTIMIZERS)
@grid(SHAPES)
def test_optimizers(manifold, shape, dtype, name):
    p, target = start(manifold, shape, dtype)
    optimizer = OPTIMIZERS[name]([p])
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = quadratic(p, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert off(manifold, p) <= limit(dtype)
    assert losses[-1] < 0.1 * losses[0]
    assert manifold.has_det(p)


@grid(SHAPES)
def test_euclidean_steps_would_leave_the_manifold(manifold, shape, dtype):
    p, target = start(manifold, shape, dtype)
    quadratic(p, target).backward()
    torch.optim.SGD([p], lr=0.03).step()
    assert off(manifold, p) > 1e3 * limit(dtype)


@grid(SHAPES)
def test_langevin_sampler(manifold, shape, dtype):
    p, target = start(manifold, shape, dtype)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sampler = RSGLD([p], epsilon=1e-3)
        first = quadratic(p, target).item()
        for _ in range(STEPS):
            sampler.step(lambda: -300 * quadratic(p, target))
    assert off(manifold, p) <= limit(dtype)
    assert quadratic(p, target).item() < 0.5 * first


@grid([SHAPES[0], SHAPES[2]], [torch.float64])
def test_hamiltonian_sampler_conserves_energy(manifold, shape, dtype):
    p, target = start(manifold, shape, dtype)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sampler = RHMC([p], epsilon=1e-2, n_steps=5)
        sampler.burnin = False
        for _ in range(10):
            sampler.step(lambda: -quadratic(p, target))
    assert off(manifold, p) <= limit(dtype)
    assert min(sampler.acceptance_probs) > 0.8


@pytest.mark.parametrize("canonical", [True, False])
def test_our_optimizers_take_parameters_on_geoopts_stiefel_manifolds(canonical):
    manifold = geoopt.Stiefel(canonical=canonical)
    p = geoopt.ManifoldParameter(manifold.random(12, 5, dtype=torch.float64), manifold=manifold)
    for cls in (ru.optim.ProjUNNT, ru.optim.ProjUNND, ru.optim.Cayley, ru.optim.Expm):
        optimizer = cls([p], lr=0.1, momentum=0.9)
        for step in range(20):
            p.grad = torch.randn(12, 5, generator=torch.Generator().manual_seed(step)).double()
            optimizer.step()
        assert float(ru.orthogonality_error(p.detach(), ru.Stiefel())) < 2e-15
    assert p.manifold is manifold
