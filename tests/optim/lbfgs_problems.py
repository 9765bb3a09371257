"""Problems for L-BFGS: parameters near to targets on their manifolds, and closures."""

from __future__ import annotations

import math

import torch
from torch import nn

import riemann_unn as ru
from tests.support import gaussian, parameter, point

F64, C128 = torch.float64, torch.complex128


def kernel(*shape, dtype=F64, seed=0):
    manifold = (ru.UnitaryConv if dtype.is_complex else ru.OrthogonalConv)(ndim=len(shape) - 2)
    x = manifold.random(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return ru.tag_(nn.Parameter(x.as_subclass(torch.Tensor)), manifold)


def tagged(*shape, dtype=F64, seed=0, manifold=None):
    return parameter(*shape, dtype=dtype, seed=seed, manifold=manifold)


def rotation(n, det, seed=0):
    x = point(n, n, seed=seed)
    if torch.linalg.det(x) * det < 0:
        x[0] = -x[0]
    return ru.tag_(nn.Parameter(x), ru.Orthogonal(det=det))


def flattened(*shape, seed=0):
    rows = point(shape[0], math.prod(shape[1:]), seed=seed)
    return ru.tag_(nn.Parameter(rows.reshape(shape)), ru.Stiefel(flatten=True))


def fit(params, targets=None):
    """The squared distance to targets that are on the manifold too, warped a little."""

    def loss():
        total = 0.0
        for p, t in zip(params, targets, strict=True):
            distance = (p - t).abs()
            total = total + (distance.square() + 0.1 * distance.pow(4)).sum()
        return total

    return loss


def closure_of(optimizer, loss, values=None):
    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        if values is not None:
            values.append(float(value.detach()))
        return value

    return closure


MADE = {
    "square": lambda s: [tagged(8, 8, seed=s)],
    "complex": lambda s: [tagged(6, 6, dtype=C128, seed=s, manifold=ru.Unitary())],
    "tall": lambda s: [tagged(10, 3, seed=s)],
    "complex tall": lambda s: [tagged(9, 4, dtype=C128, seed=s)],
    "wide": lambda s: [tagged(3, 10, seed=s)],
    "batch": lambda s: [tagged(3, 5, 5, seed=s)],
    "batches": lambda s: [tagged(2, 6, 2, seed=s), tagged(2, 6, 2, seed=s + 50)],
    "many": lambda s: [tagged(4, 4, seed=s + i) for i in range(6)],
    "kernel": lambda s: [kernel(3, 3, 5, seed=s)],
    "tall kernel": lambda s: [kernel(4, 2, 3, 4, seed=s)],
    "complex kernel": lambda s: [kernel(3, 3, 4, dtype=C128, seed=s)],
    "flatten": lambda s: [flattened(4, 2, 3, 3, seed=s)],
    "SO": lambda s: [rotation(5, 1, seed=s)],
    "det -1": lambda s: [rotation(5, -1, seed=s)],
    "mixed": lambda s: [
        tagged(6, 6, seed=s),
        nn.Parameter(gaussian(4, seed=s)),
        tagged(7, 2, dtype=C128, seed=s),
        nn.Parameter(gaussian(3, dtype=C128, seed=s)),
    ],
}


def near(name, seed=0):
    """Parameters near to others of their manifolds, which are the targets."""
    params = MADE[name](seed)
    targets = [p.detach().clone() for p in params]
    far = ru.optim.Expm([p for p in params if ru.manifold_of(p)], lr=0.2)
    for i, p in enumerate(params):
        p.grad = gaussian(*p.shape, dtype=p.dtype, seed=seed + 90 + i)
    far.step()
    for p in params:
        if ru.manifold_of(p) is None:
            p.data += 0.5
    return params, targets


def weighted(params, targets):
    """A fit whose curvature differs from entry to entry."""
    weights = [gaussian(*p.shape, seed=70 + i).exp() for i, p in enumerate(params)]

    def loss():
        parts = zip(params, targets, weights, strict=True)
        return sum((w * (p - t).abs().square()).sum() for p, t, w in parts)

    return loss


def problem(**options):
    params, targets = near("mixed")
    for p in params:
        p.grad = None
    optimizer, values = ru.optim.LBFGS(params, **options), []
    return optimizer, params, weighted(params, targets), values
