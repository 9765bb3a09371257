"""Procrustes: the rotation between two sets of points, with and without entries missing.

    python docs/examples/procrustes.py

With all entries known the answer is a polar factor, which checks the optimizer. With some of them
unknown there is no closed form: the loss is |W ∘ (A X - B)|², W zero where B is not known.
"""

import torch
from torch import Tensor, nn

import riemann_unn as ru


def align(a: Tensor, b: Tensor, known: Tensor) -> tuple[Tensor, int]:
    """Return the rotation X that brings a closest to b, and the evaluations it took."""
    n = a.shape[1]
    x = ru.tag_(nn.Parameter(torch.eye(n, dtype=a.dtype)), ru.Orthogonal(det=1))
    optimizer = ru.optim.LBFGS([x])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (known * (a @ x - b)).square().sum() / len(a)
        loss.backward()
        return loss

    optimizer.step(closure)
    return x.detach(), optimizer.state[x]["func_evals"]


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    n, points = 20, 200
    a = torch.randn(points, n, dtype=torch.float64, generator=generator)
    truth = ru.Orthogonal(det=1).random(n, n, dtype=torch.float64, generator=generator)
    noise = torch.randn(points, n, dtype=torch.float64, generator=generator)
    b = a @ truth.as_subclass(Tensor) + 0.1 * noise

    x, count = align(a, b, torch.ones_like(b))
    exact = ru.linalg.polar(a.mT @ b, det=1)
    print(f"all known: {count} evaluations, {(x - exact).abs().max():.1e} from the polar factor")

    known = (torch.rand(points, n, generator=generator) < 0.3).double()
    x, count = align(a, b, known)
    filled = ru.linalg.polar(a.mT @ (known * b), det=1)
    print(
        f"30 % known: {count} evaluations, {(x - truth).norm():.2f} from the truth, and with zeros "
        f"filled in {(filled - truth).norm():.2f}"
    )


if __name__ == "__main__":
    main()
