"""Numbers of numpy are taken as Python's, and leave no trace in a state."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import riemann_unn as ru
from riemann_unn.scalars import plain_scalars


def parameter() -> nn.Parameter:
    return ru.tag_(nn.Parameter(torch.eye(8)), ru.Orthogonal())


def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def train(optimizer: torch.optim.Optimizer, p: nn.Parameter, steps: int = 3) -> None:
    for step in range(steps):
        p.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.step()


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 2},
        {"lr": 0.5},
        {"lr": 1},
        {"max_angle": 0.25},
        {"seed": 3},
        {"momentum": 0.5},
        {"base": torch.optim.Adam, "betas": (0.5, 0.75)},
    ],
    ids=str,
)
def test_options_are_those_of_python(options):
    kinds = {int: np.int64, float: np.float32}

    def as_numpy(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(as_numpy, value))
        return kinds[type(value)](value) if type(value) in kinds else value

    given = {key: as_numpy(value) for key, value in options.items()}
    p, q = parameter(), parameter()
    one = ru.optim.ProjUNNT([p], **{"lr": 0.1, **options})
    two = ru.optim.ProjUNNT([q], **{"lr": np.float64(0.1), **given})
    assert one.state_dict()["param_groups"] == two.state_dict()["param_groups"]
    train(one, p)
    train(two, q)
    assert torch.equal(p, q)
    two.load_state_dict(saved(two))


def test_options_of_groups_and_those_set_between_steps():
    p = parameter()
    groups = [{"params": [p], "rank": np.int32(2), "lr": np.float64(0.1)}]
    optimizer = ru.optim.ProjUNNT(groups, lr=1.0)
    assert type(optimizer.param_groups[0]["rank"]) is int
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.float64(0.9) ** step)
    for rank in (np.int64(1), np.int16(3)):
        optimizer.param_groups[0]["rank"] = rank
        optimizer.param_groups[0]["max_angle"] = np.float32(0.5)
        train(optimizer, p, 1)
        schedule.step()
    optimizer.load_state_dict(saved(optimizer))
    assert optimizer.param_groups[0]["rank"] == 3


def test_lbfgs_manifolds_and_layers():
    assert ru.optim.LBFGS([parameter()], history_size=np.int64(5)).state_dict()["param_groups"]
    assert ru.Orthogonal(det=np.int64(-1)) == ru.Orthogonal(det=-1)
    assert ru.Stiefel(blocks=(np.int64(1), np.int8(2))) == ru.Stiefel(blocks=(1, 2))
    assert ru.OrthogonalConv(np.int64(1)) == ru.OrthogonalConv(1)
    assert ru.nn.LowRankLinear(np.int64(6), 6, rank=np.int64(2)).rank == 2
    assert ru.nn.CircularConv1d(2, 2, np.int64(4)).weight.shape == (2, 2, 4)
    report = ru.init.low_rank_(nn.Sequential(nn.Linear(8, 8)), rank=np.int64(2))
    assert report["0"].rank == 2
    zeros = torch.zeros(4, 4)
    assert torch.equal(
        ru.init.hadamard_(zeros.clone(), seed=np.int64(4)), ru.init.hadamard_(zeros, seed=4)
    )


def test_only_scalars_of_numpy_are_changed():
    array, tensor = np.ones(3), torch.ones(3)
    assert plain_scalars(array) is array and plain_scalars(tensor) is tensor
    found = plain_scalars({"a": (np.int64(1), [np.float32(0.5), "x"]), "b": np.bool_(True)})
    assert found == {"a": (1, [0.5, "x"]), "b": True}
    assert type(found["a"][0]) is int and type(found["b"]) is bool


@pytest.mark.parametrize("options", [{"rank": np.float64(2)}, {"rank": np.bool_(True)}], ids=str)
def test_other_kinds_of_numbers_are_refused_as_python_s_are(options):
    with pytest.raises(ru.ManifoldError, match="must be an int"):
        ru.optim.ProjUNNT([parameter()], lr=0.1, **options)
