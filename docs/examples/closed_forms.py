"""PCA, Procrustes and joint diagonalisation, each beside the answer that algebra gives.

python docs/examples/closed_forms.py
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import riemann_unn as ru


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor, manifold: ru.Stiefel) -> Tensor:
    x = ru.tag_(nn.Parameter(start.clone()), manifold)
    optimizer = ru.optim.LBFGS([x])

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(x)
        value.backward()
        return value

    optimizer.step(closure)
    return x.detach()


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731

    # PCA: the columns of x span what the leading eigenvectors of a covariance span.
    n, p = 30, 5
    data = draw(500, n) * torch.linspace(0.2, 2, n)
    c = data.mT @ data / len(data)
    x = minimise(lambda x: -(x.mT @ c @ x).trace(), torch.linalg.qr(draw(n, p))[0], ru.Stiefel())
    v = torch.linalg.eigh(c)[1][:, -p:]
    print(f"PCA: the spans differ by {torch.linalg.norm(x @ x.mT - v @ v.mT):.0e}")

    # Procrustes: the rotation that takes a to b best is a polar factor.
    a, b = draw(200, n), draw(200, n)
    x = minimise(lambda x: (a @ x - b).square().sum(), torch.eye(n).double(), ru.Orthogonal(det=1))
    exact = ru.linalg.polar(a.mT @ b, det=1)
    print(f"Procrustes: the rotations differ by {torch.linalg.norm(x - exact):.0e}")

    # Joint diagonalisation: matrices that commute have one basis of eigenvectors.
    n = 8
    basis = torch.linalg.qr(draw(n, n))[0]
    matrices = basis @ torch.diag_embed(draw(6, n)) @ basis.mT
    off = 1 - torch.eye(n).double()
    off_diagonal = lambda x: ((x.mT @ matrices @ x) * off).square().sum()  # noqa: E731
    x = minimise(off_diagonal, torch.linalg.qr(draw(n, n))[0], ru.Orthogonal())
    overlap = (x.mT @ basis).abs()  # a permutation, since order and signs are free
    print(f"joint diagonalisation: the bases differ by {(1 - overlap.amax(0)).max():.0e}")


if __name__ == "__main__":
    main()
