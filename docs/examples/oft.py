"""Orthogonal fine-tuning (OFT): a frozen weight W becomes B W, with orthogonal blocks in B.

python docs/examples/oft.py
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import riemann_unn as ru


class Turned(nn.Module):
    def __init__(self, linear: nn.Linear, size: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.blocks = nn.Parameter(torch.eye(size).repeat(linear.out_features // size, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = (x @ self.linear.weight.mT).unflatten(-1, (len(self.blocks), -1, 1))
        return (self.blocks @ y).flatten(-3) + self.linear.bias

    def merged(self) -> nn.Linear:
        blocks, weight = self.blocks.detach(), self.linear.weight
        weight.copy_((blocks @ weight.unflatten(0, (len(blocks), -1))).flatten(0, 1))
        return self.linear


def train(model, optimizer, x: Tensor, y: Tensor) -> None:
    for rows in torch.randint(len(y), (400, 64)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    digits, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
    x = digits.float() / 16
    sideways = x.unflatten(-1, (8, 8)).mT.flatten(1)  # what the network is adapted to
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
    model.append(nn.Linear(128, 10))
    train(model, torch.optim.Adam(model.parameters(), lr=3e-3), x[500:], y[500:])

    def right(when: str) -> None:
        print(f"{when} {(model(sideways[:500]).argmax(-1) == y[:500]).float().mean():.1%} right")

    right("held-out digits on their side:")
    model[0], model[2] = Turned(model[0], 32), Turned(model[2], 32)
    ru.tag_(model, {"*.blocks": ru.Orthogonal(det=1)})
    blocks = ru.tagged_parameters(model)
    train(model, ru.optim.Cayley(blocks, lr=3e-3, base=torch.optim.Adam), sideways[500:], y[500:])
    right("after turning")
    model[0], model[2] = model[0].merged(), model[2].merged()
    right("after merging")


if __name__ == "__main__":
    main()
