"""Inferring an input: which shapes are tried, and when trying stops."""

from __future__ import annotations

import pytest
from torch import nn

from riemann_unn.errors import GraphError
from riemann_unn.graph import inferred_input as module


class Refusing(nn.Module):
    """Runs on nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        raise ValueError("not this one")


@pytest.fixture
def tried(monkeypatch):
    """The shapes and dtypes that were tried."""
    found = []
    run = module._run_without_values

    def spy(model, shape, dtype, device):
        found.append((shape, dtype))
        run(model, shape, dtype, device)

    monkeypatch.setattr(module, "_run_without_values", spy)
    return found


def test_a_model_without_a_forward_is_tried_once(tried):
    with pytest.raises(GraphError, match="With the first guess: NotImplementedError"):
        module.inferred_input(nn.ModuleList([nn.Linear(3, 3)]))
    assert len(tried) == 1


def test_one_that_refuses_all_is_tried_with_every_shape_once(tried):
    with pytest.raises(GraphError, match="With the first guess: ValueError: not this one"):
        module.inferred_input(Refusing())
    assert 1 < len(tried) == len(set(tried))
