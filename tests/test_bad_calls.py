"""Bad calls of the conveniences: each raises a typed error that says what, why and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import riemann_unn as ru
from riemann_unn.errors import StateError


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape, dtype=dtype))


def parametrized() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    parametrizations.orthogonal(model[0])
    return model


def tagged() -> nn.Sequential:
    model = ru.tag_(nn.Sequential(nn.Linear(4, 4)), {"0.weight": ru.Orthogonal()})
    nn.init.eye_(model[0].weight)
    return model


def optimizer(**options: Any) -> torch.optim.Optimizer:
    return ru.optim.ProjUNNT(tagged().parameters(), **{"lr": 0.1, **options})


def with_the_state_of_other_blocks() -> None:
    p = ru.tag_(nn.Parameter(torch.eye(2).repeat(2, 1)), ru.Orthogonal(blocks=2))
    q = ru.tag_(nn.Parameter(torch.eye(4, 2)), ru.Stiefel())
    one, other = (ru.optim.Expm([x], lr=0.1, momentum=0.9) for x in (p, q))
    p.grad = torch.randn(4, 2)
    one.step()
    other.load_state_dict(one.state_dict())


E, T = ru.ManifoldError, ru.ManifoldTypeError
CALLS: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    "no blocks": (lambda: ru.Orthogonal(blocks=0), E, ["blocks=0", "such as 4", "(1, 8)"]),
    "half a block": (lambda: ru.Stiefel(blocks=2.5), E, ["blocks=2.5", "how many blocks"]),
    "three numbers": (lambda: ru.Unitary(blocks=(1, 2, 3)), E, ["blocks=(1, 2, 3)", "columns"]),
    "rows that 4 does not divide": (
        lambda: ru.tag_(weight(10, 5), ru.Orthogonal(blocks=4)),
        E,
        ["10 rows", "4 blocks of one size"],
    ),
    "columns that 3 does not divide": (
        lambda: ru.tag_(weight(6, 8), ru.Stiefel(blocks=(1, 3))),
        E,
        ["8 columns", "3 blocks"],
    ),
    "blocks that are not square": (
        lambda: ru.tag_(nn.LSTM(3, 6), {"weight_ih_l0": ru.Orthogonal(blocks=4)}),
        E,
        ["'weight_ih_l0'", "(6, 3)", "Stiefel() takes others"],
    ),
    "a point off its blocks": (
        lambda: ru.optim.ProjUNNT(
            [ru.tag_(nn.Parameter(torch.eye(8, 2)), ru.Orthogonal(blocks=4))], lr=0.1
        ),
        ru.OffManifoldError,
        ["Orthogonal(blocks=4)", "warm_start_"],
    ),
    "a state of other blocks": (
        with_the_state_of_other_blocks,
        StateError,
        ["Stiefel(blocks=2)", "Nothing was loaded"],
    ),
    "no Hadamard matrix": (
        lambda: ru.init.hadamard_(weight(92, 92)),
        E,
        ["order 92", "88 and 96", "torch.nn.init.orthogonal_"],
    ),
    "an odd order": (lambda: ru.init.hadamard_(weight(7, 3)), E, ["order 7", "4 and 8"]),
    "a Hadamard vector": (lambda: ru.init.hadamard_(weight(8)), E, ["two or more dimensions"]),
    "a Hadamard kernel": (
        lambda: ru.init.hadamard_(ru.nn.CircularConv1d(2, 2, 4)),
        T,
        ["'weight'", "OrthogonalConv(1)", "no convolution"],
    ),
    "a module without tags": (
        lambda: ru.init.hadamard_(nn.Linear(4, 4)),
        E,
        ["no tagged parameter", "pattern="],
    ),
    "a pattern of nothing": (
        lambda: ru.init.hadamard_(nn.Linear(4, 4), pattern="wait"),
        E,
        ["pattern='wait'", "'weight', 'bias'"],
    ),
    "a pattern for a tensor": (
        lambda: ru.init.hadamard_(weight(4, 4), pattern="*"),
        T,
        ["pass the module"],
    ),
    "a seed that is none": (
        lambda: ru.init.hadamard_(weight(4, 4), seed="today"),
        T,
        ["seed='today'", "integer"],
    ),
    "a parametrized weight": (
        lambda: ru.tag_(parametrized(), {"0.weight": ru.Orthogonal()}),
        E,
        ["'0.weight'", "Orthogonal", "remove_parametrizations", "leave_parametrized=True"],
    ),
    "a computed weight": (
        lambda: ru.tag_(parametrized()[0].weight, ru.Orthogonal()),
        T,
        ["is a Tensor", "remove_parametrizations"],
    ),
    "a source that says too little": (
        lambda: ru.init.warm_start_(
            ru.tag_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), {"0.weight": ru.Stiefel()}),
            source=parametrized().state_dict(),
        ),
        E,
        ["'0.weight' is parametrized there", "the model itself as source="],
    ),
    "a state without biases": (
        lambda: ru.nn.OrthogonalRNN(3, 4, 1, "tanh").load_state_dict(
            nn.RNN(3, 4, bias=False).state_dict()
        ),
        RuntimeError,
        ["Missing key", "bias_ih_l0"],
    ),
    "a rank between two": (lambda: optimizer(rank=np.float64(1.5)), E, ["rank=1.5", "an int"]),
    "an angle in words": (lambda: optimizer(max_angle="small"), E, ["max_angle='small'"]),
    "a rate in words": (lambda: optimizer(lr="1e-3"), T, ["lr='1e-3'", "no number"]),
    "parameters twice": (
        lambda: ru.param_groups(tagged(), lr=0.1, params=[]),
        TypeError,
        ["from the model"],
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_bad_call_says_what_is_wrong_and_what_to_do(name):
    call, error, words = CALLS[name]
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    assert all(word in message for word in words), message
    assert len(message) < 700
