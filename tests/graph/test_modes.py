"""Who asks for training mode while a model is read, and so has it read in the other mode too."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from riemann_unn.graph import trace
from riemann_unn.graph.program import read
from tests.graph.models import build


class Asking(nn.Module):
    """Uses one weight in training and another in evaluation mode, and asks for it in some way."""

    def __init__(self, ask):
        super().__init__()
        self.ask, self.norm = ask, nn.BatchNorm1d(4)
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        x = F.relu(self.norm(self.a(x)))
        return self.b(x) if self.ask(self) else self.c(x)


def switched(module):
    was = module.training
    module.eval()
    module.train(was)
    return was


ASKS = {
    "attribute": lambda m: m.training,
    "getattr": lambda m: getattr(m, "training", False),
    "of a part": lambda m: m.norm.training,
    "vars": lambda m: vars(m)["training"],
    "switched": switched,
}


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
@pytest.mark.parametrize("training", [True, False])
def test_whoever_asks_for_the_mode_is_read_in_both(ask, training):
    model = Asking(ask).train(training)
    assert {"b.weight", "c.weight"} <= set(trace(model, torch.randn(3, 4)).scalings)
    assert model.training is training and type(model._parameters) is dict


def test_a_mode_of_the_class_itself_is_asked_for_too():
    class Always(nn.Linear):
        training = True

    always = Always(3, 2)
    del always.training
    assert read(nn.Sequential(always), (torch.randn(2, 3),), {}).depends_on_mode


@pytest.mark.parametrize("name", ["mlp", "resnet-bn", "sequence", "gelu"])
def test_where_only_norms_and_dropout_ask_for_the_mode_one_reading_is_enough(name):
    model, x = build(name)
    assert not read(nn.Sequential(model, nn.Dropout()), (x,), {}).depends_on_mode
    names = [set(trace(model.train(mode), x).scalings) for mode in (True, False)]
    assert names[0] == names[1]
