"""Low-rank layers on pictures: trained from scratch, and made from trained ones."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import riemann_unn as ru
from riemann_unn.demo import data
from riemann_unn.nn import LowRankLinear

from .experiment import Options, Place, Result

__all__ = [
    "COMPRESSIONS",
    "DECAYS",
    "FURTHER",
    "STARTS",
    "compress",
    "net",
    "product_decay",
    "train",
]

_HIDDEN = ("first", "second")
STARTS: dict[str, dict[str, Any] | None] = {  # arguments of low_rank_; none: random factors
    "random": None,
    "spectral": {"method": "spectral"},
    "function": {"method": "function"},
    "function, calibrated": {"method": "function", "calibration": True},
}
COMPRESSIONS: dict[str, dict[str, Any]] = {
    "spectral": {"method": "spectral"},
    "function, Gaussian": {"method": "function"},
    "function, calibrated": {"method": "function", "calibration": True},
}
DECAYS = ("none", "factors", "product")
FURTHER = tuple(range(100, 112))  # seeds that were first run after the claim was fixed
_BATCH = 64


def net(pixels: int, width: int, classes: int, seed: int) -> nn.Sequential:
    """Two hidden layers with ReLU, He-initialised."""
    torch.manual_seed(seed)
    made = nn.Sequential()
    for name, layer in (
        ("first", nn.Linear(pixels, width)),
        ("relu1", nn.ReLU()),
        ("second", nn.Linear(width, width)),
        ("relu2", nn.ReLU()),
        ("last", nn.Linear(width, classes)),
    ):
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        made.add_module(name, layer)
    return made


def product_decay(model: nn.Module) -> Tensor:
    """Half the squared norm of the products of all low-rank layers, without forming them."""
    total = torch.zeros(())
    for layer in model.modules():
        if isinstance(layer, LowRankLinear):
            total = total + ((layer.A.mH @ layer.A) * (layer.B @ layer.B.mH).mT).sum() / 2
    return total


class _Pictures:
    def __init__(self, source: str, validation: bool) -> None:
        found = data.images(source, validation=validation)
        mean, spread = found.train.mean(), found.train.std()
        self.x, self.y = ((found.train - mean) / spread).flatten(1), found.train_classes
        self.test, self.test_y = ((found.test - mean) / spread).flatten(1), found.test_classes
        self.classes = found.classes


def train(options: Options, place: Place) -> Result:
    """Train from one start, at each rank ratio and with each kind of decay.

    Returns:
        By kind of decay, then ratio: test accuracy after the first and after all epochs.
    """
    pictures = _Pictures(options["data"], options["validation"])
    early: dict[str, list[float]] = {}
    final: dict[str, list[float]] = {}
    cells, done = len(options["ratios"]) * len(options["decays"]), 0
    for kind, decay in options["decays"].items():
        for ratio in options["ratios"]:
            model = _started(options, pictures, ratio)
            curve = _train(model, pictures, options, kind, decay)
            early.setdefault(kind, []).append(curve[0])
            final.setdefault(kind, []).append(curve[-1])
            done += 1
            place.tell(done / cells, f"decay of {kind}, ratio {ratio:.3g}: {curve[-1]:.1%}")
    return {"early": early, "final": final}


def _started(options: Options, pictures: _Pictures, ratio: float) -> nn.Sequential:
    seed, width = options["seed"], options["width"]
    pixels = pictures.x.shape[1]
    model = net(pixels, width, pictures.classes, seed)
    how = STARTS[options["start"]]
    if how is None:
        for name in _HIDDEN:
            n = model.get_parameter(f"{name}.weight").shape[1]
            layer = LowRankLinear(n, width, max(round(ratio * min(n, width)), 1))
            with torch.no_grad():
                # He's variance for the product, as the other starts have before they are split.
                for factor in (layer.A, layer.B):
                    factor.mul_(6**0.25)
                nn.init.zeros_(layer.get_parameter("bias"))
            model.set_submodule(name, layer)
        return model
    _replace(model, how, ratio, pictures.x)
    return model


def _replace(model: nn.Module, how: dict[str, Any], ratio: float, x: Tensor) -> None:
    arguments = dict(how)
    if arguments.pop("calibration", False):
        arguments["calibration"] = list(x[:1000].split(100))
    ru.init.low_rank_(
        model,
        rank=float(ratio),
        layers=list(_HIDDEN),
        only_if_smaller=False,
        progress=False,
        **arguments,
    )


def _train(
    model: nn.Module, pictures: _Pictures, options: Options, kind: str, decay: float
) -> list[float]:
    """Train by Adam with a cosine schedule, and return the test accuracy after every epoch."""
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay}, {"params": []}]
    for name, p in model.named_parameters():
        factor = kind == "factors" and name.endswith((".A", ".B"))
        groups[0 if factor else 1]["params"].append(p)
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=options["lr"], weight_decay=0.0
    )
    steps = options["epochs"] * -(-len(pictures.x) // _BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(options["seed"])
    curve = []
    for _ in range(options["epochs"]):
        for rows in torch.randperm(len(pictures.x), generator=generator).split(_BATCH):
            optimizer.zero_grad()
            loss = cross_entropy(model(pictures.x[rows]), pictures.y[rows])
            if kind == "product":
                loss = loss + decay * product_decay(model)
            loss.backward()
            optimizer.step()
            schedule.step()
        curve.append(_accuracy(model, pictures))
    return curve


@torch.no_grad()
def _accuracy(model: nn.Module, pictures: _Pictures) -> float:
    return float((model(pictures.test).argmax(1) == pictures.test_y).double().mean())


def compress(options: Options, place: Place) -> Result:
    """Train a dense net, and replace both hidden layers by every method at every ratio.

    Returns:
        The dense accuracy; by method, at each ratio the accuracy without fine-tuning, and the
        relative error of the logits on the held-out pictures.
    """
    pictures = _Pictures(options["data"], options["validation"])
    pixels = pictures.x.shape[1]
    dense = net(pixels, options["width"], pictures.classes, options["seed"])
    accuracy = _train(dense, pictures, options, "none", 0.0)[-1]
    with torch.no_grad():
        target = dense(pictures.test)
    found: dict[str, list[float]] = {}
    errors: dict[str, list[float]] = {}
    ratios: Sequence[float] = options["ratios"]
    for i, (name, how) in enumerate(COMPRESSIONS.items()):
        for ratio in ratios:
            low = copy.deepcopy(dense)
            _replace(low, how, ratio, pictures.x)
            found.setdefault(name, []).append(_accuracy(low, pictures))
            with torch.no_grad():
                off = (low(pictures.test) - target).square().sum() / target.square().sum()
            errors.setdefault(name, []).append(float(off))
        place.tell((i + 1) / len(COMPRESSIONS), name)
    return {"dense": accuracy, "accuracy": found, "error": errors}
