"""Contenders: for each package, how to make a constrained weight and its optimizer."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import riemann_unn as ru
from riemann_unn.manifolds import MatrixManifold


class Column:
    """A package's way to train one matrix; ``lr``, momentum and decay are as in torch."""

    ours = False
    constrained = True
    needs = "torch"

    def __init__(self, name: str) -> None:
        self.name = name

    def module(self, x: Tensor) -> nn.Module:
        """Return a module whose constrained ``weight`` starts at x."""
        module = nn.Linear(x.shape[-1], x.shape[-2], bias=False, device="meta")
        module.weight = nn.Parameter(x.clone())
        return module

    def optimizer(self, module: nn.Module, lr: float, **sgd: float) -> torch.optim.Optimizer:
        raise NotImplementedError

    def feed(self, module: nn.Module, g: Tensor) -> None:
        """Make g the gradient of the weight."""
        module.weight.grad = g.clone()

    def stepper(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, g: Tensor
    ) -> Callable[[], object]:
        """Return the timed part of a step with the gradient g; g itself may be shared."""
        module.weight.grad = g
        return optimizer.step

    def descend(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        gradient: Callable[[Tensor], Tensor],
    ) -> None:
        """Take a step on the gradient at the weight."""
        module.weight.grad = gradient(module.weight.detach())
        optimizer.step()

    def missing(self) -> str | None:
        """Return why this contender is not available, or None."""
        found = importlib.util.find_spec(self.needs) is not None
        return None if found else f"{self.needs} is not installed"


class Unconstrained(Column):
    """A ``torch.optim`` class without a constraint."""

    constrained = False

    def __init__(self, name: str, optimizer: str, **options: object) -> None:
        super().__init__(name)
        self.kind, self.options = optimizer, options

    def optimizer(self, module: nn.Module, lr: float, **sgd: float) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.kind)(module.parameters(), lr=lr, **self.options, **sgd)


class Ours(Column):
    """One of our optimizers; ``label`` is its name in a table, ``options`` are its arguments."""

    ours = True

    def __init__(self, name: str, label: str | None = None, **options: object) -> None:
        super().__init__(name if label is None else label)
        self.kind, self.options = name, options

    def module(self, x: Tensor) -> nn.Module:
        square: MatrixManifold = ru.Unitary() if x.is_complex() else ru.Orthogonal()
        manifold = square if x.shape[-1] == x.shape[-2] else ru.Stiefel()
        return ru.tag_(super().module(x), {"weight": manifold})

    def optimizer(self, module: nn.Module, lr: float, **sgd: float) -> torch.optim.Optimizer:
        kind = getattr(ru.optim, self.kind)
        return kind(module.parameters(), lr=lr, **self.options, **sgd)


class Geoopt(Column):
    needs = "geoopt"

    def __init__(self, name: str, *, canonical: bool, optimizer: str = "RiemannianSGD") -> None:
        super().__init__(name)
        self.canonical, self.kind = canonical, optimizer

    def module(self, x: Tensor) -> nn.Module:
        import geoopt

        module = super().module(x)
        manifold = geoopt.Stiefel(canonical=self.canonical)
        module.weight = geoopt.ManifoldParameter(x.clone(), manifold=manifold)
        return module

    def optimizer(self, module: nn.Module, lr: float, **sgd: float) -> torch.optim.Optimizer:
        import geoopt

        return getattr(geoopt.optim, self.kind)(module.parameters(), lr=lr, **sgd)


class Pogo(Column):
    needs = "pogo"

    def optimizer(self, module: nn.Module, lr: float, **sgd: float) -> torch.optim.Optimizer:
        from pogo import POGO
        from pogo.base import SGD

        base = SGD(momentum=sgd.pop("momentum", 0))
        params = list(module.parameters())
        shape = params[0].shape
        options: dict[str, Any] = {"rows": shape[-2] <= shape[-1]}
        if len(shape) == 2:  # it takes batches only
            options["flatten_fn"] = lambda x: x.unsqueeze(0)
        return POGO(params, base, lr=lr, **options, **sgd)


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

    def stepper(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, g: Tensor
    ) -> Callable[[], object]:
        def step() -> None:  # includes the map and its derivative
            self.feed(module, g)
            optimizer.step()

        return step

    def descend(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        gradient: Callable[[Tensor], Tensor],
    ) -> None:
        module.zero_grad()
        w = module.weight
        w.backward(gradient(w.detach()))
        optimizer.step()


class Geotorch(Parametrization):
    needs = "geotorch"

    def module(self, x: Tensor) -> nn.Module:
        import geotorch

        module = Column.module(self, x)
        geotorch.orthogonal(module, "weight")
        module.weight = x
        return module


class Many(nn.ModuleList):
    """Modules with a weight each; their weights stacked are its own."""

    @property
    def weight(self) -> Tensor:
        return torch.stack([module.weight for module in self])


class Separate(Column):
    """A stack of matrices as parameters of their own, all in one optimizer."""

    def __init__(self, inner: Column, name: str) -> None:
        super().__init__(name)
        self.inner, self.needs = inner, inner.needs
        self.ours, self.constrained = inner.ours, inner.constrained

    def module(self, x: Tensor) -> nn.Module:
        return Many(self.inner.module(matrix) for matrix in x)

    def optimizer(self, module: nn.Module, lr: float, **sgd: float) -> torch.optim.Optimizer:
        return self.inner.optimizer(module, lr, **sgd)

    def stepper(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, g: Tensor
    ) -> Callable[[], object]:
        assert isinstance(module, Many)
        for part, gradient in zip(module, g, strict=True):
            part.weight.grad = gradient.clone()
        return optimizer.step


class Reference(Column):
    """The authors' projUNN, from the checkout that PROJUNN_REFERENCE points to."""

    def __init__(self, name: str, function: str, rank: int) -> None:
        super().__init__(name)
        self.function, self.rank = function, rank

    def missing(self) -> str | None:
        path = os.environ.get("PROJUNN_REFERENCE")
        if not path:
            return "PROJUNN_REFERENCE does not point to a checkout of facebookresearch/projUNN"
        found = (Path(path) / "projunn" / "utils.py").exists()
        return None if found else "PROJUNN_REFERENCE points to no checkout of projUNN"

    def optimizer(self, module: nn.Module, lr: float, **sgd: float) -> torch.optim.Optimizer:
        utils, optimizers = reference_module("utils"), reference_module("optimizers")
        project = getattr(utils, self.function)

        def projector(x: Tensor, update: Tensor) -> Tensor:
            a, b = utils.LSI_approximation(update, self.rank)
            moved: Tensor = project(x.data, a, b, project_on=False)
            return moved

        for p in module.parameters():
            p.needs_projection = True
        return optimizers.SGD(module.parameters(), projector, lr, **sgd)


def reference_module(name: str) -> ModuleType:
    """Import one file of the checkout: its package as a whole does not import."""
    package = "projunn_reference"
    folder = Path(os.environ["PROJUNN_REFERENCE"]) / "projunn"
    if package not in sys.modules:
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [str(folder)]
    return importlib.import_module(f"{package}.{name}")


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
