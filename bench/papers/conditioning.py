"""Training ReLU networks with and without path conditioning, until they fit their pictures."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import riemann_unn as ru
from riemann_unn.demo import data

from . import authors_pathcond
from .experiment import Options, Place, Result

__all__ = ["NETS", "Net", "build", "carry_", "condition_", "train"]

_MEAN, _SPREAD = 0.1307, 0.3081  # of MNIST's pixels, as the authors standardise them


@dataclass(frozen=True)
class Net:
    """A kind of network.

    Attributes:
        kind: ``"mlp"`` or ``"conv"``.
        depth: Hidden layers of an MLP.
        init: ``"kaiming"`` (normal) or ``"torch"``, its layers' own.
        norm: Whether batch normalisation follows each hidden layer.
    """

    kind: str
    depth: int
    init: str
    norm: bool

    @property
    def title(self) -> str:
        name = f"MLP, {self.depth} hidden layers" if self.kind == "mlp" else "conv net"
        return name + (", BatchNorm" if self.norm else "") + f", {_INITS[self.init]}"


_INITS = {"kaiming": "Kaiming normal", "torch": "PyTorch's initialisation"}
NETS = {
    **{f"mlp{d}": Net("mlp", d, "kaiming", False) for d in range(3, 9)},
    **{f"mlp{d}-norm": Net("mlp", d, "torch", True) for d in range(3, 9)},
    **{f"mlp{d}-torch": Net("mlp", d, "torch", False) for d in (3, 4)},
    "conv": Net("conv", 0, "kaiming", False),
}


def build(net: Net, *, width: int, inputs: int, classes: int, seed: int) -> nn.Sequential:
    """A network as the authors have it: hidden layers with a bias or a normalisation.

    Args:
        net: Which.
        width: Of hidden layers; a 32nd of it in channels.
        inputs: Pixels or coordinates.
        classes: Outputs.
        seed: Of the weights.
    """
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    if net.kind == "conv":
        w, side = width // 32, math.isqrt(inputs)
        layers = [nn.Unflatten(1, (1, side, side)), nn.Conv2d(1, w, 5, 2, 2), nn.ReLU()]
        layers += [nn.Conv2d(w, w, 3, 2, 1), nn.ReLU(), nn.Conv2d(w, w, 3, 2, 1), nn.ReLU()]
        layers += [nn.Flatten(), nn.Linear(w * math.ceil(side / 8) ** 2, classes)]
    else:
        size = inputs
        for _ in range(net.depth):
            layers.append(nn.Linear(size, width, bias=not net.norm))
            layers += [nn.BatchNorm1d(width), nn.ReLU()] if net.norm else [nn.ReLU()]
            size = width
        layers.append(nn.Linear(size, classes, bias=net.norm))
    if net.init == "kaiming":
        for layer in layers:
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return nn.Sequential(*layers)


def condition_(model: nn.Module, method: str, example: Tensor) -> float:
    """Rescale a model, and return the relative change of its outputs in training mode."""
    # Running a normalisation changes its statistics, which both methods read.
    before = copy.deepcopy(model)(example).detach()
    if method == "authors":
        authors_pathcond.rescale_(model)
    else:
        ru.init.path_condition_(model, inputs=example[:2])
    after = copy.deepcopy(model)(example).detach()
    return float((after - before).norm() / before.norm())


def carry_(
    optimizer: torch.optim.Optimizer, model: nn.Module, report: ru.init.PathConditioning
) -> None:
    """Rescale the optimizer's state with the weights: momentum scales as gradients do.

    Args:
        optimizer: Of the model, with momentum or with Adam's moments.
        model: The model.
        report: What rescaled it.
    """
    powers = {"momentum_buffer": 1, "exp_avg": 1, "exp_avg_sq": 2}
    for name, p in model.named_parameters():
        if name in report.scales:
            for key, power in powers.items():
                if optimizer.state[p].get(key) is not None:
                    optimizer.state[p][key].div_(report.scales[name] ** power)


def train(options: Options, place: Place) -> Result:
    """Train one net by one method at each learning rate, until it fits its training pictures.

    Returns:
        By learning rate epochs until the goal (None if never), and the accuracies then; the
        relative change of the function, and seconds that rescaling took.
    """
    pictures = data.images(options["data"])
    x, y = _standardised(pictures.train), pictures.train_classes
    test, test_y = _standardised(pictures.test), pictures.test_classes
    net = Net(**options["net"])
    found: dict[str, list[float | None]] = {"epochs": [], "train": [], "test": []}
    change, seconds = 0.0, 0.0
    for i, lr in enumerate(options["rates"]):
        model = build(
            net,
            width=options["width"],
            inputs=x.shape[1],
            classes=pictures.classes,
            seed=options["seed"],
        )
        if options["method"] != "plain":
            began = time.perf_counter()
            change = condition_(model, options["method"], x[:128])
            seconds = time.perf_counter() - began
        optimizer = _optimizer(options["optimizer"], model, lr)
        generator = torch.Generator().manual_seed(options["seed"])
        reached, accuracy = None, 0.0
        for epoch in range(1, options["epochs"] + 1):
            finite = _epoch(model, optimizer, x, y, generator)
            if not finite:
                break
            accuracy = _accuracy(model, x, y)
            share = (i + epoch / options["epochs"]) / len(options["rates"])
            place.tell(min(share, 1.0), f"lr {lr}, epoch {epoch}, {accuracy:.1%}")
            if accuracy >= options["goal"]:
                reached = epoch
                break
            if options["method"] == "again":
                carry_(optimizer, model, ru.init.path_condition_(model, inputs=x[:2]))
        found["epochs"].append(reached)
        found["train"].append(accuracy)
        found["test"].append(_accuracy(model, test, test_y) if finite else 0.0)
    return {**found, "rates": list(options["rates"]), "change": change, "rescaling": seconds}


def _standardised(pictures: Tensor) -> Tensor:
    return (pictures.flatten(1) - _MEAN) / _SPREAD


def _optimizer(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    if name == "Adam":
        return torch.optim.Adam(model.parameters(), lr=lr)
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9 if name == "momentum" else 0.0)


def _epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    generator: torch.Generator,
) -> bool:
    """Train over the pictures once, in batches of 128; False if the loss is not finite."""
    model.train()
    for rows in torch.randperm(len(x), generator=generator).split(128):
        optimizer.zero_grad()
        loss = cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        if not math.isfinite(loss.item()):
            return False
    return True


@torch.no_grad()
def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    right = torch.cat([model(part).argmax(1) for part in x.split(1000)]) == y
    return float(right.double().mean())
