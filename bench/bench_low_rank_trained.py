"""Trained nets made low-rank without fine-tuning: a conv net on digits, a transformer on text.

Everything that is needed ships with scikit-learn and with Python: its handwritten digits, and the
help texts of ``pydoc``. Both nets are trained here, in a few minutes, then compressed with
``Budget(parameters=...)``, whose ranks follow the measured errors of the layers.

``python bench/bench_low_rank_trained.py [--seeds 3] [--steps 1000]``
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pydoc_data import topics

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import riemann_unn as ru

METHODS = ("spectral", "linear", "function")
CONTEXT, HEADS = 64, 4


def conv_net() -> nn.Sequential:
    def block(into: int, out: int) -> list[nn.Module]:
        return [nn.Conv2d(into, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]

    return nn.Sequential(
        *block(1, 32),
        *block(32, 64),
        nn.MaxPool2d(2),
        *block(64, 128),
        nn.MaxPool2d(2),
        nn.Flatten(),
        *(nn.Linear(128 * 4, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        parts = self.qkv(self.first(x)).view(n, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts.unbind(0), is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, length, width))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Transformer(nn.Module):
    def __init__(self, letters: int, width: int, depth: int) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(letters, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, letters)

    def forward(self, i: Tensor) -> Tensor:
        place = torch.arange(i.shape[1], device=i.device)
        return self.head(self.norm(self.blocks(self.letters(i) + self.places(place))))


def compressed(
    model: nn.Module, share: float, method: str, data: Tensor, layers: str | list[str] = "*"
) -> tuple[nn.Module, float]:
    """Return a copy whose matched weights have so many parameters, and the seconds it took."""
    thin, start = copy.deepcopy(model), time.perf_counter()
    ru.init.low_rank_(
        thin,
        rank=ru.init.Budget(parameters=share),
        layers=layers,
        method=method,  # type: ignore[arg-type]
        calibration=data,
        progress=False,
    )
    return thin, time.perf_counter() - start


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def weights(model: nn.Module) -> int:
    """The parameters of linear layers, without biases."""
    found = 0
    for m in model.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            found += m.weight.numel()
        elif isinstance(m, (ru.nn.LowRankLinear, ru.nn.LowRankConv2d)):
            found += m.weight_parameters()
    return found


def digits(seed: int) -> None:
    """A conv net at a quarter of its parameters."""
    torch.manual_seed(seed)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    test, train = order[:360], order[360:]
    model = conv_net()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=15 * 23)
    for _ in range(15):
        for part in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
            schedule.step()

    @torch.no_grad()
    def accuracy(net: nn.Module) -> float:
        return float((net.eval()(x[test]).argmax(1) == y[test]).double().mean())

    dense, whole = size(model), accuracy(model)
    rest = dense - weights(model)
    share = (0.25 * dense - rest) / weights(model)
    cells = []
    for method in METHODS:
        thin, seconds = compressed(model, share, method, x[train])
        cells.append(f"{100 * accuracy(thin):.1f} % ({size(thin) / dense:.3f}, {seconds:.0f} s)")
    print(f"| digits, {dense:,} | {100 * whole:.1f} % | " + " | ".join(cells) + " |", flush=True)


def text(seed: int, steps: int, width: int, depth: int, decay: float) -> None:
    """A transformer at half of the parameters of its linear layers."""
    torch.manual_seed(seed)
    raw = "\n".join(topics.topics.values())
    letters = sorted(set(raw))
    index = {letter: i for i, letter in enumerate(letters)}
    coded = torch.tensor([index[letter] for letter in raw])
    cut = int(0.9 * len(coded))
    parts = {"train": coded[:cut], "test": coded[cut:]}

    def batch(part: str, count: int, generator: torch.Generator | None = None) -> Tensor:
        start = torch.randint(len(parts[part]) - CONTEXT - 1, (count,), generator=generator)
        return torch.stack([parts[part][i : i + CONTEXT + 1] for i in start.tolist()])

    model = Transformer(len(letters), width, depth)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        rows = batch("train", 32)
        optimizer.zero_grad()
        F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).backward()
        optimizer.step()
        schedule.step()
    held = batch("test", 512, torch.Generator().manual_seed(1))
    calibration = batch("train", 256, torch.Generator().manual_seed(2))[:, :-1]

    @torch.no_grad()
    def loss(net: nn.Module) -> float:
        net.eval()
        return float(F.cross_entropy(net(held[:, :-1]).flatten(0, 1), held[:, 1:].flatten()))

    whole, before = loss(model), weights(model)
    cells = []
    for method in METHODS:
        thin, seconds = compressed(model, 0.5, method, calibration)
        cells.append(
            f"{loss(thin):.3f} = {loss(thin) / whole:.3f}x ({weights(thin) / before:.3f}, "
            f"{seconds:.0f} s)"
        )
    print(f"| text, {size(model):,} | {whole:.3f} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000, help="of training the transformer")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--decay", type=float, default=0.5, help="of its weights, in AdamW")
    parser.add_argument("--only", choices=("digits", "text"))
    options = parser.parse_args()
    print(
        "| net, parameters | dense | truncated SVD | `linear` | `function` |\n|---|---|---|---|---|"
    )
    runs: dict[str, Callable[[int], None]] = {
        "digits": digits,
        "text": lambda seed: text(seed, options.steps, options.width, options.depth, options.decay),
    }
    for name, run in runs.items():
        for seed in range(options.seeds):
            if options.only in (None, name):
                run(seed)


if __name__ == "__main__":
    main()
