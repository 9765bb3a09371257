"""Orthogonal fine-tuning: a frozen network is adapted by turning blocks of its features.

    python docs/examples/oft.py

A frozen weight W becomes B W with orthogonal blocks in B (Qiu et al., 2023), which are multiplied
into W when training is over.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import riemann_unn as ru


class Turned(nn.Module):
    def __init__(self, linear: nn.Linear, block: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.blocks = nn.Parameter(torch.eye(block).repeat(linear.out_features // block, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.linear.weight).unflatten(-1, (len(self.blocks), -1, 1))
        return (self.blocks @ y).flatten(-3) + self.linear.bias

    def merged(self) -> nn.Linear:
        weight = self.linear.weight.unflatten(0, (len(self.blocks), -1))
        self.linear.weight.data = (self.blocks @ weight).flatten(0, 1).detach()
        return self.linear


def train(model, optimizer, x: Tensor, y: Tensor) -> None:
    for _ in range(20):
        for rows in torch.randperm(len(y)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    x, y = map(torch.tensor, load_digits(return_X_y=True))
    x = x.float() / 16
    sideways = x.unflatten(-1, (8, 8)).mT.flatten(1)  # what the network is adapted to
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
    model.append(nn.Linear(128, 10))
    train(model, torch.optim.Adam(model.parameters(), lr=3e-3), x[500:], y[500:])

    def right() -> str:
        return f"{(model(sideways[:500]).argmax(-1) == y[:500]).float().mean():.1%}"

    print(f"held-out digits on their side: {right()} right", end=", ")
    model[0], model[2] = Turned(model[0], 32), Turned(model[2], 32)
    ru.tag_(model, {"*.blocks": ru.Orthogonal(det=1)})
    blocks = ru.tagged_parameters(model)  # these alone are trained
    train(model, ru.optim.Cayley(blocks, lr=3e-3, base=torch.optim.Adam), sideways[500:], y[500:])
    print(f"{right()} after turning", end=", ")
    model[0], model[2] = model[0].merged(), model[2].merged()
    print(f"{right()} after merging")


if __name__ == "__main__":
    main()
