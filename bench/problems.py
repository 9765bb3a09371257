"""Problems on orthogonal and unitary matrices whose optimum is known, in double precision.

Each maker takes a seed for its data and returns a `Problem`: a loss that autograd can
differentiate, its least value on the manifold, a point that attains it, and random starts.
Losses are scaled so that the learning rates worth trying are near one for all of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor

import riemann_unn as ru
from riemann_unn.manifolds import MatrixManifold

__all__ = [
    "MAKERS",
    "MiniBatch",
    "Problem",
    "Starved",
    "brockett",
    "complex_subspace",
    "joint_diagonalisation",
    "large_subspace",
    "mini_batch_pca",
    "noisy_procrustes",
    "pca_digits",
    "procrustes",
    "qft_gate",
    "qft_states",
    "starved",
]


@dataclass(frozen=True)
class Problem:
    """A loss on orthonormal matrices whose least value is known.

    Args:
        name: Its name in tables.
        value: Loss at a matrix, a real scalar tensor.
        best: Its least value on the manifold, or on the component that starts lie in.
        optimum: A matrix at which it is attained.
        same_component: Whether starts get the determinant of the optimum, which no
            continuous path over the orthogonal group can change.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    best: float
    optimum: Tensor
    same_component: bool = False

    @property
    def square(self) -> bool:
        return self.optimum.shape[0] == self.optimum.shape[1]

    @property
    def manifold(self) -> MatrixManifold:
        if not self.square:
            return ru.Stiefel()
        return ru.Unitary() if self.optimum.is_complex() else ru.Orthogonal()

    def start(self, seed: int = 0) -> Tensor:
        """Return a random matrix, uniform on the component of the optimum."""
        x = haar(*self.optimum.shape, dtype=self.optimum.dtype, seed=1000 + seed)
        if self.same_component and torch.linalg.det(x) * torch.linalg.det(self.optimum) < 0:
            x[0] = -x[0]
        return x

    def gap(self, x: Tensor, first: float) -> float:
        """Return how much of the way from the loss ``first`` to the least one is left at x."""
        with torch.no_grad():
            return (float(self.value(x)) - self.best) / (first - self.best)

    def gradient(self, x: Tensor) -> Tensor:
        """Return the Euclidean gradient at x."""
        x = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.value(x), x)
        return gradient


@dataclass(frozen=True)
class MiniBatch:
    """A problem whose gradient is known on samples only.

    Args:
        whole: The problem on all the data, by which results are judged.
        sample: The loss at a matrix on the data of a step.
        steps: Number of steps.
    """

    whole: Problem
    sample: Callable[[Tensor, int], Tensor]
    steps: int

    def decay(self, step: int) -> float:
        """Return what to multiply the learning rate with in a step: half a cosine."""
        return (1 + math.cos(math.pi * step / self.steps)) / 2


@dataclass(frozen=True)
class Starved:
    """A gradient with large noise in one plane and a small constant part in another.

    The constant part leads to a quarter rotation of the last two coordinates; the noise, in the
    first two, changes its sign at every step.
    """

    size: int
    noise: float
    pull: float

    def gradient(self, x: Tensor, step: int) -> Tensor:
        g = torch.zeros_like(x)
        g[:, 0] = (-1) ** step * self.noise * x[:, 1]
        g[:, 1] = -((-1) ** step) * self.noise * x[:, 0]
        g[-2, -1] = self.pull
        g[-1, -2] = -self.pull
        return g

    def progress(self, x: Tensor) -> float:
        """Return the sine of the rotation angle of the last plane: 1 at the target."""
        return float(x[-1, -2] - x[-2, -1]) / 2


# Data ----------------------------------------------------------------------------------


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=_generator(seed))


def haar(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a matrix with orthonormal columns, uniform among them."""
    x = ru.Stiefel().random(*shape, dtype=dtype, generator=_generator(seed))
    return x.detach().as_subclass(Tensor).clone()


@functools.cache
def digits() -> Tensor:
    """Return scikit-learn's handwritten digits, a row of 64 centred pixels for each."""
    rows = torch.tensor(load_digits().data, dtype=torch.float64)
    return rows - rows.mean(0)


@functools.cache
def fourier(n: int) -> Tensor:
    """Return the matrix of the quantum Fourier transform."""
    k = torch.arange(n, dtype=torch.float64)
    angle = 2 * torch.pi / n * (torch.outer(k, k) % n)
    return torch.polar(torch.full_like(angle, n**-0.5), angle)


def polar(a: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(a)
    return u @ vh


# Makers --------------------------------------------------------------------------------


def _subspace(name: str, c: Tensor, p: int) -> Problem:
    """-tr(XᴴCX), least on the eigenvectors of the p largest eigenvalues of C."""
    values, vectors = torch.linalg.eigh(c)
    c = c / values[-1]
    return Problem(
        name,
        lambda x: -(x.conj() * (c @ x)).sum().real,
        -float((values[-p:] / values[-1]).sum()),
        vectors[:, -p:].contiguous(),
    )


def pca_digits(p: int = 5) -> Problem:
    """The principal components of real images: -tr(XᵀCX), C their covariance."""
    rows = digits()
    return _subspace(f"PCA digits St(64,{p})", rows.mT @ rows, p)


def complex_subspace(seed: int = 0, n: int = 24, p: int = 3) -> Problem:
    """The dominant subspace of a Hermitian matrix whose eigenvalues fall as 1/j."""
    q = haar(n, n, dtype=torch.complex128, seed=seed)
    values = 1 / torch.arange(1, n + 1, dtype=torch.float64)
    return _subspace(f"complex subspace St({n},{p})", (q * values) @ q.mH, p)


def large_subspace(seed: int = 0, n: int = 1000, p: int = 50) -> Problem:
    """The dominant subspace of a large symmetric matrix whose eigenvalues fall as 1/j."""
    q = haar(n, n, seed=seed)
    values = 1 / torch.arange(1, n + 1, dtype=torch.float64)
    return _subspace(f"top {p} of {n}×{n}", (q * values) @ q.mT, p)


def brockett(seed: int = 0, n: int = 12, weights: int = 3) -> Problem:
    """tr(XᵀAXN), A with evenly spaced eigenvalues, N = diag(w, w-1, ..., 1, 0, ...) / w.

    By the rearrangement inequality the first columns of the optimum are the eigenvectors of
    the least eigenvalues. Its condition number is (n - 1)² for w = n - 1, where all columns are
    told apart, and w (n - 1) in general.
    """
    q = haar(n, n, seed=seed)
    values = torch.linspace(0, 1, n, dtype=torch.float64)
    a = (q * values) @ q.mT
    w = (weights - torch.arange(n, dtype=torch.float64)).clamp_min(0) / weights

    return Problem(
        f"Brockett O({n}), {weights} weights",
        lambda x: (x * (a @ x) * w).sum(),
        float((values * w).sum()),
        q,
    )


def procrustes(seed: int = 0, n: int = 12) -> Problem:
    """-tr(XᵀM), least at the polar factor of M."""
    m = gaussian(n, n, seed=seed)
    values = torch.linalg.svdvals(m)
    m, least = m / values[0], -float(values.sum() / values[0])
    return Problem(
        f"Procrustes O({n})", lambda x: -(x * m).sum(), least, polar(m), same_component=True
    )


def noisy_procrustes(seed: int = 0, n: int = 20, rows: int = 60) -> Problem:
    """‖A − BX‖², A a rotated B with noise; least at the polar factor of BᵀA."""
    b = gaussian(rows, n, seed=seed)
    a = b @ haar(n, n, seed=seed + 1) + 0.3 * gaussian(rows, n, seed=seed + 2)
    scale = 2 * torch.linalg.matrix_norm(b.mT @ a, 2)
    a, b = a / scale.sqrt(), b / scale.sqrt()
    best = polar(b.mT @ a)

    def value(x: Tensor) -> Tensor:
        return (a - b @ x).square().sum()

    return Problem(f"noisy Procrustes O({n})", value, float(value(best)), best, True)


def joint_diagonalisation(seed: int = 0, n: int = 12, count: int = 8) -> Problem:
    """The squares off the diagonals of XᵀA_kX, all zero at the eigenvectors that the A_k share.

    Columns of the optimum may change places and signs, so starts of either determinant reach it.
    It has saddle points, at which columns are mixed, but no start was seen to end at one: of ten
    random starts with each of four seeds none, at rank 1 or whole.
    """
    q = haar(n, n, seed=seed)
    values = gaussian(count, n, seed=seed + 1)
    matrices = (q * values.unsqueeze(1)) @ q.mT
    scale = values.square().sum() / n
    off = 1 - torch.eye(n, dtype=torch.float64)

    def value(x: Tensor) -> Tensor:
        return ((x.mT @ (matrices @ x)) * off).square().sum() / scale / 4

    return Problem(f"joint diagonalisation O({n})", value, 0.0, q)


def qft_gate(n: int = 16) -> Problem:
    """n − |tr(FᴴX)|, F the Fourier transform: the fidelity of a gate, up to its phase."""
    f = fourier(n)
    return Problem(f"QFT-{n} gate", lambda x: n - (f.conj() * x).sum().abs(), 0.0, f)


def qft_states(seed: int = 0, n: int = 16, count: int = 64) -> Problem:
    """½‖XS − FS‖², S random states in columns: the Fourier transform learned from pairs."""
    f, s = fourier(n), gaussian(n, count, dtype=torch.complex128, seed=seed)
    s = s / torch.linalg.vector_norm(s, dim=0)
    s = s / torch.linalg.matrix_norm(s, 2)
    seen = f @ s

    def value(x: Tensor) -> Tensor:
        difference = x @ s - seen
        return (difference.conj() * difference).sum().real / 2

    return Problem(f"QFT-{n} from {count} states", value, 0.0, f)


def mini_batch_pca(seed: int = 0, batch: int = 64, steps: int = 1500) -> MiniBatch:
    """The principal components of the digits from a few images at a time."""
    rows, whole = digits(), pca_digits()
    scale = torch.linalg.eigvalsh(rows.mT @ rows / len(rows))[-1] * batch
    source, epoch = _generator(seed), len(rows) // batch
    epochs = [torch.randperm(len(rows), generator=source) for _ in range(-(-steps // epoch))]
    chosen = torch.cat([e[: epoch * batch] for e in epochs]).view(-1, batch)

    def sample(x: Tensor, step: int) -> Tensor:
        return -(rows[chosen[step]] @ x).square().sum() / scale

    return MiniBatch(whole, sample, steps)


def starved(n: int = 64) -> Starved:
    return Starved(n, noise=20.0, pull=0.05)


MAKERS: dict[str, Callable[[], Problem]] = {
    "pca": pca_digits,
    "brockett": brockett,
    "brockett11": functools.partial(brockett, weights=11),
    "procrustes12": functools.partial(procrustes, n=12),
    "procrustes20": functools.partial(procrustes, n=20),
    "noisy": noisy_procrustes,
    "joint": joint_diagonalisation,
    "gate": qft_gate,
    "states": qft_states,
    "complex": complex_subspace,
}
