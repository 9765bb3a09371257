"""Contenders: how each package is asked for a constrained weight and an optimizer of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import riemann_unn as ru


class Column:
    """A package's way to train one matrix; ``lr``, momentum and decay mean what torch says."""

    ours = False
    needs = "torch"

    def __init__(self, name: str) -> None:
        self.name = name

    def module(self, x: Tensor) -> nn.Module:
        """Return a module whose constrained ``weight`` starts at x."""
        module = nn.Linear(*x.mT.shape, bias=False, device="meta")
        module.weight = nn.Parameter(x.clone())
        return module

    def optimizer(self, module: nn.Module, lr: float, **sgd: float) -> torch.optim.Optimizer:
        raise NotImplementedError

    def feed(self, module: nn.Module, g: Tensor) -> None:
        """Make g the gradient of the weight."""
        module.weight.grad = g.clone()


class Ours(Column):
    ours = True

    def module(self, x: Tensor) -> nn.Module:
        manifold = ru.Unitary() if x.is_complex() else ru.Orthogonal()
        return ru.tag_(super().module(x), {"weight": manifold})

    def optimizer(self, module: nn.Module, lr: float, **sgd: float) -> torch.optim.Optimizer:
        return getattr(ru.optim, self.name)(module.parameters(), lr=lr, **sgd)


class Geoopt(Column):
    needs = "geoopt"

    def __init__(self, name: str, *, canonical: bool) -> None:
        super().__init__(name)
        self.canonical = canonical

    def module(self, x: Tensor) -> nn.Module:
        import geoopt

        module = super().module(x)
        manifold = geoopt.Stiefel(canonical=self.canonical)
        module.weight = geoopt.ManifoldParameter(x.clone(), manifold=manifold)
        return module

    def optimizer(self, module: nn.Module, lr: float, **sgd: float) -> torch.optim.Optimizer:
        import geoopt

        return geoopt.optim.RiemannianSGD(module.parameters(), lr=lr, **sgd)


class Pogo(Column):
    needs = "pogo"

    def optimizer(self, module: nn.Module, lr: float, **sgd: float) -> torch.optim.Optimizer:
        from pogo import POGO
        from pogo.base import SGD

        base = SGD(momentum=sgd.pop("momentum", 0))
        return POGO(module.parameters(), base, lr=lr, flatten_fn=lambda x: x.unsqueeze(0), **sgd)


class Parametrization(Column):
    def __init__(self, name: str, orthogonal_map: str) -> None:
        super().__init__(name)
        self.map = orthogonal_map

    def module(self, x: Tensor) -> nn.Module:
        return nn.utils.parametrizations.orthogonal(super().module(x), orthogonal_map=self.map)

    def optimizer(self, module: nn.Module, lr: float, **sgd: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=lr, **sgd)

    def feed(self, module: nn.Module, g: Tensor) -> None:
        module.zero_grad()
        module.weight.backward(g)


COLUMNS: list[Column] = [
    Ours("ProjUNNT"),
    Ours("ProjUNND"),
    Ours("Cayley"),
    Ours("Expm"),
    Geoopt("geoopt, QR", canonical=False),
    Geoopt("geoopt, canonical", canonical=True),
    Pogo("POGO"),
    Parametrization("torch, cayley", "cayley"),
    Parametrization("torch, matrix_exp", "matrix_exp"),
]
