"""Where recurrences start: orthogonal, with the spectra claimed, and readable through gates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import riemann_unn as ru
from riemann_unn.nn import OrthogonalRNN
from riemann_unn.nn.recurrence_init import RECURRENCES
from tests.support import every

REAL_AND_COMPLEX = [torch.float64, torch.complex128]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@every("dtype", [torch.float32, torch.complex64])
@every("n", [1, 2, 64, 65])
@every("init", list(RECURRENCES))
def test_initial_recurrences_are_orthogonal(init: str, n: int, dtype: torch.dtype) -> None:
    rnn = OrthogonalRNN(2, n, init=init, dtype=dtype)
    assert rnn.weight_hh_l0.dtype == dtype
    assert ru.orthogonality_error(rnn.weight_hh_l0) <= 1e-6


@pytest.mark.parametrize("dtype", REAL_AND_COMPLEX)
@pytest.mark.parametrize("n", [400, 401])
def test_initial_spectra_are_the_ones_claimed(dtype: torch.dtype, n: int) -> None:
    def angles(init: str) -> Tensor:
        return torch.linalg.eigvals(RECURRENCES[init](n, dtype, None)).angle()

    henaff, cayley = angles("henaff"), angles("cayley")
    assert cayley.abs().max() <= math.pi / 2 + 1e-12 and cayley.min() < -1 < 1 < cayley.max()
    assert 0.35 < (henaff.abs() > math.pi / 2).double().mean() < 0.65
    assert 0.35 < (angles("haar").abs() > math.pi / 2).double().mean() < 0.65
    assert not angles("identity").any()
    if not dtype.is_complex:
        assert (henaff.abs() < 1e-12).sum() == n % 2  # an odd size ends in a 1
        blocks = RECURRENCES["cayley"](n, dtype, None)
        mask = torch.block_diag(*[torch.ones(2, 2)] * (n // 2), *[torch.ones(1, 1)] * (n % 2))
        assert not (blocks * (1 - mask)).any()


def test_cayley_recurrence_is_the_cayley_transform_of_the_papers_blocks() -> None:
    w = RECURRENCES["cayley"](10, torch.float64, None)
    eye = torch.eye(10, dtype=torch.float64)
    skew = torch.linalg.solve(eye + w, eye - w)  # the Cayley transform is its own inverse
    torch.testing.assert_close(skew.mH, -skew)
    t = torch.linalg.eigvals(w).angle().abs().sort().values[::2]
    s = torch.sqrt((1 - t.cos()) / (1 + t.cos()))
    torch.testing.assert_close(skew.diagonal(1)[::2].abs().sort().values, s)


def test_slow_recurrences_turn_by_at_most_a_tenth_of_a_radian() -> None:
    for dtype in REAL_AND_COMPLEX:
        angles = torch.linalg.eigvals(RECURRENCES["slow"](401, dtype, None)).angle()
        assert angles.abs().max() <= 0.1 + 1e-9
        assert angles.max() > 0.09 and angles.min() < -0.09


def test_a_readout_of_gated_inputs_knows_the_sum_of_marked_numbers() -> None:
    torch.manual_seed(0)
    numbers = torch.rand(60, 800)
    marks = torch.zeros_like(numbers)
    for half in (slice(0, 30), slice(30, 60)):
        marks[half].scatter_(0, torch.randint(0, 30, (1, 800)), 1.0)
    inputs, sums = torch.stack([numbers, marks], -1), (numbers * marks).sum(0)

    def error(gated: bool) -> float:
        rnn = OrthogonalRNN(2, 120, nonlinearity="relu", init="slow")
        if gated:
            ru.nn.gate_inputs_(rnn, 4.0)
            assert not rnn(inputs * torch.tensor([1.0, 0.0]))[0].any()  # unmarked: all gates closed
        with torch.no_grad():
            states = rnn(inputs)[1][0]
        states = torch.cat([states, torch.ones(800, 1)], 1).double()
        fit = torch.linalg.lstsq(states[:500], sums[:500, None].double(), driver="gelsd").solution
        return (states[500:] @ fit - sums[500:, None]).square().mean().item()

    assert error(gated=True) < 0.02 < 0.06 < error(gated=False)


@pytest.mark.parametrize("options", [{"nonlinearity": "modrelu"}, {"bias": False}])
def test_what_has_no_gates_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs an OrthogonalRNN with nonlinearity='relu'"):
        ru.nn.gate_inputs_(OrthogonalRNN(2, 4, **{"nonlinearity": "relu", **options}))
