"""Deep complex networks on the low frequencies of pictures, unitary from different starts."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import riemann_unn as ru
from riemann_unn.demo import data
from riemann_unn.init.warm_start import Method
from riemann_unn.nn import ModReLU

from .experiment import Options, Place, Result

__all__ = ["STARTS", "DeepNet", "Spectra", "train"]

# How a net begins, and the learning rate that it is trained with: the better of 3e-4 and 1e-3 for
# warm starts, with validation; for random weights two, of which one is quicker, one ends higher.
STARTS: dict[str, tuple[str, float]] = {
    "random": ("random", 1e-3),
    "random, faster": ("random", 3e-3),
    "polar": ("polar", 1e-3),
    "lie": ("lie", 1e-3),
    "procrustes": ("procrustes", 3e-4),
}
_BATCH = 128


class Spectra:
    """Pictures by their low frequencies, each with mean zero and mean power one.

    Args:
        source: In words of ``riemann_unn.demo.data``.
        side: Frequencies along either axis.
        validation: Hold out training pictures in place of test pictures.
    """

    def __init__(self, source: str, side: int, *, validation: bool = False) -> None:
        found = data.images(source, validation=validation)
        train, test = (_low(x, side) for x in (found.train, found.test))
        mean = train.mean(0)
        size = (train - mean).abs().square().mean(0).sqrt() + 1e-6
        self.x, self.y = (train - mean) / size, found.train_classes
        self.test, self.test_y = (test - mean) / size, found.test_classes
        self.classes = found.classes


def _low(pictures: Tensor, side: int) -> Tensor:
    """From 0 up along the columns, where the rest is conjugate, and around 0 along the rows."""
    rows = torch.arange(side) - side // 2
    spectrum = torch.fft.fft2(pictures)
    low: Tensor = spectrum[:, rows][:, :, :side]
    return low.flatten(1)


class DeepNet(nn.Module):
    """Complex layers of equal width with modReLU, read out by its moduli.

    Args:
        width: Of all complex layers.
        depth: How many there are.
        classes: Outputs.
    """

    def __init__(self, width: int, depth: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(depth):
            linear = nn.Linear(width, width, bias=False, dtype=torch.complex64)
            with torch.no_grad():
                linear.weight.copy_(ru.Unitary().random(width, width, dtype=torch.complex64))
            layers += [linear, ModReLU(width, dtype=torch.complex64)]
        self.layers = nn.Sequential(*layers)
        self.readout = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of complex features ``(batch, width)``."""
        scores: Tensor = self.readout(self.layers(x).abs())
        return scores


def train(options: Options, place: Place) -> Result:
    """Train freely, convert by each method, and train each conversion and a random start.

    Returns:
        The free net's accuracy; by start the accuracies every quarter of an epoch, from before
        training on, the relative error of the logits then, and the seconds of the conversion.
    """
    spectra = Spectra(options["data"], options["side"], validation=options["validation"])
    seed, depth, width = options["seed"], options["depth"], options["side"] ** 2
    torch.manual_seed(seed)
    free = DeepNet(width, depth, spectra.classes)
    done, total = 0.0, options["free_epochs"] + len(options["starts"]) * options["epochs"]

    def tell(curve: list[float], what: str) -> None:
        nonlocal done
        done += 0.25
        place.tell(min(done / total, 1.0), f"{what}: {curve[-1]:.1%}")

    found: dict[str, Any] = {"accuracy": {}, "error": {}, "converting": {}}
    state = place.load() or {}
    if state:
        free.load_state_dict(state["free"])
        found, done = state["found"], options["free_epochs"]
    else:
        adam = torch.optim.Adam(free.parameters(), lr=options["free_lr"])
        curve: list[float] = []
        for _ in _quarters(free, adam, spectra, options["free_epochs"], seed):
            curve.append(_accuracy(free, spectra))
            tell(curve, "free")
        found["free"], found["gain"], found["off"] = curve[-1], *_singular(free)
    wanted = _logits(free, spectra)
    for start, (method, lr) in options["starts"].items():
        if start in found["accuracy"]:
            done += options["epochs"]
            continue
        model, seconds = _begin(free, method, spectra, options)
        logits = _logits(model, spectra)
        found["error"][start] = float((logits - wanted).norm() / wanted.norm())
        found["converting"][start] = seconds
        optimizer = ru.optim.ProjUNNT(
            model.parameters(),
            lr=lr,
            rank=options["rank"],
            base=torch.optim.Adam,
            seed=seed,
        )
        curve = [_accuracy(model, spectra)]
        for _ in _quarters(model, optimizer, spectra, options["epochs"], seed + 1):
            curve.append(_accuracy(model, spectra))
            tell(curve, start)
        found["accuracy"][start] = curve
        place.save(lambda: {"free": free.state_dict(), "found": found}, now=True)
    return found


def _begin(
    free: DeepNet, method: str, spectra: Spectra, options: Options
) -> tuple[nn.Module, float]:
    """A tagged net on its manifolds, and the seconds that it took to bring it there."""
    tags = {"layers.*.weight": ru.Unitary()}
    if method == "random":
        torch.manual_seed(options["seed"] + 1000)
        width, depth = options["side"] ** 2, options["depth"]
        return ru.tag_(DeepNet(width, depth, spectra.classes), tags), 0.0
    model = ru.tag_(copy.deepcopy(free), tags)
    began = time.perf_counter()
    ru.init.warm_start_(
        model,
        method=cast(Method, method),
        # Without calibration the nearest points are taken as they are.
        calibration=list(spectra.x[:1024].split(_BATCH)) if method == "procrustes" else None,
        progress=False,
    )
    return model, time.perf_counter() - began


def _quarters(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    spectra: Spectra,
    epochs: int,
    seed: int,
) -> Iterator[None]:
    """Train by a cosine schedule, and stop to look four times an epoch."""
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(spectra.x) // _BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        batches = torch.randperm(len(spectra.x), generator=generator).split(_BATCH)
        for i, rows in enumerate(batches, 1):
            optimizer.zero_grad()
            cross_entropy(model(spectra.x[rows]), spectra.y[rows]).backward()
            optimizer.step()
            schedule.step()
            if 4 * i // len(batches) > 4 * (i - 1) // len(batches):
                yield


@torch.no_grad()
def _logits(model: nn.Module, spectra: Spectra) -> Tensor:
    found: Tensor = model(spectra.test)
    return found


def _accuracy(model: nn.Module, spectra: Spectra) -> float:
    return float((_logits(model, spectra).argmax(1) == spectra.test_y).double().mean())


@torch.no_grad()
def _singular(model: DeepNet) -> tuple[float, float]:
    """The mean singular value of the complex layers, and the largest over the smallest."""
    weights = [p for p in model.layers.parameters() if p.is_complex()]
    values = torch.stack([torch.linalg.svdvals(w) for w in weights])
    return float(values.mean()), float((values[:, 0] / values[:, -1]).max())
