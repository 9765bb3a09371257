"""A rotation learned for quantisation: the loss of a tiny language model before and after.

    python docs/examples/rotations.py

A turn x → x R of the residual stream changes what rounding loses and nothing else (SpinQuant's R1).
"""

from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import riemann_unn as ru

W, CONTEXT, LAYERS, BITS = 64, 32, 2, 3


def rounded(x: Tensor) -> Tensor:
    scale = x.detach().abs().amax(-1, keepdim=True) / (2 ** (BITS - 1) - 0.5)
    return x + (((x / scale + 0.5).round() - 0.5) * scale - x).detach()  # the gradient passes


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.letter, self.place = nn.Embedding(128, W), nn.Embedding(CONTEXT, W)
        self.reads = nn.ModuleList(nn.Linear(W, n, False) for n in LAYERS * [3 * W, 4 * W] + [128])
        self.writes = nn.ModuleList(nn.Linear(n, W, False) for n in LAYERS * [W, 4 * W])

    def loss(self, text: Tensor, r: Tensor, q=lambda x: x) -> Tensor:
        x = (self.letter(text[:, :-1]) + self.place.weight) @ r
        for read, write in zip(self.reads, [*self.writes, None], strict=True):
            y = q(F.rms_norm(x, (W,))) @ q(read.weight @ r).mT
            if write is None:
                return F.cross_entropy(y.mT, text[:, 1:])
            if read.out_features == 3 * W:
                heads = y.unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
                y = F.scaled_dot_product_attention(*heads, is_causal=True).mT.flatten(1, 2).mT
            x = x + q(y if read.out_features == 3 * W else F.gelu(y)) @ q(r.mT @ write.weight).mT


def train(optimizer, steps, size, decay, *turn_and_rounding) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(rows[torch.randint(len(rows), (size,))], *turn_and_rounding).backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= decay


torch.manual_seed(0)
text = torch.tensor(list("".join(topics.values()).encode("ascii", "replace")))  # Python's manual
held, rows = text.unfold(0, CONTEXT + 1, CONTEXT + 1).tensor_split([128])
model, none = Tiny(), torch.eye(W)
train(torch.optim.Adam(model.parameters(), lr=3e-3), 400, 32, 1.0, none)
model.requires_grad_(False)
r = ru.tag_(nn.Parameter(none.clone()), ru.Orthogonal())
train(ru.optim.Cayley([r], lr=6e-3, base=torch.optim.Adam), 60, 64, 0.95, r, rounded)
for name, q in ("exact", lambda x: x), (f"in {BITS} bits", rounded):
    print(f"loss {name}: {model.loss(held, none, q):.3f}, turned {model.loss(held, r, q):.3f}")
