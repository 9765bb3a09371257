"""One optimizer step on one n x n matrix, beside torch's own optimizers; asserts nothing."""

import pytest
import torch

import riemann_unn as ru

SIZES = (128, 512, 1024, 2048, 4096)

UNCONSTRAINED = {
    "sgd": lambda p: torch.optim.SGD([p], lr=1e-2),
    "adam-fused": lambda p: torch.optim.Adam([p], lr=1e-3, fused=True),
}
MANIFOLD = {
    f"{cls.__name__}-rank{rank}": (cls, rank)
    for cls in (ru.optim.ProjUNNT, ru.optim.ProjUNND)
    for rank in (1, 8)
}


def orthogonal_parameter(n: int) -> torch.nn.Parameter:
    """A random orthogonal matrix with a gradient whose steps have a size that training has."""
    generator = torch.Generator().manual_seed(n)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator))[0]
    p = torch.nn.Parameter(q.contiguous())
    p.grad = torch.randn(n, n, generator=generator) / n
    return p


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", [*UNCONSTRAINED, *MANIFOLD])
def test_step(benchmark, name, n):
    p = orthogonal_parameter(n)
    if name in UNCONSTRAINED:
        opt = UNCONSTRAINED[name](p)
    else:
        cls, rank = MANIFOLD[name]
        ru.tag_(p, ru.Orthogonal())
        opt = cls([p], lr=1e-2, rank=rank)
    for _ in range(5):  # lazy state, warm start of the sketch
        opt.step()
    benchmark(opt.step)
    error = ru.orthogonality_error(p.detach(), ru.Orthogonal())
    benchmark.extra_info["orthogonality_error"] = float(error)
