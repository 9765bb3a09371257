"""A rotation learned for quantisation: the loss of a tiny language model before and after.

    python docs/examples/rotations.py

Turning the residual stream, x → x R, changes what rounding loses and nothing that the network
computes. So R is learned on the rounded network (SpinQuant's R1).
"""

from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import riemann_unn as ru

W, CONTEXT, LAYERS, BITS = 64, 64, 2, 3


def rounded(x: Tensor) -> Tensor:
    scale = x.detach().abs().amax(-1, keepdim=True) / (2 ** (BITS - 1) - 0.5)
    # Each row to 2^BITS levels; gradients pass as if nothing was rounded.
    return x + (((x / scale + 0.5).round() - 0.5) * scale - x).detach()


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.letter, self.place = nn.Embedding(128, W), nn.Embedding(CONTEXT, W)
        self.reads = nn.ModuleList(nn.Linear(W, n, False) for n in LAYERS * [3 * W, 4 * W] + [128])
        self.writes = nn.ModuleList(nn.Linear(n, W, False) for n in LAYERS * [W, 4 * W])

    def loss(self, text: Tensor, r: Tensor, q=lambda x: x) -> Tensor:
        x = (self.letter(text[:, :-1]) + self.place.weight) @ r
        for read, write in zip(self.reads, self.writes):  # noqa: B905, the last reads the letters
            y = q(F.rms_norm(x, (W,))) @ q(read.weight @ r).mT
            if read.out_features == 3 * W:
                heads = y.unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
                y = F.scaled_dot_product_attention(*heads, is_causal=True).mT.flatten(1, 2).mT
            else:
                y = F.gelu(y)
            x = x + q(y) @ q(r.mT @ write.weight).mT
        y = q(F.rms_norm(x, (W,))) @ q(self.reads[-1].weight @ r).mT
        return F.cross_entropy(y.mT, text[:, 1:])


def train(optimizer, steps, *turn_and_rounding) -> None:
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.02, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(rows[torch.randint(len(rows), (64,))], *turn_and_rounding).backward()
        optimizer.step()
        schedule.step()


torch.manual_seed(0)
text = torch.tensor(list("".join(topics.values()).encode("ascii", "replace")))  # Python's manual
held, rows = text.unfold(0, CONTEXT + 1, CONTEXT + 1).tensor_split([128])
model, none = Tiny(), torch.eye(W)
train(torch.optim.Adam(model.parameters(), lr=1e-2), 300, none)
model.requires_grad_(False)
r = ru.tag_(nn.Parameter(none.clone()), ru.Orthogonal())
train(ru.optim.Cayley([r], lr=6e-3, base=torch.optim.Adam), 60, r, rounded)
print(f"held-out loss: exact {model.loss(held, none):.3f}, turned {model.loss(held, r):.3f}")
before, after = model.loss(held, none, rounded), model.loss(held, r, rounded)
print(f"in {BITS} bits: {before:.3f} before, {after:.3f} after")
