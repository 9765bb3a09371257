"""Shared by the tests of manifolds: every manifold, shape and dtype, and vectors on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import riemann_unn as ru
from riemann_unn.manifolds import MatrixManifold
from tests.support import DTYPES, every, gaussian, generator, rounding, slope

Shape = tuple[int, ...]
Shapes = list[tuple[MatrixManifold, Shape]]

DOUBLE = [torch.float64, torch.complex128]
SHAPES: Shapes = [
    (ru.Orthogonal(), (5, 5)),
    (ru.Orthogonal(), (3, 4, 4)),
    (ru.Orthogonal(), (1, 1)),
    (ru.Orthogonal(det=1), (5, 5)),
    (ru.Orthogonal(det=-1), (2, 4, 4)),
    (ru.Unitary(), (5, 5)),
    (ru.Unitary(), (2, 3, 4, 4)),
    (ru.Unitary(), (1, 1)),
    (ru.Stiefel(), (5, 5)),
    (ru.Stiefel(), (9, 3)),
    (ru.Stiefel(), (3, 9)),
    (ru.Stiefel(), (2, 6, 4)),
    (ru.Stiefel(), (2, 4, 6)),
    (ru.Stiefel(), (4, 1)),
    (ru.Stiefel(), (1, 1)),
    (ru.Stiefel(flatten=True), (4, 3, 2, 2)),
    (ru.Stiefel(flatten=True), (12, 2, 1, 2)),
    (ru.Orthogonal(blocks=4), (12, 3)),
    (ru.Orthogonal(det=-1, blocks=(2, 3)), (2, 4, 6)),
    (ru.Unitary(blocks=(1, 2)), (3, 6)),
    (ru.Stiefel(blocks=3), (6, 5)),
    (ru.Stiefel(blocks=(1, 2)), (6, 8)),
    (ru.Stiefel(blocks=(2, 2)), (2, 10, 4)),
    (ru.Stiefel(flatten=True, blocks=2), (4, 3, 2, 2)),
]
EMPTY: Shapes = [
    (ru.Orthogonal(), (0, 0)),
    (ru.Orthogonal(det=-1), (0, 3, 3)),
    (ru.Unitary(), (0, 2, 2)),
    (ru.Stiefel(), (5, 0)),
    (ru.Stiefel(), (0, 3, 4)),
    (ru.Stiefel(flatten=True), (3, 0, 2)),
    (ru.Stiefel(blocks=2), (0, 3)),
    (ru.Stiefel(blocks=(1, 2)), (3, 0)),
    (ru.Orthogonal(blocks=2), (0, 0)),
]


def grid(shapes: Shapes = SHAPES, dtypes: list[torch.dtype] = DTYPES) -> Any:
    """Every manifold and shape with every dtype it takes."""
    return every(
        ("manifold", "shape", "dtype"),
        [(m, s, d) for m, s in shapes for d in dtypes if m.why_not(torch.Size(s), d) is None],
    )


CURVED = grid([(m, s) for m, s in SHAPES if s != (1, 1) or m == ru.Unitary()])  # more than points
CURVED_DOUBLE = grid([(m, s) for m, s in SHAPES if s != (1, 1) or m == ru.Unitary()], DOUBLE)


def tol(dtype: torch.dtype, shape: Shape, factor: float = 32) -> float:
    """What rounding may leave in a tensor of this shape."""
    return rounding(dtype, math.prod(shape), factor)


def gauss(shape: Shape, dtype: torch.dtype, seed: int) -> Tensor:
    return gaussian(*shape, dtype=dtype, seed=seed)


def point(m: MatrixManifold, shape: Shape, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return m.random(shape, dtype=dtype, generator=generator(seed)).as_subclass(Tensor)


def tangent(m: MatrixManifold, x: Tensor, seed: int, size: float = 1.0) -> Tensor:
    """A tangent vector made without proju: X Ω + (I - X Xᴴ) Z, scaled to a norm."""
    p = m.to_matrices(x)
    omega = gauss((*p.shape[:-2], p.shape[-1], p.shape[-1]), x.dtype, seed + 100)
    v = p @ (omega - omega.mH)
    if p.shape[-2] > p.shape[-1]:
        z = gauss(tuple(p.shape), x.dtype, seed)
        v = v + z - p @ (p.mH @ z)
    v = v * (size / torch.linalg.matrix_norm(v, keepdim=True).clamp_min(1e-3))
    return m.from_matrices(v, x.shape)


def real_dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.conj() * b).real.sum()


def gap(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors, NaN if there is one."""
    return float((a - b).abs().max())


def numpy_matrices(m: MatrixManifold, x: Tensor) -> np.ndarray:
    return m.to_matrices(x.detach()).to(torch.complex128).resolve_conj().numpy()


def off(m: MatrixManifold, x: Tensor) -> float:
    """Orthogonality error by numpy, not by the package; NaN stays NaN."""
    a = numpy_matrices(m, x)
    gram = np.conj(np.swapaxes(a, -1, -2)) @ a - np.eye(a.shape[-1])
    return float(np.linalg.norm(gram, axis=(-2, -1)).max() / a.shape[-1] ** 0.5)


def order(distance: Callable[[float], Tensor]) -> float:
    """The order in t of the norm of a difference that vanishes with t."""
    sizes = [1e-2 * 0.7**i for i in range(7)]
    return slope([float(torch.linalg.vector_norm(distance(t))) for t in sizes], sizes)
