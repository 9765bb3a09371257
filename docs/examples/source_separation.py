"""Blind source separation: signals that were mixed, found again from their spectra alone.

    python docs/examples/source_separation.py

Independent signals have diagonal covariances at every lag. Mixed and whitened, these become
Aₖ = Q Dₖ Qᵀ with one rotation Q, so the rotation that makes all Aₖ diagonal at once unmixes them
(Belouchrani et al., "A blind source separation technique using second-order statistics", 1997).
"""

import torch
from torch import Tensor, nn

import riemann_unn as ru

LAGS = range(1, 13)


def resonances(count: int, length: int, generator: torch.Generator) -> Tensor:
    noise = torch.randn(count, length, dtype=torch.float64, generator=generator)
    angles = torch.linspace(0.2, 2.8, count, dtype=torch.float64)
    found, before, last = [], torch.zeros(count).double(), torch.zeros(count).double()
    for drive in noise.mT:
        before, last = last, drive + 1.8 * angles.cos() * last - 0.81 * before
        found.append(last)
    return torch.stack(found, dim=1)


def covariance(x: Tensor, lag: int) -> Tensor:
    c = x[:, lag:] @ x[:, : x.shape[1] - lag].mT / (x.shape[1] - lag)
    return (c + c.mT) / 2


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    sources = resonances(6, 20_000, generator)
    mixed = torch.randn(6, 6, dtype=torch.float64, generator=generator) @ sources
    values, vectors = torch.linalg.eigh(covariance(mixed, 0))
    white = (vectors / values.sqrt()).mT @ mixed
    matrices = torch.stack([covariance(white, lag) for lag in LAGS])

    rotation = ru.tag_(nn.Parameter(torch.eye(6, dtype=torch.float64)), ru.Orthogonal(det=1))
    optimizer = ru.optim.LBFGS([rotation])
    off = 1 - torch.eye(6).double()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = ((rotation.mT @ matrices @ rotation) * off).square().sum()
        loss.backward()
        return loss

    first, last = (float(loss.detach()) for loss in (optimizer.step(closure), closure()))
    found = rotation.detach().mT @ white
    likeness = torch.corrcoef(torch.cat([sources, found]))[:6, 6:].abs()
    print(f"off the diagonals: {first:.2f} before, {last:.4f} after")
    print(f"evaluations: {optimizer.state[rotation]['func_evals']}")
    print(f"correlation with the sources: {likeness.amax(dim=1).min():.4f} at least")


if __name__ == "__main__":
    main()
